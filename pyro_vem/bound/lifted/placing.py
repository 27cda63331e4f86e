"""Centres and units of variables where those of prior or start are far from what the data say.

Statistics are solved from log densities, whose rounding hides what is small beside the largest: with an
income of 1e5 for a covariate, the square of a slope of one prior sd counts 1e10 times that of an intercept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .lift import Found, Probe, lift, weighed
from .variables import Coding

LARGE = 1e4  # log density of an element beyond which it is looked at
FAR = 100.0  # sds that a centre may be off, or times that a unit may
MOST_PLACED = 4  # times: what the largest hides is seen once that stands at its maximum
MOST_SWEEPS = 20  # over all real variables, each at its maximum given the others


def lift_placed(probe: Probe, refused: Mapping[str, str], parameters: Sequence[str], seed: int) -> Found:
    """What `lift` finds, with each variable on the scale on which its factors move it."""
    found = lift(probe, refused, parameters, seed)
    for _ in range(MOST_PLACED):
        if not _is_placed_anew(probe, found):
            break
        found = lift(probe, refused, parameters, seed)
    return found


def _is_placed_anew(probe: Probe, found: Found) -> bool:
    """Move variables to the maximum of their factors, where log densities are large; whether any was far."""
    largest = max(float(piece.value.abs().amax()) for piece in probe.pieces({}).values())
    if not largest > LARGE:
        return False
    # One at a time, and first what hides the rest: the maxima of the others are nowhere before. Scales
    # are told from residuals, so they wait until nothing else is far; sds are told from scales again.
    real = [coding for coding in found.codings.values() if coding.variable.support == "real"]
    positive = [coding for coding in found.codings.values() if coding.variable.support == "positive"]
    real.sort(key=lambda coding: _scale(probe, coding))
    is_moved = _settled(probe, real)
    if any([_place(probe, coding) for coding in positive]):
        is_moved = True
        _settled(probe, real)
    return is_moved


def _settled(probe: Probe, codings: Sequence[Coding]) -> bool:
    """Place variables in turn until none is far; whether any was."""
    for sweep in range(MOST_SWEEPS):
        if not any([_place(probe, coding) for coding in codings]):
            return sweep > 0
    return True


def _scale(probe: Probe, coding: Coding) -> float:
    """Smallest sd of an element given the other variables, in its unit."""
    if not _can_move(coding):
        return float("inf")
    sd = _sds(coding, _natural(probe, coding))
    return float(sd[sd > 0].min()) if bool((sd > 0).any()) else float("inf")


def _place(probe: Probe, coding: Coding) -> bool:
    """Put a variable at its best value given the others, where that is far; whether it was."""
    if not _can_move(coding):
        return False
    variable, eta = probe.variables[coding.variable.name], _natural(probe, coding)
    assert coding.family.best is not None
    best = coding.family.best(eta)
    best = coding.flat(best) if best.dim() == 2 else best
    if variable.support == "positive":
        is_far = (best > 0) & ((best > FAR) | (best * FAR < 1)) & torch.isfinite(best)
        unit, centre = best, torch.zeros_like(best)
    else:
        unit, centre = _sds(coding, eta), best
        is_far = ((best.abs() > FAR * unit) | (unit * FAR < 1) | (unit > FAR)) & torch.isfinite(best * unit)
    unit, centre = torch.where(is_far, unit, 1.0), torch.where(is_far, centre, 0.0)
    probe.variables[variable.name] = replace(
        variable, centre=variable.placed(centre), unit=variable.unit * unit.reshape(variable.shape)
    )
    return bool(is_far.any())


def _can_move(coding: Coding) -> bool:
    """Whether statistics may be taken of scaled values, and their maximum is known."""
    return coding.family.best is not None and coding.family.has_unit and not coding.variable.is_vector


def _sds(coding: Coding, eta: Tensor) -> Tensor:
    """Sd of each element given all others, flat; not a number where there is none."""
    size = coding.layout.shape[1]
    rows, columns = torch.triu_indices(size, size)
    return coding.flat((-2 * eta[size:][rows == columns]).rsqrt().T)


def _natural(probe: Probe, coding: Coding) -> Tensor:
    """Natural parameters of every group, the other variables at generic values."""
    runs = [
        probe.pieces({coding.variable.name: coding.at_probe(i)}, only=coding.where)
        for i in range(coding.family.num + 1)
    ]
    eta = torch.zeros(coding.family.num, len(coding.layout), dtype=torch.float64)
    for factor, where in coding.where.items():
        table = coding.solved(torch.stack([weighed(run[factor]) for run in runs]), where)[1:]
        eta.index_add_(1, where.expand(table.shape[1:]).reshape(-1), table.reshape(len(table), -1))
    return eta
