"""Variables in units: elements of which each row of a slot sees one at most."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


class NoProducts(Exception):
    """A slot that is no sum of products of two units, with the reason."""


@dataclass
class Seen:
    """What one slot sees of one unit.

    Attributes:
        index: of each row's element.
        slope: coefficient of the unit's function, where all others are at the base.
        by: what that is more where all units have moved, in either of two ways.
    """

    index: Tensor
    slope: Tensor
    by: list[Tensor] = field(default_factory=list)


@dataclass
class Unit:
    """Elements of a variable of which each row sees one at most.

    Attributes:
        positions: of the elements in the flat variable.
        rate: of the exponential that slots are affine in; zero if they are affine in the values.
        seen: by slot.
        moves: two steps, whose ratio tells the unit from others.
    """

    name: str
    positions: Tensor
    rate: float = 0.0
    seen: dict[str, Seen] = field(default_factory=dict)
    moves: tuple[float, float] = (0.0, 0.0)

    def function(self, x: Tensor) -> Tensor:
        """What slots are affine in."""
        return torch.exp(self.rate * x) if self.rate else x

    def change(self, x: Tensor, by: float) -> Tensor:
        """How much that is more at x + by."""
        return self.function(x + by) - self.function(x)

    @property
    def ratio(self) -> float:
        """Of what the second move changes to what the first one does."""
        first, second = (math.expm1(self.rate * by) if self.rate else by for by in self.moves)
        return second / first
