"""One factor of the log joint as a polynomial in statistics: sum of coefficient x product of t's."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .variables import Coding

ROUNDING = 1e-13  # of the largest value that coefficients were solved from


@dataclass(frozen=True)
class Monomial:
    """A product of statistics.

    Attributes:
        powers: (variable, number of the statistic), for each variable that enters.
        coefficient: one for each element of the factor, or broadcastable.
    """

    powers: tuple[tuple[str, int], ...]
    coefficient: Tensor


@dataclass(frozen=True)
class Rows:
    """An index whose first dimension runs along rows of a matrix: whole rows are gathered at once.

    Attributes:
        row: of the matrix, for each element without the first dimension.
        length: of a row.
        is_turned: whether the matrix is stored by columns.
    """

    row: Tensor
    length: int
    is_turned: bool

    def of(self, statistic: Tensor) -> Tensor:
        """A statistic at the index."""
        matrix = (
            statistic.reshape(self.length, -1).T if self.is_turned else statistic.reshape(-1, self.length)
        )
        return matrix.contiguous().index_select(0, self.row.reshape(-1)).T.reshape(-1, *self.row.shape)


@dataclass(frozen=True)
class Table:
    """A factor in expected statistics.

    Attributes:
        name: site of the factor.
        index: group of each variable in scope, for each element of the factor; None for all in order.
        monomials: what is added up.
        shape: of the elements; empty leading part if there is no discrete site.
        discrete: the enumerated sites that the leading dimensions run over.
        scale: of the site, where it has discrete ones; else it is in the coefficients.
        inner: number of trailing dimensions that are no plates.
    """

    name: str
    index: Mapping[str, Tensor | Rows | None]
    monomials: tuple[Monomial, ...]
    shape: tuple[int, ...]
    discrete: tuple[int, ...]
    scale: float | Tensor
    inner: int

    @property
    def scope(self) -> frozenset[str]:
        """Variables that enter."""
        return frozenset(self.index)

    def value(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The factor at given statistics, by element (broadcastable with `shape`)."""
        total = torch.zeros((), dtype=torch.float64)
        for monomial in self.monomials:
            total = total + self._product(monomial, statistics)
        return total

    def slope(self, name: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Derivatives of the sum of all elements in a variable's statistics; not with discrete sites."""
        slope, index = torch.zeros_like(statistics[name]), self.index[name]
        for monomial in self.monomials:
            powers = dict(monomial.powers)
            if name not in powers:
                continue
            term = self._product(monomial, statistics, without=name)
            if index is None:
                slope[powers[name]] += term
            else:
                assert isinstance(index, Tensor)
                slope[powers[name]].index_add_(0, index.reshape(-1), term.reshape(-1))
        return slope

    def size(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The sum of the absolute values of its terms: what rounding is relative to."""
        total = torch.zeros((), dtype=torch.float64)
        for monomial in self.monomials:
            total = total + self._product(monomial, statistics).abs()
        return total

    def _product(
        self, monomial: Monomial, statistics: Mapping[str, Tensor], without: str | None = None
    ) -> Tensor:
        """A coefficient times statistics; `without` those of one variable."""
        term = monomial.coefficient
        for name, number in monomial.powers:
            if name != without:
                term = term * gathered(statistics[name][number], self.index[name])
        return term


def gathered(statistic: Tensor, index: Tensor | Rows | None) -> Tensor:
    """A statistic at an index; None stands for all groups in order."""
    if index is None:
        return statistic
    if isinstance(index, Rows):
        return index.of(statistic)
    return statistic.index_select(0, index.reshape(-1)).reshape(index.shape)


def in_rows(index: Tensor, groups: int) -> Tensor | Rows:
    """The index as rows of a matrix, if it is one whose first dimension runs along them."""
    length = index.shape[0] if index.dim() > 1 else 1
    if length == 1 or index[0].numel() == 1 or groups % length:
        return index
    steps, first = index - index[:1], index[0]
    along = torch.arange(length).reshape(-1, *(1,) * first.dim())
    if torch.equal(steps, along.expand_as(steps)) and not bool((first % length).any()):
        return Rows(first // length, length, False)
    if torch.equal(steps, (along * (groups // length)).expand_as(steps)):
        return Rows(first, length, True)
    return index


def grid_of(codings: Sequence[Coding]) -> list[tuple[int, ...]]:
    """Numbers of the probes of every variable in scope, all combinations."""
    return list(itertools.product(*(range(coding.family.num + 1) for coding in codings)))


def coefficients(values: Tensor, factor: str, codings: Sequence[Coding]) -> Tensor:
    """Values on a grid of probes, (m_1, ..., m_r, *elements), to coefficients of the same shape."""
    for axis, coding in enumerate(codings):
        values = coding.solved(values.movedim(axis, 0), coding.where[factor]).movedim(0, axis)
    return values


def monomials_of(
    values: Tensor, factor: str, codings: Sequence[Coding], kept: Sequence[tuple[int, ...]] | None
) -> tuple[list[tuple[int, ...]], list[Monomial]]:
    """The monomials of a factor; `kept` says which, None finds them by size."""
    table, names = coefficients(values, factor, codings), [c.variable.name for c in codings]
    if kept is None:
        sizes = {powers: float(table[powers].abs().amax()) for powers in grid_of(codings)}
        noise = ROUNDING * float(values.abs().amax())
        kept = [powers for powers, size in sizes.items() if size > noise]
    made = [
        Monomial(tuple((n, p - 1) for n, p in zip(names, powers, strict=True) if p), table[powers])
        for powers in kept
    ]
    return list(kept), made


@dataclass(frozen=True)
class Grouping:
    """Elements with equal index tuples, added up: sufficient statistics of the data."""

    members: Tensor
    size: int

    def added(self, values: Tensor) -> Tensor:
        """Sums over each group."""
        return torch.zeros(self.size, dtype=values.dtype).index_add(0, self.members, values.reshape(-1))


def grouping(index: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Grouping, dict[str, Tensor]]:
    """Which elements of a factor may be added up, and the index of what they become."""
    count = int(torch.Size(shape).numel())
    if not index:
        return Grouping(torch.zeros(count, dtype=torch.long), 1), {}
    rows = torch.stack([where.expand(tuple(shape)).reshape(-1) for where in index.values()])
    code, stride = torch.zeros(count, dtype=torch.long), 1
    for row in rows:
        code += stride * row
        stride *= int(row.max()) + 1
    _, members = code.unique(return_inverse=True)
    size = int(members.max()) + 1
    kept = torch.empty(size, dtype=torch.long)
    kept[members] = torch.arange(count)
    return Grouping(members, size), {name: row[kept] for name, row in zip(index, rows, strict=True)}


def narrowed(value: Tensor, tolerance: float = 0.0) -> Tensor:
    """One copy along each dimension along which all are equal, up to a tolerance."""
    for dim in range(value.dim()):
        if value.shape[dim] > 1:
            first = value.narrow(dim, 0, 1)
            if bool(((value - first).abs() <= tolerance).all()):
                value = value.mean(dim, keepdim=True) if value.is_floating_point() else first
    return value
