"""The bound of a finished fit: exact where it can be, else on fresh draws; and the two held together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..bound.objective import MOST_AT_ONCE
from ..bound.tables import ElboTerms, TermRow
from ..errors import warn
from .setup import Setup
from .status import Status

PARTS = 4  # in which draws are added, at most, where they must be fewer than usual
MOST_NUMBERS = 50_000_000  # data and latents, times draws added at a time


def terms_of(
    setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], status: Status, most: int
) -> ElboTerms:
    """The bound of a finished fit, term by term.

    A converged exact bound has been held against draws already (`pyro_vem.fit.exactness`).
    """
    is_settled = status is Status.converged or setup.lifted is not None
    if setup.objective.is_exact and is_settled:
        return exact_table(setup, phi, theta)
    return measure(setup, phi, theta, most)


def measure(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], most: int) -> ElboTerms:
    """The bound on fresh draws; terms that are exact are shown so.

    Draws are added until the standard error is below 0.01 nats or `most` are spent; fewer where a draw
    works on many numbers. log p - log q is averaged: its variance vanishes as the guide approaches
    the posterior.
    """
    parts: list[dict[str, dict[str, Tensor]]] = []
    size = setup.objective.draws_for(MOST_NUMBERS) if setup.objective.is_random else 1
    while True:
        keep = ("densities", "terms")
        seed = 7919 + len(parts) + setup.processes.seed
        parts.append(setup.objective.sample(phi, theta, size, seed, keep))
        ratio = torch.cat([p["densities"]["log_p"] - p["densities"]["log_q"] for p in parts])
        se = float(ratio.std() / len(ratio) ** 0.5) if len(ratio) > 1 else 0.0
        is_enough = se < 0.01 or not setup.objective.is_random
        if is_enough or len(ratio) + size > (most if size == MOST_AT_ONCE else PARTS * size):
            break
    gap = disagreement(parts)
    if gap is not None:
        setup.objective.add_note(gap)
        warn(gap)
    exact = setup.objective.exact_terms(phi, theta)
    rows = []
    for row in setup.objective.shown_plan.rows:
        values = exact.get(row.site, torch.cat([part["terms"][row.site] for part in parts]))
        error = float(values.std() / len(values) ** 0.5) if values.dim() and len(values) > 1 else 0.0
        rows.append(TermRow.of(row, float(values.mean()), error))
    return ElboTerms(tuple(rows), float(ratio.mean()), se)


def exact_table(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> ElboTerms:
    """The bound of a problem in which no term needs draws."""
    values = setup.objective.exact_terms(phi, theta)
    rows = tuple(TermRow.of(row, float(values[row.site]), 0.0) for row in setup.objective.shown_plan.rows)
    return ElboTerms(rows, float(torch.stack(list(values.values())).sum()), 0.0)


def disagreement(parts: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> str | None:
    """What to say if the closed forms do not average to what the draws themselves give.

    The draws' log p - log q comes from the ordinary trace, so this checks formulas and proofs
    together, at 5 standard errors. Where one draw makes most of the variance there is no verdict.
    """
    ratio = torch.cat([p["densities"]["log_p"] - p["densities"]["log_q"] for p in parts])
    exact = torch.cat([torch.stack(list(p["terms"].values())).sum(0) for p in parts])
    gap = ratio - exact
    square = (gap - gap.mean()).square()
    if len(gap) < 2 or float(square.max()) > 0.2 * float(square.sum()):
        return None
    off, se = abs(float(gap.mean())), float(gap.std()) / len(gap) ** 0.5
    if off <= 5 * se + 1e-6 * (1 + abs(float(ratio.mean()))):
        return None
    return (
        f"closed-form KL terms and draws of the same guide differ by {off:.3g} nats ({off / se:.1f} standard "
        'errors): sample them with elbo=AnalyticKL_ELBO(analytic="never"), and please report the model'
    )
