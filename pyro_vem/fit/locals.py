"""Factors of single rows in a fit on batches: parameters for all rows, E-steps for those of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError
from ..guides.factorised import FactorisedNormal
from ..model.data import Arguments
from ..model.parameters import Block
from ..model.rows import Rows
from ..model.sites import Latent
from .scales import free_sites
from .setup import Setup

if TYPE_CHECKING:
    from .batched import BatchFit

MOST_CHANGE = 16.0  # of a precision in one step, and its inverse
MOST_SDS = 1.0  # that a mean moves in one step: where the bound is flat far out, whole ones overshoot


@dataclass
class Locals:
    """Means and sds of the factors of all rows.

    Attributes:
        sites: latents inside plates over rows, with a factor of their own.
        guide: that holds them.
        rows: of the data.
    """

    sites: tuple[Latent, ...]
    guide: FactorisedNormal | None
    rows: Rows
    loc: dict[str, Tensor] = field(default_factory=dict)
    scale: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, setup: Setup, rows: Rows) -> "Locals":
        """Those of a problem on a batch.

        Raises:
            ModelError: if a guide of the user's has parameters that follow the rows.
        """
        guide = setup.guide
        inside = [s for s in setup.prototype.latents if s.is_in(rows.all_plates)]
        if not isinstance(guide, FactorisedNormal):
            if inside and guide is not None:
                raise ModelError(
                    f"latent {inside[0].name!r} has a factor for each row: in batches use MeanFieldNormal or "
                    "AmortizedNormal, whose parameters follow the rows of a batch"
                )
            return cls((), None, rows)
        free = set(free_sites(guide))
        return cls(
            tuple(site for site in guide.latents() if site in inside and site.name in free), guide, rows
        )

    @property
    def names(self) -> set[str]:
        """Of their parameters."""
        assert self.guide is not None or not self.sites
        guide = self.guide
        return {n for s in self.sites if guide for n in (guide.loc_name(s.name), guide.scale_name(s.name))}

    def shapes(self, block: Block) -> dict[str, tuple[int, ...]]:
        """Of parameters of all rows, from those of a batch."""
        found = {}
        for parameter in block.parameters:
            for site in self.sites:
                if self.guide is not None and self.guide.is_of(parameter.name, site.name):
                    row = self._rows_first(site, parameter.init)[0]
                    whole = self._rows_back(site, row.expand(self.rows.total, *row.shape))
                    found[parameter.name] = tuple(whole.shape)
        return found

    def start(self, phi: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        """All rows at the average of a batch's, or where an earlier fit has left them."""
        for site in self.sites:
            assert self.guide is not None
            for store, name in ((self.loc, self.guide.loc_name), (self.scale, self.guide.scale_name)):
                value = self._rows_first(site, phi[name(site.name)].detach())
                every = value.mean(0).expand(self.rows.total, *value.shape[1:])
                left = known.get(name(site.name))
                if left is not None and self._rows_first(site, left).shape == every.shape:
                    every = self._rows_first(site, left.to(value.device))
                store[site.name] = every.clone()

    def taken(self, index: Tensor | None) -> dict[str, Tensor]:
        """Parameters of some rows, by name; all rows without an index."""
        where = slice(None) if index is None else index
        found = {}
        for site in self.sites:
            assert self.guide is not None
            found[self.guide.loc_name(site.name)] = self._rows_back(site, self.loc[site.name][where])
            found[self.guide.scale_name(site.name)] = self._rows_back(site, self.scale[site.name][where])
        return found

    def e_step(
        self,
        fit: "BatchFit",
        x: Tensor,
        index: Tensor,
        call: Arguments,
        noise: Mapping[str, Tensor],
        rounds: int,
    ) -> dict[str, Tensor]:
        """Natural-gradient steps of the rows of a batch at what all rows share; their new parameters."""
        for _ in range(rounds):
            values = {name: v.detach().requires_grad_() for name, v in self.taken(index).items()}
            bound = fit.value(x.detach(), values, call, noise)
            self.move(
                index, values, dict(zip(values, torch.autograd.grad(bound, [*values.values()]), strict=True))
            )
        return self.taken(index)

    def move(self, index: Tensor, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """The natural-gradient step of some rows, from the gradients of the bound that they stand for."""
        weight = self.rows.total / len(index)
        for site in self.sites:
            self._move(site, index, values, {name: value / weight for name, value in gradients.items()})

    def _move(
        self, site: Latent, index: Tensor, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        assert self.guide is not None
        loc, scale = (
            self._rows_first(site, values[name(site.name)].detach())
            for name in (self.guide.loc_name, self.guide.scale_name)
        )
        by_loc, by_scale = (
            self._rows_first(site, gradients[name(site.name)])
            for name in (self.guide.loc_name, self.guide.scale_name)
        )
        self.loc[site.name][index], self.scale[site.name][index] = natural_step(loc, scale, by_loc, by_scale)

    def _axis(self, site: Latent) -> int:
        dim = next(p.dim for p in site.plates if p.name in self.rows.all_plates)
        return site.init.dim() - site.event_dim + dim

    def _rows_first(self, site: Latent, value: Tensor) -> Tensor:
        return value.movedim(self._axis(site), 0)

    def _rows_back(self, site: Latent, value: Tensor) -> Tensor:
        return value.movedim(0, self._axis(site))


def natural_step(loc: Tensor, scale: Tensor, by_loc: Tensor, by_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A natural-gradient step of Gaussian factors from the bound's slopes in mean and sd, whole if short.

    The slope in the sd is the expected curvature (Price 1958), so this is the optimum where the
    posterior is Gaussian, and a Newton step elsewhere.

    References:
        Khan and Lin (2017), Conjugate-computation variational inference, AISTATS.

    Example:
        >>> m, s = torch.tensor(0.0), torch.tensor(1.0)  # bound -2 (m - 1)^2 - 2 s^2 + log s
        >>> natural_step(m, s, -4 * (m - 1), 1 / s - 4 * s)
        (tensor(1.), tensor(0.5000))
    """
    before = scale.square().reciprocal()
    precision = (before - by_scale / scale).clamp(before / MOST_CHANGE, before * MOST_CHANGE)
    most = MOST_SDS * torch.maximum(scale, precision.rsqrt())
    return loc + (by_loc / precision).clamp(-most, most), precision.rsqrt()
