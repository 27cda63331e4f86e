"""Slots of categories, ordered and not: what the log probability of the one observed is a function of.

An ordered category has the predictor, the cutpoint above it and its distance to the one below; where
cutpoints are random the logs of their distances instead. Any other has the log odds of each category beside
the first: one slot fewer than there are categories, whatever is common to all logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.density import log_sum_exp
from ..kl.quadrature import softplus

LOW, GAP = "predictor beyond the first cutpoint", "log gap "  # and a number: of cutpoints, from the second on
ODDS = "log odds "  # and a number: of the categories beside the first
MOST_CATEGORIES = 30  # a row has so many second derivatives, squared


def odds(fn: Any) -> tuple[str, ...] | str:
    """Names of the slots of a categorical distribution, or why it has none."""
    number = fn.logits.shape[-1]
    if number < 2:
        return "one category is certain"
    if number > MOST_CATEGORIES:
        return f"{number} categories need {number - 1} slots together"
    return tuple(f"{ODDS}{k}" for k in range(1, number))


def odds_slots(fn: Any, shape: Sequence[int]) -> dict[str, Tensor]:
    """Log odds of the categories beside the first."""
    logits = fn.logits.expand(*shape, fn.logits.shape[-1]).to(torch.float64)
    found = logits[..., 1:] - logits[..., :1]
    return {f"{ODDS}{k}": part for k, part in enumerate(found.unbind(-1), start=1)}


def log_share(y: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
    """Log probability of category y from the log odds of all beside the first.

    Example:
        >>> log_share(torch.tensor([0.0]), {"log odds 1": torch.zeros(1), "log odds 2": torch.zeros(1)}).exp()
        tensor([0.3333])
    """
    odds = _odds_of(slots)
    return picked(y, odds) - log_sum_exp(odds, [0])


def _odds_of(slots: Mapping[str, Tensor]) -> Tensor:
    """Of all categories, (categories, ..., rows)."""
    every = torch.stack(torch.broadcast_tensors(*slots.values()))
    return torch.cat([torch.zeros_like(every[:1]), every])


def picked(y: Tensor, odds: Tensor) -> Tensor:
    """Of each row that of its category, from (categories, ..., rows)."""
    shape = torch.broadcast_shapes(odds.shape[1:], y.shape)
    return odds.expand(-1, *shape).gather(0, y.long().expand(1, *shape)).squeeze(0)


def slopes_of_share(
    y: Tensor, slots: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[list[Tensor], dict[tuple[int, int], Tensor], Tensor]:
    """First and second derivatives of `log_share` in slots of these names, and its values."""
    odds = _odds_of(slots)
    total = log_sum_exp(odds, [0])
    shares = {name: torch.exp(slots[name] - total) for name in names}
    bends: dict[tuple[int, int], Tensor] = {
        (i, j): shares[a] * (shares[b] - (1 if i == j else 0))
        for i, a in enumerate(names)
        for j, b in enumerate(names[i:], i)
    }
    slopes = [(y == float(name.removeprefix(ODDS))).to(share) - share for name, share in shares.items()]
    return slopes, bends, picked(y, odds) - total


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


def ordered(y: Tensor, gap: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Log probability of an ordered category, from softplus terms of its two ends.

    With eta the predictor it is log(s(upper - eta) - s(lower - eta)), s the logistic function: for a
    category between two cutpoints log(1 - exp(-gap)) - softplus(eta - upper) - softplus(lower - eta),
    where no cancellation is left, nor two ends in one term.

    Args:
        y: categories: 0 for the lowest, inf for the highest.
        gap: distance of its cutpoints.
        above: softplus(eta - upper), or its expectation.
        below: softplus(lower - eta), or its expectation.

    References:
        McCullagh (1980), Regression models for ordinal data, J. R. Statist. Soc. B 42.
    """
    is_between = (y > 0) & y.isfinite()
    width = torch.where(is_between, gap, 1.0)
    inner = torch.where(is_between, torch.log(-torch.expm1(-width)), 0.0)
    return inner - torch.where(y.isfinite(), above, 0.0) - torch.where(y > 0, below, 0.0)


