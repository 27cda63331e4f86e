"""Rows of discrete sites that are masked out together with all that depends on them: they add nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...model.runtime import Execution, Site
from ..kl import leaf_of
from .elements import identities, pieces
from .table import Table


@dataclass(frozen=True)
class Masked:
    """Where discrete sites are masked out.

    A masked site that is summed out keeps its density, whose sum over the site's values is one. At
    expected log probabilities it is less: such a row would count as data for their factors.

    Attributes:
        idle: rows with nothing downstream that is not masked, by site; shaped as the plates.
        partly: sites with rows that are masked while something downstream is not.
        identities: of the sites.
    """

    idle: Mapping[str, Tensor] = field(default_factory=dict)
    partly: frozenset[str] = frozenset()
    identities: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Execution, depth: int, plates: Mapping[int, tuple[int, ...]]) -> "Masked":
        """What is masked in a run; `plates` are the dimensions of those that each identity is in."""
        known, identity_of = pieces(run, depth), identities(run)
        off = {name: _off(run.sites[name], depth) for name in known}
        idle: dict[str, Tensor] = {}
        partly = set()
        for name, identity in reversed(identity_of.items()):  # what is downstream comes first
            if not bool(off[name].any()):
                continue
            rows = off[name]
            for other, piece in known.items():
                if other != name and identity in piece.discrete:
                    is_still = idle.get(other, torch.tensor(False)) if other in identity_of else off[other]
                    rows = rows & _everywhere(is_still, plates[identity])
            if bool((off[name] & ~rows).any()):
                partly.add(name)
            if bool(rows.any()):
                idle[name] = rows
        return cls(idle, frozenset(partly), identity_of)

    def out(self, table: Table, value: Tensor) -> Tensor:
        """A factor's values, idle rows at equal probabilities: their sum is one whatever else is known."""
        if table.name not in self.idle:
            return value
        identity = self.identities[table.name]
        size = table.shape[table.discrete.index(identity)] if identity in table.discrete else 1
        return torch.where(self.idle[table.name], -math.log(size), value)

    def note(self, name: str) -> str:
        """What the plan says of a site's masked rows; empty if they add nothing."""
        if name not in self.partly:
            return ""
        return "; masked rows keep their density where what depends on them is not masked"


def _off(site: Site, depth: int) -> Tensor:
    """True at rows, shaped as the plates, where a site is masked whatever the discrete sites are."""
    leaf, off = leaf_of(site["fn"]), torch.zeros((1,) * depth, dtype=torch.bool)
    for mask, inner in ((site["mask"], 0), (leaf.mask(), leaf.inner)):
        if mask is None or mask is True:
            continue
        live = torch.as_tensor(mask)
        while inner and live.dim():
            live, inner = live.any(-1), inner - 1
        while live.dim() > depth:
            live = live.any(0)
        off = off | ~live
    return off


def _everywhere(is_still: Tensor, kept: tuple[int, ...]) -> Tensor:
    """True where all of the plates that are not kept is still."""
    for dim in range(-is_still.dim(), 0):
        if dim not in kept:
            is_still = is_still.all(dim, keepdim=True)
    return is_still
