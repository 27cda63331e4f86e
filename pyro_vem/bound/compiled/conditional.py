"""Parts of a slot that scale together, and the closed second moment of a conditional residual."""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributions as td

from .affine import AffineSlot, Dense, Local
from .slots import RESIDUAL, Spec


@dataclass(frozen=True)
class Group:
    """Parts of one slot whose coefficients are multiplied by the same functions of the conditions."""

    parts: dict[str, Local | Dense]
    rate: dict[str, Tensor]
    slope: dict[str, Tensor]


def grouped(slot: AffineSlot, conditions: Collection[str]) -> list[Group]:
    """The parts of a slot that are not conditions themselves, by their factors."""
    groups: list[Group] = []
    parts: dict[str, Local | Dense] = {**slot.locals, **slot.denses}
    for name, part in parts.items():
        if name in conditions:
            continue
        for group in groups:
            if _is_same(group.rate, part.rate) and _is_same(group.slope, part.slope):
                group.parts[name] = part
                break
        else:
            groups.append(Group({name: part}, part.rate, part.slope))
    return groups


def _is_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def is_conditional_normal(
    spec: Spec,
    slots: Mapping[str, AffineSlot],
    groups: Mapping[str, list[Group]],
    conditions: Collection[str],
    latents: Collection[str],
) -> bool:
    """True if E r^2 / s^2 factorises: conditions scale parts of the residual r and nothing else.

    The scale s must depend on none of them, and share no latent with the residual.
    """
    if spec.family is not td.Normal or "scale" not in slots or not any(c in latents for c in conditions):
        return False
    residual, scale = slots[RESIDUAL], slots["scale"]
    if residual.products is not None:
        return False
    own = residual.conditions.values()
    if any(bool((c.linear != 0).any() or (c.size != 0).any()) for c in own):
        return False
    if scale.conditions or any(c in slot.locals for c in conditions for slot in (residual, scale)):
        return False
    mine = {k for group in groups[RESIDUAL] for k in group.parts} | set(residual.conditions)
    return not any(k in mine and k in latents for group in groups["scale"] for k in group.parts)


def conditional_normal(
    spec: Spec,
    slots: Mapping[str, AffineSlot],
    groups: Mapping[str, list[Group]],
    x: Mapping[tuple[str, ...], Tensor],
) -> Tensor:
    """E log N(r; 0, s) of each row, with r = offset + sum_g f_g(c) x_g and c independent of the x_g."""
    residual = slots[RESIDUAL]
    alone, variance, scaled = residual.offset, None, []
    for g, group in enumerate(groups[RESIDUAL]):
        mean, spread = x["mean", RESIDUAL, str(g)], x.get(("cov", RESIDUAL, str(g), RESIDUAL, str(g)))
        if group.rate or group.slope:
            scaled.append((mean, spread, group))
        else:  # the only one: groups differ by their factors
            alone, variance = alone + mean, spread
    shifts = {name: c.shift(x["condition", name]) for name, c in residual.conditions.items()}
    expected = functools.partial(_expected, shifts=shifts, x=x)
    line = alone  # alone^2 + 2 alone * the rest, as one product
    for mean, _, group in scaled:
        line = torch.add(line, expected(mean, group), alpha=2)
    square = _plus(alone * line, variance)
    for i, (mean, spread, group) in enumerate(scaled):
        square = square + expected(_plus(mean * mean, spread), group, group)
        for other, _, more in scaled[:i]:
            square = square + expected(2 * mean * other, group, more)
    log_scale, exponent = slots["scale"].offset, torch.zeros((), dtype=torch.float64)
    for g in range(len(groups["scale"])):
        log_scale = log_scale + x["mean", "scale", str(g)]
        exponent = _plus(exponent, x.get(("cov", "scale", str(g), "scale", str(g))))
    precision = torch.exp(2 * exponent - 2 * log_scale)
    return spec.jacobian - 0.5 * math.log(2 * math.pi) - log_scale - 0.5 * precision * square


def _plus(first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else first + second


def _expected(
    factor: Tensor, *groups: Group, shifts: Mapping[str, Tensor], x: Mapping[tuple[str, ...], Tensor]
) -> Tensor:
    """A factor times E of the product of the groups' factors, each condition Gaussian and independent."""
    for name, by in shifts.items():
        rates = [group.rate[name] for group in groups if name in group.rate]
        slopes = [group.slope[name] for group in groups if name in group.slope]
        if not (rates or slopes):
            continue
        spread = x.get(("spread", name))
        if rates:
            rate = sum(rates[1:], rates[0])
            exponent = rate * by if spread is None else rate * (by + 0.5 * rate * spread)
            factor = factor * exponent.exp()
            if slopes and spread is not None:
                by = by + rate * spread
        if slopes:
            lines = [1 + slope * by for slope in slopes]
            line = lines[0] if len(lines) == 1 else lines[0] * lines[1]
            if len(lines) == 2 and spread is not None:
                line = line + slopes[0] * slopes[1] * spread
            factor = factor * line
    return factor
