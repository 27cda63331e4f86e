"""Normal factors whose expected log density has e^x and e^-x beside x and x^2.

Neither mean nor variance has a closed form of its own: both move by Newton's method.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MOST_STEPS = 30  # of Newton's method in a log variance
SETTLED = 0.03  # its last change: Newton's method squares it
HALVINGS = 30  # of a step that would lower the bound


class Slopes(NamedTuple):
    """First and second derivatives by mean and log variance."""

    by_mean: Tensor
    by_log: Tensor
    mean_mean: Tensor
    mean_log: Tensor
    log_log: Tensor


@dataclass(frozen=True)
class Curve:
    """eta . E t(x) + log sd of Normal factors, as a function of mean and log variance.

    Attributes:
        eta: natural parameters of x, x^2 and, if the model has them, e^x and e^-x; (2 to 4, ...).
    """

    eta: Tensor

    def value(self, mean: Tensor, log: Tensor) -> Tensor:
        """By element, in nats, without constants."""
        variance = log.exp()
        plus, minus = self._exponentials(mean, variance)
        return self.eta[0] * mean + self.eta[1] * (mean.square() + variance) + plus + minus + log / 2

    def slopes(self, mean: Tensor, log: Tensor) -> Slopes:
        """Derivatives by element."""
        variance, curvature = log.exp(), 2 * self.eta[1]
        plus, minus = self._exponentials(mean, variance)
        both, gap = plus + minus, plus - minus
        by_variance = (self.eta[1] + both / 2) * variance  # times the variance, without the entropy
        return Slopes(
            by_mean=self.eta[0] + curvature * mean + gap,
            by_log=by_variance + 0.5,
            mean_mean=curvature + both,
            mean_log=gap / 2 * variance,
            log_log=by_variance + both / 4 * variance.square(),
        )

    def best_log(self, mean: Tensor, log: Tensor) -> Tensor:
        """The log variance that is best at a mean, from another one.

        It solves log(a + c exp(v / 2)) + log v = 0, a convex function of log v.
        """
        curvature, (plus, minus) = -2 * self.eta[1], self._exponentials(mean, torch.zeros(()))
        lifted = -(plus + minus)
        for _ in range(MOST_STEPS):
            variance = log.exp()
            grown = lifted * (variance / 2).exp()
            total = curvature + grown
            step = (total.log() + log) / (1 + grown * variance / (2 * total))
            log = log - step
            if not bool((step.abs() > SETTLED).any()):
                break
        return log

    def _exponentials(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What e^x and e^-x add, zero where the model has none."""
        half, none = variance / 2, torch.zeros(())
        plus = self.eta[2] * (mean + half).exp() if len(self.eta) > 2 else none
        return plus, self.eta[3] * (half - mean).exp() if len(self.eta) > 3 else none
