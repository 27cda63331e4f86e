"""Several starts of one fit: which is best, and how far the others agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .result import VEMResult
from .status import Status

DRAWS, DENSITIES = 512, 20_000_000  # most draws, and densities, by which starts are compared


@dataclass(frozen=True)
class Start:
    """Where one start ended.

    Attributes:
        number: of the start; 0 is the one from the given initial values.
        elbo: its bound, in nats.
        status: how it ended.
        n_iter: its rounds.
        distance: root mean square difference from the best start in the log density of an
            observation, in nats: components that only changed places do not count.
    """

    number: int
    elbo: float
    status: Status
    n_iter: int
    distance: float


def best_of(fits: Sequence[VEMResult]) -> VEMResult:
    """The fit with the highest bound; a report on all of them if there are several."""
    best = max(fits, key=lambda fit: fit.elbo if fit.elbo == fit.elbo else -torch.inf)
    if len(fits) == 1:
        return best
    rows = densities(best)
    starts = tuple(
        Start(i, fit.elbo, fit.status, fit.n_iter, 0.0 if fit is best else _distance(densities(fit), rows))
        for i, fit in enumerate(fits)
    )
    return replace(best, starts=starts)


def densities(fit: VEMResult) -> torch.Tensor:
    """Mean log density of each observation under the posterior, flat."""
    exact = fit.setup.objective.exact
    elements = exact.num_elements if exact is not None else 1
    draws = max(4, min(DRAWS, DENSITIES // max(1, elements)))
    found = fit.draw(draws, 0, "log_likelihood")["log_likelihood"]
    parts = [value.logsumexp(0).reshape(-1) for value in found.values()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt()) if a.numel() else 0.0
