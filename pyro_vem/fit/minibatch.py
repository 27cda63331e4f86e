"""Fits on batches of rows: stochastic variational EM.

Factors of single rows keep their parameters for all rows, and the rows of a batch take
natural-gradient E-steps (Hoffman et al. 2013). What all rows share starts at the optimum of a pilot
batch, which the deterministic engine finds, and then takes averaged Adam steps in units of its
posterior sds. With networks there is no pilot: one Adam for encoder and decoder.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..bound.elbo import AnalyticKL_ELBO
from ..errors import ModelError, warn
from ..model.batches import Source
from ..model.data import Arguments
from ..model.rows import Rows, rows_of
from .averaging import AveragedAdam
from .batched import ENCODER_EPOCHS, BatchFit, check_batches, held_out_bound, measured, mutual_information
from .capture import Compile
from .checkpoint import Checkpoint
from .network import NetworkStep
from .options import FitOptions
from .processes import Processes
from .result import VEMResult
from .scales import Scales
from .settling import settled
from .setup import Setup, set_up
from .state import State
from .status import Status, Step, progress_bar
from .stopping import exploded

PAIRS = 4  # antithetic pairs of draws a step; one draw where only encoders draw
PATIENCE, LEAST_RATE = 10, 1e-5  # epochs without a rise after which a network's rate falls, and its end
FADING = 0.2  # share of the epochs over which it falls where no rows are held out
STILL = 3  # epochs without a rise of the mutual information: its estimate is noisy
ROUNDS = 3  # natural-gradient steps of the rows of a batch in the first epoch, one later
Pilot = Callable[[Setup], State]
"""Fits a batch by the deterministic engine."""


def fit_batches(
    model: Callable[..., Any],
    data: Any,
    guide: Any,
    elbo: AnalyticKL_ELBO | None,
    init: Any,
    options: FitOptions,
    seed: int,
    batch_size: int | None,
    validation: Any,
    max_iter: int,
    mode: Compile,
    pilot: Pilot,
    callbacks: tuple[Any, ...],
    progress: bool | None,
    warm: VEMResult | None,
    saved: Checkpoint,
) -> VEMResult:
    """See `pyro_vem.fit_vem`; runs inside its isolation."""
    begin = time.perf_counter()
    source, processes = Source.of(model, data, batch_size, seed), Processes.of(options.sharded)
    rows = _shared_rows(rows_of(source), processes, validation)
    source = source.by(rows.names)
    guide = None if guide == "auto" else guide  # closed forms are of all rows
    problem = partial(set_up, model, guide=guide, elbo=elbo, init=init, seed=seed, compile=False)

    def make(call: Arguments, is_alone: bool = False) -> Setup:
        own = replace(options, sharded=()) if is_alone else options
        with pyro.get_param_store().scope():  # another size has other parameters of the same names
            return problem(dict(call.kwargs), options=own, rows=rows)

    first = make(source.head(rows.names, min(source.size, rows.total)))
    first.objective.add_note(
        f"batches of {source.size:,} of {rows.total:,} rows ({', '.join(rows.names)}): plate "
        f"{', '.join(sorted(rows.all_plates))} stands for all of them"
    )
    fit = BatchFit(source, rows, make, first, warm)
    held_out = Source.of(model, validation, source.size, seed) if validation is not None else None
    check_batches(fit, held_out is not None, options)
    climb: _Climb = (
        _Network(fit, max_iter, held_out, mode, options)
        if fit.has_network
        else _Global(fit, max_iter, held_out, pilot)
    )
    climb.bar, climb.saved = progress_bar(progress if processes.rank == 0 else False), saved
    saved.check(fit.shapes, first.problem.call)
    if saved.left is not None:
        first.objective.add_note(f"went on from a checkpoint after {saved.left.n_iter} epochs")
        climb.epochs = saved.left.n_iter
    x, status = _climbed(climb, callbacks)
    x = settled(fit, x)
    params, guide_params = fit.found(x)
    name = exploded(first.guide, lambda scale: guide_params.get(scale, torch.ones(0)).log().cpu().numpy())
    if name is not None and status is not Status.interrupted:
        warn(f"site {name!r} has run away: {Status.diverged.value}")
        status = Status.diverged
    terms = measured(fit, x)
    if status is not Status.interrupted:
        saved.remove()
    is_whole = source.stream is None and processes.count == 1
    return VEMResult(
        params, guide_params, terms.elbo, terms.elbo_se, status, climb.epochs, tuple(climb.history),
        time.perf_counter() - begin, first.objective.shown_plan, terms, seed,
        None if is_whole else first,
        _whole=partial(problem, dict(source.arrays), options=options) if is_whole else None,
    )  # fmt: skip


def _climbed(climb: "_Climb", callbacks: tuple[Any, ...]) -> tuple[Tensor, Status]:
    """Where a climb ends, or has been interrupted."""
    try:
        return climb.run(callbacks)
    except KeyboardInterrupt:
        if climb.fit.processes.count > 1:  # the others do not know
            raise
        climb.save(is_last=True)
        return climb.x, Status.interrupted
    finally:
        if climb.bar is not None:
            climb.bar.close()


def _shared_rows(rows: Rows, processes: Processes, validation: Any) -> Rows:
    """The rows of this process, if there are several.

    Raises:
        ModelError: if other plates are shared out than those over rows, or only some processes have
            rows to hold out.
    """
    if not processes.plates:
        return rows
    if not rows.all_plates <= processes.plates:
        names = ", ".join(sorted(rows.all_plates))
        raise ModelError(f"rows are in plate {names}, which FitOptions(sharded=) does not name")
    if len(set(processes.gathered(validation is None))) > 1:
        raise ModelError("validation= is missing in some processes: give each some rows of its own")
    return replace(rows, count=processes.count)


class _Climb(ABC):
    """What both ways to climb share: epochs, history, callbacks."""

    def __init__(self, fit: BatchFit, max_iter: int) -> None:
        self.fit, self.max_iter, self.epochs = fit, max_iter, 0
        self.history: list[Step] = []
        self.x = fit.start  # after the last epoch
        self.saved = Checkpoint()
        self.generator = torch.Generator().manual_seed(fit.source.seed + fit.processes.seed)
        self.bar: Any = None

    @abstractmethod
    def run(self, callbacks: tuple[Any, ...]) -> tuple[Tensor, Status]:
        """Epochs; where they end, and how."""

    def gradient(self, x: Tensor, index: Tensor | None, call: Arguments, pairs: int) -> tuple[float, Tensor]:
        """The bound of a batch and its gradient; the factors of its rows take their E-step.

        In the first epoch they take a few before, as they start far off; later the step is from the
        same gradient.
        """
        fit, noise = self.fit, self.fit.noise(call, pairs, self.generator)
        if fit.locals.sites and not self.epochs:
            assert index is not None
            fit.locals.e_step(fit, x, index, call, noise, ROUNDS)
        leaf = x.detach().requires_grad_()
        rows = {name: v.detach().requires_grad_() for name, v in fit.locals.taken(index).items()}
        value = fit.value(leaf, rows, call, noise)
        gradient, *others = torch.autograd.grad(value, [leaf, *rows.values()])
        if index is not None and rows:
            fit.locals.move(index, rows, dict(zip(rows, others, strict=True)))
        value, gradient = fit.summed(value.detach(), gradient)
        return float(value), gradient

    def record(
        self, values: list[float], seconds: float, note: str, x: Tensor, callbacks: tuple[Any, ...]
    ) -> None:
        """One row of history an epoch."""
        finite = [value for value in values if np.isfinite(value)]
        if not finite:
            raise ModelError(f"no step of epoch {self.epochs} ends where the bound is finite")
        mean = float(np.mean(finite))
        before = self.history[-1].after if self.history else finite[0]
        row = Step(self.epochs, "epoch", before, mean, 0.0, len(values), 0, seconds, note)
        self.history.append(row)
        self.x = x
        self.save()
        if self.bar is not None:
            self.bar.set_postfix_str(f"epoch {self.epochs}, ELBO {mean:.6g}", refresh=False)
            self.bar.update()
        for callback in callbacks:
            with torch.no_grad():
                known = self.fit.block.constrained(x)
                callback(row, {n: known[n] for n in self.fit.first.theta.names})

    def save(self, is_last: bool = False) -> None:
        """Write the checkpoint, if there is to be one."""
        if self.history:
            self.saved.save(lambda: self.fit.snapshot(self.x, tuple(self.history), self.epochs), is_last)


class _Global(_Climb):
    """Averaged Adam from the optimum of a pilot batch."""

    def __init__(self, fit: BatchFit, max_iter: int, held_out: Source | None, pilot: Pilot) -> None:
        super().__init__(fit, max_iter)
        if not fit.start.numel():
            raise ModelError(
                "batch_size=: the rows share no parameter and no latent, so that no batch tells of another: "
                "fit them without batch_size=, in parts if they are many"
            )
        self.held_out, self.pilot = held_out, pilot

    def run(self, callbacks: tuple[Any, ...]) -> tuple[Tensor, Status]:
        """Epochs until two averages agree."""
        fit = self.fit
        engine = fit.make(fit.first.problem.call, False)  # its compiled terms hold the pilot's rows
        state = self.pilot(engine)
        joint = torch.as_tensor(np.concatenate([state.phi, state.theta]))
        lengths = torch.as_tensor(Scales(engine).of(state, "joint", 0))
        where = torch.as_tensor(
            np.concatenate(
                [
                    fit.first.phi.where(set(fit.first.phi.names) - fit.locals.names),
                    np.ones(fit.first.theta.size, dtype=bool),
                ]
            )
        )
        known = fit.warm.guide_params if fit.warm is not None else {}
        known = fit.processes.taken(known, fit.locals.shapes(fit.first.phi))
        fit.locals.start(fit.first.phi.constrained(torch.as_tensor(state.phi)), known)
        rule = AveragedAdam(joint[where] if fit.warm is None else fit.start, lengths[where])
        while self.epochs < self.max_iter and not rule.is_done:
            start = time.perf_counter()
            values = list(self._epoch(rule))
            self.epochs += 1
            note = f"rate {rule.rate:.3g} sd, {rule.stages} averages"
            if self.held_out is not None:
                note += f", held out {held_out_bound(fit, rule.answer, self.held_out):.6g}"
            self.record(values, time.perf_counter() - start, note, rule.answer, callbacks)
        status = Status.converged if rule.is_done else Status.max_iterations
        return rule.answer, status

    def _epoch(self, rule: AveragedAdam) -> Iterator[float]:
        for index, call in self.fit.epoch(self.epochs):
            value, gradient = self.gradient(rule.x, index, call, PAIRS)
            rule.step(-gradient * self.fit.weight(call))
            yield value
            if rule.is_done:
                return


class _Network(_Climb):
    """One Adam for encoder and decoder.

    Where more encoder steps are asked for, they go on until three epochs do not raise the mutual
    information of rows and latents (He, Spokoyny, Neubig and Berg-Kirkpatrick 2019). With held-out
    rows the rate falls where their bound stops rising, and the best state is kept; else
    it falls to zero over the last epochs, which averages the steps.
    """

    def __init__(
        self, fit: BatchFit, max_iter: int, held_out: Source | None, mode: Compile, options: FitOptions
    ) -> None:
        super().__init__(fit, max_iter)
        self.annealed, self.encoder_steps = options.annealed_epochs, options.encoder_steps
        self.information, self.still = -np.inf, 0
        batches = -(-fit.rows.total // fit.source.size)
        self.held_out, total = held_out, max_iter * batches * options.encoder_steps
        self.steps = NetworkStep(fit, 0 if fit.is_amortized else 1, mode, total, fit.source.seed)

    def run(self, callbacks: tuple[Any, ...]) -> tuple[Tensor, Status]:
        """Epochs until the rate has fallen away."""
        fit, steps = self.fit, self.steps
        full, waited = float(steps.rate), 0
        best, best_value = steps.x, -np.inf
        while self.epochs < self.max_iter:
            start, rate = time.perf_counter(), full
            if self.held_out is None:
                rate *= min(1.0, (self.max_iter - self.epochs) / max(1.0, FADING * self.max_iter))
            steps.rate = torch.tensor(rate, dtype=torch.float64)
            steps.anneal(self.epochs, self.annealed)
            values = list(self._epoch())
            self.epochs += 1
            note = f"rate {rate:.1g}" + self._lag()
            if self.epochs <= self.annealed:
                note += f", KL times {float(steps.weight):.2g}"
            if steps.rejected:
                note += f", {steps.rejected} steps to where the bound is not finite not taken: rate halved"
                full, steps.rejected = full / 2, 0
            if self.held_out is not None:
                score = held_out_bound(fit, steps.x, self.held_out, steps.dtype)
                note += f", held out {score:.6g}"
                if score > best_value:
                    best, best_value, waited = steps.x, score, 0
                else:
                    waited += 1
                if waited > PATIENCE:
                    full, waited = full / 2, 0
            self.record(values, time.perf_counter() - start, note, steps.x, callbacks)
            if rate < LEAST_RATE and self.held_out is not None:
                return best, Status.converged
        return best if self.held_out is not None else steps.x, Status.max_iterations

    def _epoch(self) -> Iterator[float]:
        others = self._encoder_batches()
        for _, call in self.fit.epoch(self.epochs):
            for _ in range(self.encoder_steps - 1):
                self.steps.step(next(others), is_encoder_only=True)
            yield self.steps.step(call)

    def _encoder_batches(self) -> Iterator[Arguments]:
        for number in itertools.count(ENCODER_EPOCHS + self.epochs * self.encoder_steps):
            for _, call in self.fit.epoch(number):
                yield call

    def _lag(self) -> str:
        """Whether the encoder still lags behind: end its extra steps if it does not; what to say."""
        if self.encoder_steps == 1:
            return ""
        found, note = mutual_information(self.fit, self.steps.x), f", {self.encoder_steps} encoder steps"
        self.still = 0 if found > self.information else self.still + 1
        self.information = max(found, self.information)
        if self.still == STILL:
            self.encoder_steps = 1
            note += " (the last time)"
        return f"{note}, mutual information {found:.3g}"
