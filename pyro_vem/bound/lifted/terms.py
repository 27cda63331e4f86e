"""A lifted problem as the exact part of a bound."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...guides.conjugate import MeanFieldConjugate
from ..exact import ExactTerms
from ..tables import PlanRow
from .lifted import Lifted, Values

Draw = Callable[[Values, Values, int, int], Iterable[Values]]
NUM_CHECKS = 16  # draws of the fitted guide at which tables are held against the model


class LiftedTerms(ExactTerms):
    """Tables at the expected statistics of a conjugate guide.

    Args:
        lifted: the tables.
        guide: with its latents bound.
        draw: phi and theta, a number and a seed to draws of the guide.
        shares: what each latent's terms are scaled by where the data are a part of all rows.
    """

    def __init__(
        self, lifted: Lifted, guide: MeanFieldConjugate | None, draw: Draw, shares: Mapping[str, float]
    ) -> None:
        self.lifted, self.guide, self._draw, self.shares = lifted, guide, draw, shares
        self._num_elements = sum(math.prod(table.shape) for table in lifted.found.tables.values())

    @property
    def names(self) -> frozenset[str]:
        """Sites whose factor is a table."""
        return self.lifted.names

    @property
    def num_elements(self) -> int:
        """Densities that one draw costs."""
        return self._num_elements

    @property
    def not_averages(self) -> frozenset[str]:
        """Terms that are no averages of log densities: logs of sums over discrete sites at expectations."""
        tables = self.lifted.found.tables.values()
        return frozenset(t.name for t in tables if t.discrete) if self.lifted.latents else frozenset()

    @property
    def refused(self) -> Mapping[str, str]:
        """Why the other factors are none."""
        return self.lifted.found.rest

    def shown(self, row: PlanRow) -> PlanRow:
        """A row of the plan with the proof of its table."""
        method = "enumeration" if row.site in self.lifted.discrete else "closed form"
        return replace(row, method=method, proof=self.lifted.proof(row.site))

    def refuse(self, name: str, reason: str) -> bool:
        """Sample a factor from here on; False if it is no table."""
        if name not in self.names:
            return False
        self.lifted.drop(name, reason)
        return True

    def statistics(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Expected statistics of every variable."""
        factors = self.guide.factor_values if self.guide is not None else None
        return self.lifted.statistics(factors, phi, theta)

    def value(self, phi: Values, theta: Values, statistics: Values | None = None) -> Tensor:
        """The sum of all tables and entropies, in nats; `statistics` are those there, if they are known."""
        found = list(self.terms(phi, theta, statistics).values())
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)

    def terms(self, phi: Values, theta: Values, statistics: Values | None = None) -> dict[str, Tensor]:
        """Each factor's part of the bound, with the entropy of its site's own factor, in nats."""
        found = self.lifted.expected(statistics or self.statistics(phi, theta), theta)
        for name in self.lifted.latents:
            if name in found:
                assert self.guide is not None
                entropy = self.lifted.entropy(name, self.guide.factor_values(name, phi))
                found[name] = found[name] + self.shares[name] * entropy
        return found

    def responsibilities(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Marginal probabilities of each discrete site: (*plates, values)."""
        with torch.no_grad():
            found = self.lifted.responsibilities(self.statistics(phi, theta), theta)
        return {name: value.movedim(0, -1) for name, value in found.items()}

    def recheck(self, phi: Values, theta: Values, seed: int) -> list[str]:
        """Factors that differ from the model at draws of the guide: a kink or a branch lies there."""
        wrong: dict[str, float] = {}
        with torch.no_grad():
            for values in self._draw(phi, theta, NUM_CHECKS, seed):
                wrong |= self.lifted.misfits(values)
        for name, error in wrong.items():
            self.lifted.drop(name, f"its table is {error:.1g} off at draws of the fitted guide")
        return list(wrong)
