"""Averaged Adam with steps that shrink by themselves: when iterates only wander, they are averaged."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .adam import adam
from .smooth import Vector

FIRST_RATE = 0.1  # in posterior sds
SHRINK = 0.5
FEWEST, MOST = 200, 4000  # steps of a stage
CHECK_EVERY = 50  # steps
RHAT = 1.1  # split R-hat of every coordinate, below which iterates only wander
WATCHED = 2000  # coordinates, at most
STILL = 0.1  # posterior sds between averages of two stages at which a fit ends
LOWEST_RATE = 1e-3
BETAS = (0.9, 0.99)


@dataclass
class AveragedAdam:
    """Adam on a flat vector in scaled coordinates, with automatic step reduction.

    A stage runs at one rate until the halves of its later iterates look alike (split R-hat); their
    average is its answer, and the next stage starts there at half the rate. It ends when two answers
    in a row agree to a small part of a posterior sd.

    Args:
        x: the start.
        lengths: posterior sds of the coordinates, or what stands for them.

    References:
        Welandawe, Andersen, Vehtari and Huggins (2024), A framework for improving the reliability
        of black-box variational inference, JMLR 25. Polyak and Juditsky (1992), Acceleration of
        stochastic approximation by averaging, SIAM J. Control Optim. 30.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> rule = AveragedAdam(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        >>> while not rule.is_done:  # a noisy gradient of |x - 3|^2 / 2
        ...     rule.step(rule.x - 3 + torch.randn(2, dtype=torch.float64))
        >>> bool(((rule.answer - 3).abs() < 0.1).all())
        True
    """

    x: Tensor
    lengths: Tensor
    rate: float = FIRST_RATE
    is_done: bool = False
    finished: Tensor | None = None
    stages: int = 0
    _mean: Tensor = field(init=False, repr=False)
    _square: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._origin, size = self.x.clone(), self.x.numel()
        self._scaled = torch.zeros_like(self.x)
        self._at = torch.linspace(0, size - 1, min(size, WATCHED)).long()
        # One buffer: small tensors kept between large ones that come and go would fragment the heap.
        self._watched = np.empty((MOST, len(self._at)))
        self._start()

    @property
    def answer(self) -> Tensor:
        """The average of the last finished stage; the present point before there is one."""
        return self.x if self.finished is None else self.finished

    def step(self, gradient: Tensor) -> None:
        """One step down a gradient in x."""
        bias = (1 - BETAS[0] ** (self._count + 1), 1 - BETAS[1] ** (self._count + 1))
        slope = gradient * self.lengths
        direction, self._mean, self._square = adam(self._mean, self._square, slope, bias, BETAS)
        self._scaled = scaled = self._scaled - self.rate * direction
        self.x = self._origin + self.lengths * scaled
        self._watched[self._count] = scaled[self._at].numpy()
        self._sums[-1] += scaled
        self._count += 1
        if self._count % CHECK_EVERY == 0:
            if self._count >= MOST or (self._count >= FEWEST and self._only_wanders()):
                self._close()
            else:
                self._sums.append(torch.zeros_like(scaled))

    def _only_wanders(self) -> bool:
        return bool((split_rhat(self._watched[self._count // 2 : self._count]) < RHAT).all())

    def _close(self) -> None:
        later = self._sums[len(self._sums) // 2 :]
        average = torch.stack(later).sum(0) / (CHECK_EVERY * len(later))
        answer = self._origin + self.lengths * average
        before, self.finished = self.finished, answer
        moved = np.inf if before is None else float(((answer - before) / self.lengths).abs().max())
        self.stages += 1
        self.is_done = moved < STILL or self.rate * SHRINK < LOWEST_RATE
        self.rate *= SHRINK
        self._scaled = average
        self.x = answer
        self._start()

    def _start(self) -> None:
        self._count, self._sums = 0, [torch.zeros_like(self.x)]
        self._mean = self._square = torch.zeros_like(self.x)


def split_rhat(draws: Vector) -> Vector:
    """Split R-hat of one chain, by column; zero for a column that stands still.

    References:
        Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013), Bayesian data analysis, 11.4.

    Example:
        >>> split_rhat(np.array([[0.0], [1.0], [10.0], [11.0]])).round(1)
        array([10.])
    """
    half = len(draws) // 2
    parts = np.stack([draws[:half], draws[half : 2 * half]])
    within = parts.var(1, ddof=1).mean(0)
    between = half * parts.mean(1).var(0, ddof=1)
    total = (half - 1) / half * within + between / half
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.nan_to_num(np.sqrt(total / within), nan=0.0))
