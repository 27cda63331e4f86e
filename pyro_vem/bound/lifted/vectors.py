"""Which parameters are the mean and the covariance of vectors, by class: read off runs at generic values."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.density import collapsed
from ...model.parameters import Parameter
from ...model.runtime import Execution, Site
from ...model.support import element_of
from ..kl import leaf_of
from ..weights import element_weight
from .covariance import CORRELATION, FORMS, MATRIX, TRIL, Form
from .elements import arranged
from .moments import Moments, Values, Vectors, classes

RELATIVE, ABSOLUTE = 1e-10, 1e-12  # to which an argument of a distribution equals a parameter


@dataclass(frozen=True)
class Search:
    """What is known of a model when its vectors are looked at.

    Attributes:
        runs: at generic values of everything.
        points: those values.
        apart: a run at the first point, but for the values of latents.
        parameters: that may be moments, by name.
        seen: names of the factors that each of them enters.
        latents: whether each site's vectors are latent ones.
        depth: dimensions that plates take.
    """

    runs: Sequence[Execution]
    points: Sequence[Values]
    apart: Execution
    parameters: Mapping[str, Parameter]
    seen: Mapping[str, Collection[str]]
    latents: Mapping[str, bool]
    depth: int

    def moments(self) -> list[Moments]:
        """Groups of sites with a mean and a covariance that nothing else has."""
        found: list[Moments] = []
        for form in FORMS:
            for names in itertools.product(*(self._fitting(*part) for part in form.parts)):
                taken = {name for one in found for name in one.names}
                made = None if taken.intersection(names) else self._moments(form, names)
                if made is not None:
                    found.append(made)
        return found

    def refusals(self, found: Sequence[Moments]) -> dict[str, str]:
        """Why matrices of parameters that move vectors are not among what was found, by site."""
        taken = {name for one in found for name in one.names}
        reasons: dict[str, str] = {}
        for name, parameter in self.parameters.items():
            if name in taken or element_of(parameter.constraint) not in (*TRIL, *MATRIX, *CORRELATION):
                continue
            own = sorted(set(self.seen[name]) & set(self.latents))
            others = sorted(set(self.seen[name]) - set(self.latents))
            if others:
                reason = f"{name} also enters {', '.join(others)}"
            elif self._moving(own):
                reason = f"values of {', '.join(self._moving(own))} depend on parameters or latents"
            elif self._mean(own)[1] is None:
                reason = "their mean depends on latents"
            else:
                reason = f"{name} alone is not their covariance"
            reasons |= dict.fromkeys(own, f"no moments of the vectors: {reason}")
        return reasons

    def _fitting(self, event_dim: int, constraints: Collection[Any]) -> Iterator[str]:
        """Parameters that are a part of a covariance of any value."""
        for name, parameter in self.parameters.items():
            if element_of(parameter.constraint) in constraints and parameter.init.dim() >= event_dim:
                yield name

    def _moments(self, form: Form, names: tuple[str, ...]) -> Moments | None:
        """The group of sites whose covariance some parameters are; None if they are not."""
        sites = sorted(self.seen[names[0]])
        if any(set(self.seen[name]) != set(sites) for name in names) or not self._are_vectors(sites):
            return None
        parts = [
            [classes(point[n], dim) for n, (dim, _) in zip(names, form.parts, strict=True)]
            for point in self.points
        ]
        if len({len(part) for part in parts[0]}) > 1 or len({part.shape[-1] for part in parts[0]}) > 1:
            return None
        factors = self._placed([form.tril(part) for part in parts], sites, _tril_of, 2)
        if factors is None:
            return None
        loc, means = self._mean(sites)
        if means is None:
            return None
        vectors = tuple(self._vectors(site, means[site], factors[site]) for site in sites)
        return Moments(vectors, loc, names, form, parts[0][0].shape[-1])

    def _are_vectors(self, sites: Collection[str]) -> bool:
        """True if sites have vectors, all of them latent ones or none."""
        known = all(site in self.latents for site in sites)
        is_alike = bool(sites) and known and len({self.latents[site] for site in sites}) == 1
        return is_alike and not self._moving(sites)

    def _moving(self, sites: Collection[str]) -> list[str]:
        """Observed sites whose values depend on parameters or latents: they are no data."""
        first, *others = (*self.runs, self.apart)

        def is_moving(site: str) -> bool:
            value = first.sites[site]["value"]
            return any(
                not torch.equal(value.nan_to_num(), r.sites[site]["value"].nan_to_num()) for r in others
            )

        return [site for site in sites if not self.latents[site] and is_moving(site)]

    def _mean(self, sites: Sequence[str]) -> tuple[str | None, dict[str, Tensor] | None]:
        """The parameter that is the mean, and its class for each vector; zeros if it is none.

        No classes if the mean depends on latents: what their factors add to squares is not known here.
        """
        for name, parameter in self.parameters.items():
            if parameter.is_real and parameter.init.dim() and set(self.seen[name]) == set(sites):
                means = [classes(point[name], 1) for point in self.points]
                found = self._placed(means, sites, mean_of, 1)
                if found is not None:
                    return name, found
        pairs = [(mean_of(run.sites[site]) for run in (self.runs[0], self.apart)) for site in sites]
        if not all(torch.equal(*pair) for pair in pairs):
            return None, None
        return None, {site: torch.zeros((), dtype=torch.long) for site in sites}

    def _placed(
        self, tables: Sequence[Tensor], sites: Sequence[str], what: Callable[[Site], Tensor], event_dim: int
    ) -> dict[str, Tensor] | None:
        """The class of each vector's mean or covariance, the same at all points; None if one has none."""
        found = {}
        for site in sites:
            made = [collapsed(what(run.sites[site]), event_dim).double() for run in self.runs]
            places = [place(table, rows, event_dim) for table, rows in zip(tables, made, strict=True)]
            first = places[0]
            if first is None or any(other is None or not torch.equal(first, other) for other in places):
                return None
            found[site] = first
        return found

    def _vectors(self, name: str, loc: Tensor, factor: Tensor) -> Vectors:
        """A site's vectors as the elements of its density see them."""
        site = self.runs[0].sites[name]
        leaf, value, is_latent = leaf_of(site["fn"]), site["value"], self.latents[name]
        weight = torch.as_tensor(element_weight(site, leaf.inner), dtype=torch.float64)
        # A mask may depend on a discrete site that the mean and the covariance do not see.
        shape = np.broadcast_shapes(leaf.dist.batch_shape, value.shape[:-1], weight.shape)
        rows = torch.arange(value.shape[:-1].numel()).reshape(value.shape[:-1])

        def flat(part: Tensor) -> Tensor:
            return arranged(part.expand(shape), self.depth, leaf.inner, site)[0].reshape(-1)

        elements, discrete = arranged(rows.expand(shape), self.depth, leaf.inner, site)
        if discrete:
            weight = (weight > 0).double()
        observed = None if is_latent else value.detach().reshape(-1, value.shape[-1])
        own = tuple(elements.shape), elements.reshape(-1), flat(loc), flat(factor), flat(weight)
        return Vectors(name, *own, observed, bool(discrete))


