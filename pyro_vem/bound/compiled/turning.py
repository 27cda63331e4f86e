"""Which latents and parameters can be turned against each other: products of a row stay as they are."""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from .bilinear import Bilinear, Part

Places: TypeAlias = dict[str, Tensor]
"""By variable: its elements in columns, (factors, columns); a row multiplies those of a column."""


def turnable(products: Iterable[Bilinear]) -> list[tuple[Places, Places]]:
    """Variables that all products have on one side, and those on the other, by groups.

    With a matrix A, columns A w and (A')^-1 z have the sums of products that w and z have.

    Example:
        >>> one, i = torch.ones(2), torch.tensor([0, 1])
        >>> from .bilinear import Side
        >>> sides = [Side(torch.zeros(2), (Part(name, i, one, 0.0),)) for name in "wz"]
        >>> turnable([Bilinear(*sides, 2, False)])  # one row, two products
        [({'w': tensor([[0], [1]])}, {'z': tensor([[0], [1]])})]
    """
    groups: list[tuple[Places, Places]] = []
    for product in products:
        for one in product.first.parts:
            for other in product.second.parts:
                _add(groups, product.count, one, other)
    return groups


def _add(groups: list[tuple[Places, Places]], count: int, one: Part, other: Part) -> None:
    live = _live(one, count).any(1) & _live(other, count).any(1)
    first, second = (_places(part, count, live) for part in (one, other))
    if int(live.sum()) < 2 or first is None or second is None:
        return
    for group in groups:
        for left, right in (group, group[::-1]):
            if one.name in left or other.name in right:
                is_on_both = one.name in right or other.name in left
                if not is_on_both and len(next(iter(left.values()))) == len(first):
                    left.setdefault(one.name, first)
                    right.setdefault(other.name, second)
                return
    groups.append(({one.name: first}, {other.name: second}))


def _live(part: Part, count: int) -> Tensor:
    return part.coefficient.reshape(count, -1) != 0


def _places(part: Part, count: int, live: Tensor) -> Tensor | None:
    """The elements of a side in columns; None if some column has fewer, or others too."""
    if part.rate or not bool(_live(part, count)[live].all()):
        return None
    index = part.index.reshape(count, -1)[live]
    if not len(index):
        return None
    _, column = index[0].unique(return_inverse=True)
    places = index.new_zeros(len(index), int(column.max()) + 1)
    places[:, column] = index
    is_once = all(len(row.unique()) == len(row) for row in places)
    return places if is_once and torch.equal(places[:, column], index) else None
