"""What the part of a bound that needs no draws offers, whatever its guide."""

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from .tables import PlanRow

Values = Mapping[str, Tensor]


class ExactTerms(Protocol):
    """Terms of a bound without draws: compiled for Gaussian factors, or lifted for conjugate ones."""

    @property
    def names(self) -> frozenset[str]:
        """Rows of the plan that are exact."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Why the other rows are not."""
        ...

    @property
    def rough(self) -> Collection[str]:
        """Rows that were exact, and found to differ from draws."""
        return ()

    @property
    def num_elements(self) -> int:
        """Densities that one draw costs."""
        ...

    @property
    def is_small(self) -> bool:
        """True if all that an evaluation does is a few operations on few numbers."""
        return False

    @property
    def not_averages(self) -> frozenset[str]:
        """Rows that draws of log densities do not average to."""
        return frozenset()

    def shown(self, row: PlanRow) -> PlanRow:
        """An exact row of the plan with its method and proof."""
        ...

    def refuse(self, name: str, reason: str) -> bool:
        """Sample a row from here on; False if that cannot be."""
        ...

    def value(self, phi: Values, theta: Values) -> Tensor:
        """The sum of the exact rows, in nats."""
        ...

    def terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Each exact row, in nats."""
        ...

    def flat_total(self, phi: Tensor, theta: Tensor) -> Tensor | None:
        """The sum straight from flat vectors; None if that needs constrained values."""
        return None

    def refine(self, phi: Values, theta: Values, is_last: bool) -> bool:
        """Enough quadrature nodes; True if something changed."""
        return False

    def recheck(self, phi: Values, theta: Values, seed: int) -> list[str]:
        """Rows that were refused because they differ from the model at draws of the guide."""
        ...