def place(table: Tensor, rows: Tensor, event_dim: int) -> Tensor | None:
    """The row of a table that each of some tensors equals, shaped as their batch; None if one has none.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double()
        >>> place(table, table[[1, 0, 1]], 1)
        tensor([1, 0, 1])
    """
    if table.shape[1:] != rows.shape[rows.dim() - event_dim :]:
        return None
    flat, wanted = table.flatten(1), rows.reshape(-1, table[0].numel())
    keys, order = flat.sum(1).sort()
    near = torch.searchsorted(keys, wanted.sum(1).contiguous())
    found = torch.full(near.shape, -1)
    for step in (0, -1):  # rounding may put an equal key on either side
        index = order[(near + step).clamp(0, len(order) - 1)]
        same = torch.isclose(flat[index], wanted, rtol=RELATIVE, atol=ABSOLUTE).all(1)
        found = torch.where(same, index, found)
    if bool((found < 0).any()):
        return None
    return found.reshape(rows.shape[: rows.dim() - event_dim])


def mean_of(site: Site) -> Tensor:
    """Of a site's vectors."""
    loc: Tensor = leaf_of(site["fn"]).dist.loc
    return loc


def _tril_of(site: Site) -> Tensor:
    tril: Tensor = leaf_of(site["fn"]).dist._unbroadcasted_scale_tril
    return tril


def may_be_covariance(parameter: Parameter) -> bool:
    """True if a parameter's constraint is one of a covariance."""
    return any(element_of(parameter.constraint) in allowed for form in FORMS for _, allowed in form.parts)


def is_vectors(site: Site) -> bool:
    """True for a site of MultivariateNormal vectors."""
    return type(leaf_of(site["fn"]).dist).__name__ == "MultivariateNormal"


def known_means(site: Site, depth: int) -> Tensor:
    """Means of the vectors of a run's site, by element: (elements, length)."""
    leaf, length = leaf_of(site["fn"]), site["value"].shape[-1]
    shape = np.broadcast_shapes(leaf.dist.batch_shape, site["value"].shape[:-1])
    means = mean_of(site).double().expand(*shape, length)
    return arranged(means, depth, leaf.inner + 1, site)[0].reshape(-1, length)