def gap_slots(fn: Any, observed: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """The predictor beyond the first cutpoint, and logs of the distances up to each row's category.

    These are affine in unconstrained values of ordered cutpoints, where the cutpoints are sums of
    exponentials.
    """
    cuts = fn.cutpoints.expand(*shape, fn.cutpoints.shape[-1]).to(torch.float64)
    k, gaps = observed.expand(shape), cuts.diff(dim=-1).log()
    found = {LOW: fn.predictor - cuts[..., 0]}
    return found | {f"{GAP}{j}": torch.where(k >= j, gaps[..., j - 1], 0.0) for j in range(1, cuts.shape[-1])}


class _Ends(NamedTuple):
    """The ends of each row's category, from the first cutpoint on.

    Attributes:
        steps: exponentials of the log gaps, by name.
        is_up, is_down: which of them the upper and the lower end are beyond, by name.
        gap: distance of both ends, one where an end is missing.
        above, below: predictor minus upper end, and lower end minus predictor.
    """

    steps: dict[str, Tensor]
    is_up: dict[str, Tensor]
    is_down: dict[str, Tensor]
    gap: Tensor
    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, y: Tensor, slots: Mapping[str, Tensor]) -> "_Ends":
        steps = {name: slot.exp() for name, slot in slots.items() if name.startswith(GAP)}
        number = {name: float(name.removeprefix(GAP)) for name in steps}
        is_up, is_down = ({n: at(y, number[n]) for n in steps} for at in (torch.ge, torch.gt))
        low = slots[LOW]
        upper, lower = (
            sum((torch.where(where[n], steps[n], 0.0) for n in steps), torch.zeros_like(low))
            for where in (is_up, is_down)
        )
        own = (torch.where(is_up[n] & ~is_down[n], steps[n], 0.0) for n in steps)  # a difference would cancel
        gap = torch.where((y > 0) & y.isfinite(), sum(own, torch.zeros_like(low)), 1.0)
        return cls(steps, is_up, is_down, gap, low - upper, lower - low)


def log_between(y: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
    """Log probability of an ordered category, from `gap_slots`.

    Args:
        y: categories, inf for the highest.
        slots: the predictor and the gaps.

    Example:
        >>> y, slots = torch.tensor([0.0, 1.0, torch.inf]), {LOW: torch.zeros(1), f"{GAP}1": torch.zeros(1)}
        >>> log_between(y, slots).exp()  # below 0, from there to 1, beyond
        tensor([0.5000, 0.2311, 0.2689])
    """
    ends = _Ends.of(y, slots)
    return ordered(y, ends.gap, softplus(ends.above), softplus(ends.below))


def slopes_between(
    y: Tensor, slots: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[list[Tensor], dict[tuple[int, int], Tensor], Tensor]:
    """First and second derivatives of `log_between` in slots of these names, and its values."""
    ends = _Ends.of(y, slots)
    above, below = torch.sigmoid(ends.above), torch.sigmoid(ends.below)
    value = ordered(y, ends.gap, softplus(ends.above), softplus(ends.below))
    # Of minus both softplus terms in the predictor, and of log(1 - exp(-gap)) in the log of the gap.
    up, down = torch.where(y.isfinite(), above, 0.0), torch.where(y > 0, below, 0.0)
    bent_up, bent_down = up * (1 - above), down * (1 - below)
    inner = torch.where((y > 0) & y.isfinite(), ends.gap / torch.expm1(ends.gap), 0.0)
    bent_inner = inner * (1 - inner - ends.gap)
    ways: list[tuple[Tensor, Tensor]] = []  # how each slot moves predictor minus upper, and minus lower end
    for name in names:
        if name == LOW:
            ways.append((torch.ones_like(value), torch.ones_like(value)))
        else:
            step = -ends.steps[name]
            ways.append(
                (torch.where(ends.is_up[name], step, 0.0), torch.where(ends.is_down[name], step, 0.0))
            )
    slopes = [down * lower - up * upper for upper, lower in ways]
    bends: dict[tuple[int, int], Tensor] = {
        (i, j): -bent_up * ways[i][0] * ways[j][0] - bent_down * ways[i][1] * ways[j][1]
        for i in range(len(names))
        for j in range(i, len(names))
    }
    for i, name in enumerate(names):
        if name != LOW:
            is_own = ends.is_up[name] & ~ends.is_down[name]
            bends[i, i] = bends[i, i] + slopes[i] + torch.where(is_own, bent_inner, 0.0)
            slopes[i] = slopes[i] + torch.where(is_own, inner, 0.0)
    return slopes, bends, value
