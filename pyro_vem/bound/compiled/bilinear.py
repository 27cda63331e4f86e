"""Sums of products of two latents in a slot, and their first two moments under independent Gaussians.

A row adds up a few products of two factors, ``sum_k z[i, k] * w[j, k]``. Each factor is affine in
latents (or in exponentials of latents), and no latent of a row is in two of its factors: factors are
independent, and so are products. Rows that are all pairs of a few left and right columns of factors,
as in a matrix of factor scores times one of loadings, are matrix products.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .linear import Input

Values: TypeAlias = Mapping[str, Tensor]
"""Unconstrained values by variable, each flat: (size,), or (points, size)."""


@dataclass(frozen=True)
class Part:
    """coefficient * g(variable[index]), where g(x) = x, or exp(rate * x) if the rate is not zero."""

    name: str
    index: Tensor
    coefficient: Tensor
    rate: float

    def of(self, x: Tensor) -> Tensor:
        """The part at values of the variable, (..., size)."""
        x = x.index_select(-1, self.index)
        return self.coefficient * (torch.exp(self.rate * x) if self.rate else x)


@dataclass(frozen=True)
class Side:
    """One factor of every product, (products * columns,), flat: offset + sum of parts."""

    offset: Tensor
    parts: tuple[Part, ...]

    def at(self, values: Values) -> Tensor:
        """The factors at one point, or at a batch of them."""
        total = self.offset
        for part in self.parts:
            total = total + part.of(values[part.name])
        return total

    def inputs(self, latents: Collection[str]) -> dict[str, Input]:
        """What the moments need of the guide: linear in its means, or in its variances."""
        rows, found = len(self.offset), {}
        linear = [p for p in self.parts if not p.rate]
        random = [p for p in linear if p.name in latents]
        if linear:
            found["mean"] = Input(rows, False, [(p.name, p.index, p.coefficient) for p in linear])
        if random:
            found["spread"] = Input(rows, True, [(p.name, p.index, p.coefficient**2) for p in random])
        for i, p in self._exponentials():
            rate = p.rate * (p.coefficient != 0).to(p.coefficient)
            found[f"mean {i}"] = Input(rows, False, [(p.name, p.index, rate)])
            if p.name in latents:
                found[f"spread {i}"] = Input(rows, True, [(p.name, p.index, rate * rate)])
        return found

    def moments(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Means and variances of the factors; None if they are known."""
        mean, spread = self.offset, x.get("spread")
        if "mean" in x:
            mean = mean + x["mean"]
        for i, p in self._exponentials():
            m, v = x[f"mean {i}"], x.get(f"spread {i}")
            if v is None:
                mean = mean + p.coefficient * m.exp()
                continue
            expected = p.coefficient * torch.exp(m + 0.5 * v)
            own = expected.square() * torch.expm1(v)
            mean, spread = mean + expected, own if spread is None else spread + own
        return mean, spread

    def _exponentials(self) -> list[tuple[int, Part]]:
        return [(i, p) for i, p in enumerate(self.parts) if p.rate]


@dataclass(frozen=True)
class Bilinear:
    """Sums of products, row by row.

    Attributes:
        first, second: the factors, in columns.
        count: products of a row.
        is_grid: whether every column of one side meets every one of the other; else columns are rows.
        where: of a grid, the place of each row in it; None if rows are in its order.
    """

    first: Side
    second: Side
    count: int
    is_grid: bool
    where: Tensor | None = None

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of all that factors depend on."""
        return tuple(dict.fromkeys(p.name for side in (self.first, self.second) for p in side.parts))

    def at(self, values: Values) -> Tensor:
        """The sums at one point, or at a batch of them."""
        return self._sums(self.first.at(values), self.second.at(values))

    def inputs(self, latents: Collection[str]) -> dict[tuple[str, str], Input]:
        """What the moments need of the guide, by side and key."""
        sides = (("first", self.first), ("second", self.second))
        return {(side, key): entry for side, of in sides for key, entry in of.inputs(latents).items()}

    def moments(self, x: Mapping[tuple[str, str], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of each row; None if nothing is random.

        A product of independent factors has the variance (m^2 + v) v' + v m'^2.

        Example:
            >>> two, half = torch.full((1,), 2.0), torch.full((1,), 0.5)
            >>> one = Part("w", torch.zeros(1).long(), torch.ones(1), 0.0)
            >>> product = Bilinear(Side(torch.zeros(1), (one,)), Side(torch.zeros(1), (one,)), 1, False)
            >>> x = {(s, k): v for s in ("first", "second") for k, v in (("mean", two), ("spread", half))}
            >>> product.moments(x)  # 2 * 2, and 4.5 * 0.5 + 0.5 * 4
            (tensor([4.]), tensor([4.2500]))
        """
        (m, v), (n, w) = (
            side.moments({key: value for (of, key), value in x.items() if of == name})
            for name, side in (("first", self.first), ("second", self.second))
        )
        spreads = [] if w is None else [self._sums(m * m if v is None else m * m + v, w)]
        spreads += [] if v is None else [self._sums(v, n * n)]
        return self._sums(m, n), sum(spreads[1:], spreads[0]) if spreads else None

    def _sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over the products of the factors, (..., rows)."""
        a, b = (side.reshape(*side.shape[:-1], self.count, -1) for side in (a, b))
        if not self.is_grid:
            return (a * b).sum(-2)
        sums = (a.mT @ b).flatten(-2)
        return sums if self.where is None else sums.index_select(-1, self.where)
