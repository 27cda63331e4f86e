"""Slots of categories, ordered and not: what the log probability of the one observed is a function of.

An ordered category has the predictor, the cutpoint above it and its distance to the one below. Any other
has the log odds of each category beside the observed one: one slot fewer than there are categories,
whatever is common to all logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.density import log_sum_exp

ODDS = "log odds "  # and a number: of the categories beside the observed one, in order
MOST_CATEGORIES = 5  # a row needs a node for each combination of its slots


def odds(fn: Any) -> tuple[str, ...] | str:
    """Names of the slots of a categorical distribution, or why it has none."""
    number = fn.logits.shape[-1]
    if number > MOST_CATEGORIES:
        return f"{number} categories need {number - 1} slots together"
    return tuple(f"{ODDS}{k}" for k in range(1, number))


def odds_slots(fn: Any, observed: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Log odds of the other categories, row by row."""
    logits = fn.logits.expand(*shape, fn.logits.shape[-1]).to(torch.float64)
    y = observed.expand(shape).long().unsqueeze(-1)
    others = torch.arange(logits.shape[-1] - 1)
    others = others + (others >= y)
    found = logits.gather(-1, others) - logits.gather(-1, y)
    return {f"{ODDS}{k + 1}": part for k, part in enumerate(found.unbind(-1))}


def log_share(slots: Mapping[str, Tensor]) -> Tensor:
    """Log probability of a category from the log odds of all others.

    Example:
        >>> log_share({"log odds 1": torch.zeros(1), "log odds 2": torch.zeros(1)}).exp()
        tensor([0.3333])
    """
    odds = torch.stack(torch.broadcast_tensors(*slots.values()))
    return -log_sum_exp(torch.cat([torch.zeros_like(odds[:1]), odds]), [0])


def slopes_of_share(
    slots: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[list[Tensor], dict[tuple[int, int], Tensor | None], Tensor]:
    """First and second derivatives of `log_share` in slots of these names, and its values."""
    value = log_share(slots)
    shares = [torch.exp(slots[name] + value) for name in names]
    bends: dict[tuple[int, int], Tensor | None] = {
        (i, j): one * shares[j] - (one if i == j else 0)
        for i, one in enumerate(shares)
        for j in range(i, len(shares))
    }
    return [-share for share in shares], bends, value


def ordered_slots(fn: Any, observed: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """The cutpoint above each row's category and its distance to the one below; of the highest that one."""
    cuts = fn.cutpoints.expand(*shape, fn.cutpoints.shape[-1]).to(torch.float64)
    k, most = observed.expand(shape).long(), cuts.shape[-1]

    def cut(index: Tensor) -> Tensor:
        return cuts.gather(-1, index.clamp(0, most - 1).unsqueeze(-1)).squeeze(-1)

    is_between = (k > 0) & (k < most)
    return {
        "predictor": fn.predictor,
        "cut": cut(k),
        "gap": torch.where(is_between, cut(k) - cut(k - 1), 0.0),
    }


def ordered(side: Tensor, gap: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Log probability of an ordered category, from softplus terms of its two ends.

    With eta the predictor it is log(s(upper - eta) - s(lower - eta)), s the logistic function: for a
    category between two cutpoints log(1 - exp(-gap)) - softplus(eta - upper) - softplus(lower - eta),
    where no cancellation is left, nor two ends in one term.

    Args:
        side: -1, 0 or 1: the lowest category, one between others, the highest.
        gap: distance of its cutpoints.
        above: softplus(eta - upper), or its expectation.
        below: softplus(lower - eta), or its expectation.

    References:
        McCullagh (1980), Regression models for ordinal data, J. R. Statist. Soc. B 42.
    """
    width = torch.where(side == 0, gap, 1.0)
    inner = torch.where(side == 0, torch.log(-torch.expm1(-width)), 0.0)
    return inner - torch.where(side < 1, above, 0.0) - torch.where(side > -1, below, 0.0)
