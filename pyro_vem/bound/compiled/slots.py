"""Slots of a term: the few numbers a row that its log density is a function of.

A row is one scalar observation or one scalar latent. Location families have the residual
value - loc as a slot, so that a likelihood, a hierarchy and a random walk are the same case; other
latents have their unconstrained value; every other argument is a slot on the log scale where it is
positive, else as it stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from ...model.runtime import Site
from ...model.sites import Latent, plain_parts
from ..kl.table import is_same_density, leaf_of
from ..weights import element_weight

# Families whose log density depends on value - loc only.
LOCATION: dict[type, tuple[str, ...]] = {
    td.Normal: ("scale",),
    td.Laplace: ("scale",),
    td.Cauchy: ("scale",),
    dist.Logistic: ("scale",),
    td.Gumbel: ("scale",),
    td.StudentT: ("df", "scale"),
}
# Other elementwise families, with the arguments that a density is rebuilt from.
GENERAL: dict[type, tuple[str, ...]] = {
    td.Poisson: ("rate",),
    td.Bernoulli: ("logits",),
    td.Binomial: ("total_count", "logits"),
    td.NegativeBinomial: ("total_count", "logits"),
    td.Geometric: ("logits",),
    td.Exponential: ("rate",),
    td.Gamma: ("concentration", "rate"),
    dist.InverseGamma: ("concentration", "rate"),
    td.Weibull: ("scale", "concentration"),
    td.Beta: ("concentration1", "concentration0"),
    td.HalfNormal: ("scale",),
    td.HalfCauchy: ("scale",),
    td.LogNormal: ("loc", "scale"),
}
POSITIVE = frozenset(
    ["scale", "df", "rate", "concentration", "concentration0", "concentration1", "total_count"]
)
RESIDUAL, VALUE = "residual", "value"


def is_log(family: type, name: str) -> bool:
    """True if a slot is the log of the argument; a Binomial may have rows without a trial."""
    return name in POSITIVE and not (family is td.Binomial and name == "total_count")


@dataclass(frozen=True)
class Spec:
    """The part of a term that does not change: family, rows, weights, data.

    Attributes:
        family: class that the density is rebuilt from.
        slots: names of the slots, in order.
        shape: shape of the rows before they are flattened.
        weight: scale times mask of each row, flat.
        value: the observed value of each row, flat; None for a latent.
        latent: the latent site of the rows; None for data.
    """

    name: str
    family: type
    slots: tuple[str, ...]
    shape: tuple[int, ...]
    weight: Tensor
    value: Tensor | None
    latent: Latent | None

    def argument(self, name: str, slot: Tensor) -> Tensor:
        """The argument of the density that a slot stands for."""
        return slot.exp() if is_log(self.family, name) else slot

    def change(self, other: "Spec | str") -> str | None:
        """What of the static part differs in another run, or None."""
        if isinstance(other, str) or other.family is not self.family or other.shape != self.shape:
            return "its family or shape changes with latents or parameters"
        if not torch.equal(other.weight, self.weight):
            return "its scale or mask depends on latents or parameters"
        if self.slots[0] != RESIDUAL and self.value is not None and other.value is not None:
            same = (other.value == self.value) | (other.value.isnan() & self.value.isnan())
            if not bool(same.all()):
                return "its observed value depends on latents or parameters"
        return None

    def log_density(self, eta: Mapping[str, Tensor]) -> Any:
        """Log density of each row at given slots, (..., rows); with the Jacobian for a latent."""
        args = {name: self.argument(name, eta[name]) for name in self.slots[1:]}
        if self.slots[0] == RESIDUAL:
            residual = eta[RESIDUAL]
            fn = self.family(loc=torch.zeros_like(residual), validate_args=False, **args)
            return fn.log_prob(residual)
        if self.latent is None:
            names = self.slots
            args = {name: self.argument(name, eta[name]) for name in names}
            return self.family(**args, validate_args=False).log_prob(self.value)
        u = eta[VALUE]
        z, slope = u, torch.zeros_like(u)
        for part in plain_parts([self.latent.transform]):
            image = part(z)
            slope = slope + part.log_abs_det_jacobian(z, image)
            z = image
        return self.family(**args, validate_args=False).log_prob(z) + slope


def spec_of(site: Site, latent: Latent | None) -> Spec | str:
    """The static part of a term, or why it has no slots."""
    leaf = leaf_of(site["fn"])
    if len(leaf.dist.event_shape):
        return f"{type(leaf.dist).__name__} is no elementwise family"
    family = _family(leaf.dist)
    if family is None:
        return f"no slots for {type(leaf.dist).__name__}"
    if latent is not None and not _is_elementwise(latent):
        return "its bijector is not elementwise"
    is_location = family in LOCATION or (family is td.LogNormal and _is_log(latent))
    if is_location and latent is not None and family is not td.LogNormal and not _is_real(latent):
        return f"{family.__name__} prior on a bounded latent"
    shape = tuple(np.broadcast_shapes(site["value"].shape, leaf.dist.batch_shape))
    weight = torch.as_tensor(element_weight(site, leaf.inner), dtype=torch.float64)
    rows = int(np.prod(shape, dtype=int))
    flat = weight.expand(shape).reshape(rows).clone()
    value = None if latent is not None else site["value"].expand(shape).reshape(rows).to(torch.float64)
    if is_location:
        kept = td.Normal if family is td.LogNormal else family
        return Spec(site["name"], kept, (RESIDUAL, *LOCATION[kept]), shape, flat, value, latent)
    first = () if latent is None else (VALUE,)
    return Spec(site["name"], family, (*first, *GENERAL[family]), shape, flat, value, latent)


def read(spec: Spec, site: Site, u: Tensor | None) -> dict[str, Tensor]:
    """The slots of a term in one run, each shaped (rows,)."""
    fn = leaf_of(site["fn"]).dist
    found: dict[str, Tensor] = {}
    for name in spec.slots:
        if name == RESIDUAL:
            value = site["value"] if u is None else u
            found[name] = value - fn.loc
        elif name == VALUE:
            assert u is not None
            found[name] = u
        else:
            given = torch.as_tensor(getattr(fn, name), dtype=torch.float64)
            found[name] = given.log() if is_log(spec.family, name) else given
    return {name: slot.expand(spec.shape).reshape(-1) for name, slot in found.items()}


def _family(leaf: Any) -> type | None:
    for family in type(leaf).__mro__:
        if (family in LOCATION or family in GENERAL) and is_same_density(type(leaf), family):
            return family
    return None


def _is_elementwise(latent: Latent) -> bool:
    return all(part.domain.event_dim == 0 for part in plain_parts([latent.transform]))


def _is_real(latent: Latent) -> bool:
    return not plain_parts([latent.transform])


def _is_log(latent: Latent | None) -> bool:
    return latent is not None and [type(p) for p in plain_parts([latent.transform])] == [td.ExpTransform]
