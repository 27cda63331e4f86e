"""Training of encoders and decoders on batches: one Adam, its whole step captured where that pays."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.data import Arguments
from ..model.dtypes import default_dtype
from .adam import EPSILON, adam
from .capture import AGREEMENT, Compile, Graph, compiled, gap_between

if TYPE_CHECKING:
    from .batched import BatchFit

RATE, BETAS = 2e-3, (0.9, 0.999)
WORTH_TRACE, WORTH_COMPILER = 5.0, 40.0  # predicted seconds of eager steps after which a graph pays
SINGLE = 1e-2  # agreement of graphs in float32; Adam's first step is a sign
TIMED = 20  # eager steps before that is decided
Moments = tuple[Tensor, ...]
"""x, Adam's two running means, and its counts of steps: of the encoder, and of the rest."""


class NetworkStep:
    """Adam steps on minus the bound per row; bound, gradient and Adam in one graph where it pays.

    Args:
        fit: the problem on batches.
        pairs: antithetic pairs of draws; 0 for one draw.
        mode: `compile=` of the fit.
        num_steps: predicted.
        seed: of the draws.
    """

    def __init__(self, fit: "BatchFit", pairs: int, mode: Compile, num_steps: int, seed: int) -> None:
        self.fit, self.pairs, self.mode, self.num_steps = fit, pairs, mode, num_steps
        x = fit.start
        self.moments: Moments = (x, torch.zeros_like(x), torch.zeros_like(x), torch.zeros(2).double())
        self.rate = torch.tensor(RATE, dtype=torch.float64)
        self._before: Moments = self.moments
        self.generator = torch.Generator().manual_seed(seed + fit.processes.seed)
        self.rejected = 0
        self.weight = torch.ones((), dtype=torch.float64)  # of KL terms
        self.every = torch.ones_like(x)  # entries that a step moves
        is_encoder = torch.as_tensor(fit.block.where(fit.first.phi.names))
        self.encoder = is_encoder.to(x.dtype)
        self.dtype = self._dtype()
        self._graph: Graph | None = None
        self._is_decided, self._eager_seconds, self._num_eager = mode is False, 0.0, 0

    def _dtype(self) -> torch.dtype:
        """Of forward and backward passes: that of the weights as they were given. Adam's is float64."""
        programs = (self.fit.first.problem.model, self.fit.first.problem.guide)
        weights = [w.dtype for p in programs if p is not None for w in p.shell.parameters()]
        has_buffers = any(True for p in programs if p is not None for _ in p.shell.buffers())
        is_single = bool(weights) and all(w is torch.float32 for w in weights) and not has_buffers
        if is_single:
            self.fit.first.objective.add_note("networks are trained in float32, as their weights are given")
        return torch.float32 if is_single else torch.float64

    @property
    def x(self) -> Tensor:
        """Where the steps have come to."""
        return self.moments[0]

    def step(self, call: Arguments, is_encoder_only: bool = False) -> float:
        """One step on a batch; the bound that it stands for, before the step; nan if it was not taken."""
        noise = self.fit.noise(call, self.pairs, self.generator)
        # A copy: what is an argument and a constant of the step alike is an argument to the tracer.
        moving = self.encoder.clone() if is_encoder_only else self.every
        given = [*self.moments, self.rate, self.weight, moving, *_tensors(call).values(), *noise.values()]
        is_first_size = self.fit.rows.size(call) == self.fit.rows.size(self.fit.first.problem.call)
        if not self._is_decided and is_first_size:
            self._decide(call, noise, given)
        start = time.perf_counter()
        graph = self._graph if is_first_size else None
        with default_dtype(self.dtype):  # graphs make constants of the default dtype
            found = graph(*given) if graph is not None else self._eager(call, noise)(*given)
        self._eager_seconds += time.perf_counter() - start
        self._num_eager += 1
        if self.fit.processes.count > 1:
            value, gradient = self.fit.summed(*found)
            largest, *after = self._adam(self.moments, gradient, self.rate, moving)
        else:
            value, largest, *after = found
        if not math.isfinite(float(largest)):
            self.rejected += 1  # the step before led here: go back, and on with half of it
            self.moments, self.rate = self._before, self.rate / 2
            return float("nan")
        self._before, self.moments = self.moments, tuple(after)
        return float(value)

    def anneal(self, epoch: int, epochs: int) -> None:
        """Set the weight of KL terms: rising to one over the first epochs."""
        self.weight = torch.tensor(min(1.0, (epoch + 1) / max(1, epochs)), dtype=torch.float64)

    def _eager(self, call: Arguments, noise: Mapping[str, Tensor]) -> Any:
        """The step as a function of tensors: moments, rate, weight of KL terms, what moves, data, noise.

        It gives the bound, the largest entry of x and the moments; in several processes the bound and its
        gradient, which are then summed over them.
        """
        names, draws, dtype = list(_tensors(call)), list(noise), self.dtype
        total = self.fit.total / self.fit.weight(call)

        def gradient(x: Tensor, weight: Tensor, rest: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            cast = [value.to(dtype) if value.is_floating_point() else value for value in rest]
            kwargs = {**call.kwargs, **dict(zip(names, cast[: len(names)], strict=True))}
            here = dict(zip(draws, cast[len(names) :], strict=True))
            leaf = x.detach().to(dtype).requires_grad_()
            value = self.fit.annealed(leaf, Arguments((), kwargs), here, weight.to(dtype))
            (slope,) = torch.autograd.grad(-value / total, leaf)
            return value.detach().double(), slope.double()

        def run(
            x: Tensor,
            mean: Tensor,
            square: Tensor,
            count: Tensor,
            rate: Tensor,
            weight: Tensor,
            moving: Tensor,
            *rest: Tensor,
        ) -> Any:
            value, slope = gradient(x, weight, rest)
            if self.fit.processes.count > 1:
                return value, slope
            return value, *self._adam((x, mean, square, count), slope, rate, moving)

        return run

    def _adam(self, moments: Moments, gradient: Tensor, rate: Tensor, moving: Tensor) -> tuple[Tensor, ...]:
        """Adam's step down a gradient: the largest entry of x (not finite if one is not), and the moments."""
        x, mean, square, count = moments
        is_encoder = self.encoder > 0
        count = count + torch.stack([torch.ones_like(rate), moving.min()])  # zero where only encoders move
        biases = [(1 - beta**count).clamp(min=EPSILON) for beta in BETAS]
        first, second = (torch.where(is_encoder, bias[0], bias[1]) for bias in biases)
        direction, mean, square = adam(mean, square, gradient, (first, second), BETAS, moving)
        x = x - moving * rate * direction
        return x.abs().amax(), x, mean, square, count

    def _decide(self, call: Arguments, noise: Mapping[str, Tensor], given: list[Tensor]) -> None:
        """Trace or compile the step when the eager ones tell that it pays; say so in the plan."""
        predicted = self.num_steps * self._eager_seconds / max(1, self._num_eager)
        if self.mode == "auto" and self._num_eager < TIMED:
            return
        self._is_decided = True
        has_compiler = self.mode is True or predicted > WORTH_COMPILER
        if not has_compiler and predicted < WORTH_TRACE:
            return
        start, objective = time.perf_counter(), self.fit.first.objective
        eager = self._eager(call, noise)
        try:
            with default_dtype(self.dtype):
                graph = compiled(eager, given, has_compiler)
                gap = max(gap_between(graph(*point), eager(*point)) for point in self._points(given))
        except Exception as error:  # whatever tracer or compiler refuses, the eager step serves
            objective.add_note(f"steps not captured: {str(error).strip().splitlines()[0][:120]}")
            return
        if not gap <= (AGREEMENT if self.dtype is torch.float64 else SINGLE):
            objective.add_note(
                f"steps not captured: the graph is off by {gap:.1g}, the model looks at values"
            )
            return
        self._graph = graph
        what = "compiled" if has_compiler else "traced"
        objective.add_note(f"steps {what} in {time.perf_counter() - start:.1f} s")

    def _points(self, given: list[Tensor]) -> list[list[Tensor]]:
        """Other parameters, rows and draws of the same shapes: what a graph must not have kept."""
        points = []
        for shift in (1, 2):
            generator = torch.Generator().manual_seed(shift)
            x = given[0] + 0.05 * torch.randn(given[0].shape, generator=generator, dtype=torch.float64)
            others = [v.roll(shift, 0) if v.dim() else v for v in given[7:]]
            points.append([x, *given[1:7], *others])
        return points


def _tensors(call: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}
