"""Link functions: what of an argument is affine in latents where its usual slot is not.

A slot is usually the log of a positive argument, or a logit. Models that compute arguments otherwise (a
probit, a softplus, a mean and a precision) have slots of other names, which say how: ``logits by probit``.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kl.quadrature import softplus
from .categories import GAP, LOW

BY = " by "
ODDS, TOTAL = "log odds", "log total"  # of two concentrations: log c1 - log c0, log(c1 + c0)
CONCENTRATIONS = ("concentration1", "concentration0")
FAR = 4.0  # of a logit, beyond which rounding of a probability near one hides its link


class Link(NamedTuple):
    """A function and its inverse.

    Attributes:
        slot: from the argument of a distribution; nan where rounding hides it.
        argument: from the slot.
    """

    slot: Callable[[Tensor], Tensor]
    argument: Callable[[Tensor], Tensor]


def _unsoftened(x: Tensor) -> Tensor:
    """The inverse of softplus."""
    return x + torch.log(-torch.expm1(-x))


def _near(logits: Tensor, slot: Tensor) -> Tensor:
    return torch.where(logits.abs() <= FAR, slot, torch.nan)


LINKS: dict[str, Link] = {
    "probit": Link(
        lambda logits: _near(logits, torch.special.ndtri(torch.sigmoid(logits))),
        lambda eta: torch.special.log_ndtr(eta) - torch.special.log_ndtr(-eta),
    ),
    "complementary log-log": Link(
        lambda logits: _near(logits, softplus(logits).log()), lambda eta: _unsoftened(eta.exp())
    ),
    "log-log": Link(
        lambda logits: _near(logits, -softplus(-logits).log()), lambda eta: -_unsoftened(torch.exp(-eta))
    ),
    "softplus": Link(_unsoftened, softplus),
}
POSITIVE_ARGUMENTS = ("scale", "rate", "concentration", "df")
ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "logits": ("probit", "complementary log-log", "log-log"),
    **dict.fromkeys(POSITIVE_ARGUMENTS, ("softplus",)),
}
GROWING = ("logits by complementary log-log", "logits by log-log", "scale by softplus", TOTAL)
MOST_LINKS = max(map(len, ALTERNATIVES.values()))


def relinked(
    slots: tuple[str, ...], bad: Collection[str], number: int, cutpoints: int = 0
) -> tuple[str, ...] | None:
    """Slots with another link for each that is not affine; None where there is no other.

    Args:
        slots: names of all slots.
        bad: those that are not affine.
        number: of the alternative, from 0.
        cutpoints: of ordered categories.

    Example:
        >>> relinked(("total_count", "logits"), {"logits"}, 0)
        ('total_count', 'logits by probit')
        >>> relinked(("concentration1", "concentration0"), {"concentration0"}, 0)
        ('log odds', 'log total')
    """
    if number == 0 and not set(CONCENTRATIONS).isdisjoint(bad):
        pair = dict(zip(CONCENTRATIONS, (ODDS, TOTAL), strict=True))
        return tuple(pair.get(name, name) for name in slots)
    if number == 0 and cutpoints and not {"cut", "gap"}.isdisjoint(bad):
        return (LOW, *(f"{GAP}{j}" for j in range(1, cutpoints)))
    found = []
    for name in slots:
        base, _, _ = name.partition(BY)
        others = ALTERNATIVES.get(base, ())
        is_left = name in bad and number < len(others)
        found.append(f"{base}{BY}{others[number]}" if is_left else name)
    return tuple(found) if tuple(found) != slots else None


def is_linked(slots: Collection[str]) -> bool:
    """True if a slot is other than usual."""
    return any(BY in name or name in (ODDS, TOTAL, LOW) or name.startswith(GAP) for name in slots)


def grows(name: str) -> bool:
    """True if the log density grows with the exponential of a slot, where that is not plain otherwise."""
    return name in GROWING or name.startswith(GAP)


def slot_of(fn: object, name: str) -> Tensor:
    """The slot of a distribution by another link than the usual one."""
    if name in (ODDS, TOTAL):
        one, other = (torch.as_tensor(getattr(fn, c), dtype=torch.float64) for c in CONCENTRATIONS)
        return one.log() - other.log() if name == ODDS else (one + other).log()
    base, _, link = name.partition(BY)
    return LINKS[link].slot(torch.as_tensor(getattr(fn, base), dtype=torch.float64))


def arguments(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arguments that linked slots stand for, by name."""
    found = {}
    for name, slot in slots.items():
        base, by, link = name.partition(BY)
        if by:
            found[base] = LINKS[link].argument(slot)
    if ODDS in slots:
        total = slots[TOTAL].exp()
        found |= dict(
            zip(CONCENTRATIONS, (total * torch.sigmoid(s * slots[ODDS]) for s in (1, -1)), strict=True)
        )
    return found
