"""What slots need of the guide: rows that are linear in its means, or in its variances."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .affine import AffineSlot, Dense, Local, compact, product
from .conditional import Group
from .linear import Input

ALIKE = 1e-9  # of the largest part in a variance: a difference that is rounding


def local_input(name: str, index: Tensor, coefficient: Tensor, of_variance: bool) -> Input:
    """Rows of one variable; one row where they are all the same."""
    if len(compact(index)) == 1 and len(compact(coefficient)) == 1:
        index, coefficient = index[:1], coefficient[:1]
    return Input(len(index), of_variance, [(name, index, coefficient)])


def mean_input(group: Group, rows: int) -> Input:
    """A group of parts of a slot: the sum of coefficients times means."""
    parts = list(group.parts.items())
    if len(parts) == 1 and isinstance(parts[0][1], Local):
        name, part = parts[0]
        assert isinstance(part, Local)
        return local_input(name, part.index, part.coefficient, False)
    entry = Input(rows, False)
    for name, part in parts:
        if isinstance(part, Local):
            entry.locals.append((name, part.index, part.coefficient))
        else:
            entry.denses.append((name, part.matrix))
    return entry


def variance_input(one: Group, other: Group, latents: Collection[str], rows: int) -> Input | None:
    """Sum over the latents that both share of both coefficients times the variance; None if there is none."""
    shared = [k for k in one.parts if k in other.parts and k in latents]
    if not shared:
        return None
    entry = Input(rows, True)
    for name in shared:
        first, second = one.parts[name], other.parts[name]
        if isinstance(first, Dense) and isinstance(second, Dense):
            entry.denses.append((name, first.matrix * second.matrix))
            continue
        local = first if isinstance(first, Local) else second
        assert isinstance(local, Local)
        together = _at(first, local.index) * _at(second, local.index)
        if len(shared) == 1:
            return local_input(name, local.index, together, True)
        entry.locals.append((name, local.index, together))
    return entry


def covariance_inputs(
    one: Sequence[Group], other: Sequence[Group], latents: Collection[str], rows: int
) -> dict[tuple[int, int], Input]:
    """What the covariance of two slots needs, by the numbers of their groups of parts."""
    found = {}
    for g, mine in enumerate(one):
        for h, theirs in enumerate(other):
            entry = variance_input(mine, theirs, latents, rows)
            if entry is not None:
                found[g, h] = entry
    return found


def covary_alike(
    slots: Mapping[str, AffineSlot],
    groups: Mapping[str, Sequence[Group]],
    conditions: Mapping[str, Tensor],
    latents: Collection[str],
    rows: int,
) -> bool:
    """True if all pairs of slots have one covariance, whatever the variances are: element by element.

    Sums would hide a latent in small units behind others.

    Args:
        slots: three or more, by name.
        groups: their parts that are no conditions.
        conditions: index of each condition, by row.
        latents: names of the variables that are random.
        rows: of each slot.
    """
    generator = torch.Generator().manual_seed(0)
    given = {k: torch.randn(len(i), generator=generator).double() for k, i in conditions.items()}

    def shared(a: str, b: str) -> dict[tuple[str, int], Tensor]:
        """By latent, what each of its elements adds to the covariance of two slots."""
        found: dict[tuple[str, int], Tensor] = {}
        for (g, h), entry in covariance_inputs(groups[a], groups[b], latents, rows).items():
            factors = (slots[s].factors(groups[s][i], given) for s, i in ((a, g), (b, h)))
            by = product(torch.ones(1).double(), *itertools.chain(*factors))
            parts = [(name, coefficient) for name, _, coefficient in entry.locals]
            for name, part in [*parts, *((n, matrix.T) for n, matrix in entry.denses)]:
                key = name, part.dim()
                found[key] = part * by + found[key] if key in found else part * by
        return found

    none = torch.zeros((), dtype=torch.float64)
    most: dict[tuple[str, int], Tensor] = {}
    for name in slots:
        for key, own in shared(name, name).items():
            most[key] = torch.maximum(most[key], own) if key in most else own
    first, *others = (shared(*pair) for pair in itertools.combinations(slots, 2))
    return all(
        bool(((other.get(key, none) - first.get(key, none)).abs() <= ALIKE * most.get(key, none)).all())
        for other in others
        for key in {*first, *other}
    )


def _at(part: Local | Dense, index: Tensor) -> Tensor:
    """Each row's coefficient of one element."""
    if isinstance(part, Dense):
        return part.matrix.gather(1, index.unsqueeze(1)).squeeze(1)
    return part.coefficient * (part.index == index)
