"""What slots need of the guide: rows that are linear in its means, or in its variances."""

from torch import Tensor

from .affine import Dense, Local, compact
from .conditional import Group
from .linear import Input


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


def variance_input(one: Group, other: Group, shared: list[str], rows: int) -> Input:
    """Sum over the shared latents of both coefficients times the variance."""
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


def _at(part: Local | Dense, index: Tensor) -> Tensor:
    """Each row's coefficient of one element."""
    if isinstance(part, Dense):
        return part.matrix.gather(1, index.unsqueeze(1)).squeeze(1)
    return part.coefficient * (part.index == index)
