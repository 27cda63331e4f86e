"""Log densities of a run whose discrete sites are enumerated: summed out, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...model.density import sum_last
from ...model.runtime import Execution, Site, is_summed_out
from ...model.sites import plates_of
from ..terms import log_density
from .contraction import Factor, components, log_rows, seat
from .elements import identities, pieces


@dataclass(frozen=True)
class Marginal:
    """The log densities of one run, its discrete sites summed out.

    Attributes:
        run: the run.
        rows: the density of each site, row by row; empty if no site is summed out. What is summed out
            together stands at its seat; the other sites of it are zero.
        together: the factors of what is summed out together, by its seat: its first observed site, else its
            first site.
    """

    run: Execution
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    together: Mapping[str, list[Factor]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Execution) -> "Marginal":
        """Those of a run of the model."""
        if not any(is_summed_out(site) for site in run.sites.values()):
            return cls(run)
        plates = {
            identity: tuple(plate.dim for plate in plates_of(run.sites[name]))
            for name, identity in identities(run).items()
        }
        rows: dict[str, Tensor] = {}
        factors, depth = [], _depth(run)
        for name, piece in pieces(run, depth).items():
            if piece.discrete:
                value = sum_last(piece.value, piece.inner)
                factors.append(Factor(name, value, piece.discrete, piece.scale))
                rows[name] = torch.zeros((), dtype=piece.value.dtype)
            else:
                value = log_density(run.sites[name])
                rows[name] = value.reshape(value.shape[max(0, value.dim() - depth) :])  # one value: no sum
        observed = [name for name, site in run.sites.items() if site["is_observed"]]
        together = {seat(members, observed): members for members in components(factors)}
        rows |= {place: log_rows(members, plates) for place, members in together.items()}
        return cls(run, rows, together)

    def density(self, site: Site) -> Tensor:
        """The log density of a site of the run, or of its guide."""
        name = site["name"]
        is_known = name in self.rows and site is self.run.sites.get(name)
        return self.rows[name] if is_known else log_density(site)

    @property
    def seats(self) -> dict[str, str]:
        """Where the density of each site stands that is summed out together with others, by name."""
        return {member.name: place for place, members in self.together.items() for member in members}

    @property
    def likelihood(self) -> list[str]:
        """Observed sites whose density stands at themselves, not at a site summed out together with them."""
        seats, sites = self.seats, self.run.sites.items()
        return [name for name, site in sites if site["is_observed"] and seats.get(name, name) == name]

    @property
    def tied(self) -> dict[str, list[str]]:
        """Observed sites whose rows have one joint density only, and the discrete sites that tie them.

        Those lie outside all plates of the site, or tie it to other observed sites (a chain) as a whole.
        """
        found: dict[str, list[str]] = {}
        for place, members in self.together.items():
            seen = [member for member in members if self.run.sites[member.name]["is_observed"]]
            most = max((member.value.shape[len(member.discrete) :].numel() for member in seen), default=1)
            if self.rows[place].numel() == 1 and (most > 1 or len(seen) > 1):
                sites = [member.name for member in members if is_summed_out(self.run.sites[member.name])]
                found |= {member.name: sites for member in seen}
        return found


def _depth(run: Execution) -> int:
    """Dimensions that plates take."""
    return max([-p.dim for site in run.sites.values() for p in plates_of(site)], default=0)
