"""Products of factors by row, arranged in as few columns of factors as rows have different ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bilinear import Bilinear, Part, Side

ROUNDED = 1e-9  # of the largest: coefficients that agree to it are one
MOST_EMPTY = 2  # places of a grid for each row


@dataclass
class Factor:
    """offset + sum of parts, one number a row."""

    offset: Tensor
    parts: list[Part] = field(default_factory=list)


Product = tuple[Factor, Factor]


def arranged(products: Sequence[Product]) -> Bilinear:
    """The products as a grid of columns where rows fill at least half of it, else row by row.

    Example:
        >>> one, zero = torch.ones(4).double(), torch.zeros(4).double()
        >>> i, j = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> z, w = Factor(zero, [Part("z", i, one, 0.0)]), Factor(zero, [Part("w", j, one, 0.0)])
        >>> found = arranged([(z, w)])
        >>> found.is_grid, found.at({"z": torch.tensor([1.0, 2.0]), "w": torch.tensor([3.0, 5.0])})
        (True, tensor([ 3.,  5.,  6., 10.], dtype=torch.float64))
    """
    sides = [[product[side] for product in products] for side in (0, 1)]
    rows = len(sides[0][0].offset)
    (codes, first), (others, second) = (_codes(factors) for factors in sides)
    is_grid = first * second <= MOST_EMPTY * rows
    if not is_grid:
        return Bilinear(_side(sides[0]), _side(sides[1]), len(products), False)
    where = codes * second + others
    is_ordered = first * second == rows and torch.equal(where, torch.arange(rows))
    one, other = (
        _side([_averaged(factor, code, size) for factor in factors])
        for factors, code, size in zip(sides, (codes, others), (first, second), strict=True)
    )
    return Bilinear(one, other, len(products), True, None if is_ordered else where)


def _codes(factors: Sequence[Factor]) -> tuple[Tensor, int]:
    """A number for each row, the same where all factors are, and how many there are."""
    code = torch.zeros_like(factors[0].offset)
    generator = torch.Generator().manual_seed(0)
    for factor in factors:
        features = [_rounded(factor.offset)]
        for part in factor.parts:
            features += [_rounded(part.coefficient), torch.where(part.coefficient != 0, part.index + 1, 0)]
        for feature in features:
            code = code + float(torch.rand((), generator=generator, dtype=torch.float64)) * feature
    found, inverse = code.unique(return_inverse=True)
    return inverse, len(found)


def _rounded(values: Tensor) -> Tensor:
    most = values.abs().max() if values.numel() else values.sum()
    return (values / (ROUNDED * most.clamp_min(1e-300))).round()


def _averaged(factor: Factor, code: Tensor, size: int) -> Factor:
    """One number a column: the average of its rows', which differ by rounding."""
    count = torch.zeros(size, dtype=torch.float64).index_add(0, code, torch.ones_like(factor.offset))

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add(0, code, values) / count

    def some(index: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.long).scatter(0, code, index)

    parts = [Part(p.name, some(p.index), mean(p.coefficient), p.rate) for p in factor.parts]
    return Factor(mean(factor.offset), parts)


def _side(factors: Sequence[Factor]) -> Side:
    """All factors of one side, those of one variable as one part."""
    parts = []
    for layer in range(max(len(factor.parts) for factor in factors)):
        here = [factor.parts[layer] if layer < len(factor.parts) else None for factor in factors]
        for name, rate in dict.fromkeys((p.name, p.rate) for p in here if p is not None):
            mine = [p if p is not None and p.name == name else None for p in here]
            blank = torch.zeros_like(factors[0].offset)
            index = torch.cat([blank.long() if p is None else p.index for p in mine])
            coefficient = torch.cat([blank if p is None else p.coefficient for p in mine])
            parts.append(Part(name, index, coefficient, rate))
    return Side(torch.cat([factor.offset for factor in factors]), tuple(parts))
