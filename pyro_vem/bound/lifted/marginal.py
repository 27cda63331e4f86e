"""Log densities of a run whose discrete sites are enumerated: summed out, row by row."""

import torch
from torch import Tensor

from ...model.runtime import Execution, Site, is_summed_out
from ...model.sites import plates_of
from ..terms import Density, log_density
from ..weights import weighted
from .contraction import Factor, components, log_rows, seat
from .elements import Piece, identities, pieces


def density_of(run: Execution) -> Density:
    """The log density of a site of a run or of its guide, discrete sites of the run summed out."""
    rows = marginal_rows(run)

    def density(site: Site) -> Tensor:
        name = site["name"]
        return rows[name] if name in rows and site is run.sites.get(name) else log_density(site)

    return density


def marginal_rows(run: Execution) -> dict[str, Tensor]:
    """The log density of each site, discrete ones summed out; empty if there is none.

    What is summed out together stands at its first observed site (else at its first site); the
    other sites of it are zero.
    """
    summed_out = [site for site in run.sites.values() if is_summed_out(site)]
    if not summed_out:
        return {}
    plates = {
        identity: tuple(plate.dim for plate in plates_of(run.sites[name]))
        for name, identity in identities(run).items()
    }
    found: dict[str, Tensor] = {}
    factors, depth = [], _depth(run)
    for name, piece in pieces(run, depth).items():
        if piece.discrete:
            factors.append(_factor(name, piece))
            found[name] = torch.zeros((), dtype=piece.value.dtype)
        else:
            value = weighted(run.sites[name]["fn"].log_prob(run.sites[name]["value"]), run.sites[name])
            found[name] = value.reshape(value.shape[max(0, value.dim() - depth) :])  # one value: no sum
    observed = _observed(run)
    for members in components(factors):
        found[seat(members, observed)] = log_rows(members, plates)
    return found


def seats(run: Execution) -> dict[str, str]:
    """Where the log density of each site stands that is summed out together with others, by name."""
    if not any(is_summed_out(site) for site in run.sites.values()):
        return {}
    found = pieces(run, _depth(run)).items()
    factors = [_factor(name, piece) for name, piece in found if piece.discrete]
    observed = _observed(run)
    return {member.name: seat(members, observed) for members in components(factors) for member in members}


def tied_rows(run: Execution) -> dict[str, list[str]]:
    """Observed sites whose rows have one joint density only, and the discrete sites that tie them.

    Those lie outside all plates of the site, or tie it to other observed sites (a chain) as a whole.
    """
    if not any(is_summed_out(site) for site in run.sites.values()):
        return {}
    found, observed = pieces(run, _depth(run)).items(), _observed(run)
    factors = [_factor(name, piece) for name, piece in found if piece.discrete]
    rows = marginal_rows(run)
    tied: dict[str, list[str]] = {}
    for members in components(factors):
        seen = [member for member in members if member.name in observed]
        size = rows[seat(members, observed)].numel()
        most = max((member.value.shape[len(member.discrete) :].numel() for member in seen), default=1)
        if size == 1 and (most > 1 or len(seen) > 1):
            sites = [member.name for member in members if is_summed_out(run.sites[member.name])]
            tied |= {member.name: sites for member in seen}
    return tied


def with_own_rows(run: Execution) -> list[str]:
    """Observed sites whose log density stands at themselves, not at a site summed out together with them."""
    places = seats(run)
    return [
        name for name, site in run.sites.items() if site["is_observed"] and places.get(name, name) == name
    ]


def _depth(run: Execution) -> int:
    """Dimensions that plates take."""
    return max([-p.dim for site in run.sites.values() for p in plates_of(site)], default=0)


def _observed(run: Execution) -> frozenset[str]:
    return frozenset(name for name, site in run.sites.items() if site["is_observed"])


def _factor(name: str, piece: Piece) -> Factor:
    value = piece.value.sum(list(range(-piece.inner, 0))) if piece.inner else piece.value
    return Factor(name, value, piece.discrete, piece.scale)
