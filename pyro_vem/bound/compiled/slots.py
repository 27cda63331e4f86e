"""Slots of a term: the few numbers a row that its log density is a function of.

A row is one scalar observation or one scalar latent. Location families have the residual
value - loc as a slot, so that a likelihood, a hierarchy and a random walk are the same case; positive
scale families have the log of value / scale (or of value * rate) likewise; other latents have their
unconstrained value; categories have slots of their own (`pyro_vem.bound.compiled.categories`); every
other argument is a slot on the log scale where it is positive, else as it stands.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from ...model.density import lean_log_prob
from ...model.parameters import is_elementwise, is_identity
from ...model.runtime import Site
from ...model.sites import Latent
from ...model.support import plain_parts
from ..kl.quadrature import softplus
from ..kl.table import is_same_density, leaf_of
from ..weights import element_weight
from .categories import (
    LOW,
    gap_slots,
    log_between,
    log_share,
    odds,
    odds_slots,
    ordered,
    ordered_slots,
)
from .links import arguments, is_linked, slot_of

# Families whose log density depends on value - loc only.
LOCATION: dict[type, tuple[str, ...]] = {
    td.Normal: ("scale",),
    td.Laplace: ("scale",),
    dist.AsymmetricLaplace: ("scale", "asymmetry"),
    td.Cauchy: ("scale",),
    dist.Logistic: ("scale",),
    td.Gumbel: ("scale",),
    td.StudentT: ("df", "scale"),
}
# Families of a positive value whose log density, on the log scale, depends on one log ratio and
# further arguments: sign * log value, plus log rate or minus log scale.
SCALED: dict[type, tuple[int, str, tuple[str, ...]]] = {
    td.HalfNormal: (1, "scale", ()),
    td.HalfCauchy: (1, "scale", ()),
    td.Exponential: (1, "rate", ()),
    td.Gamma: (1, "rate", ("concentration",)),
    dist.InverseGamma: (-1, "rate", ("concentration",)),
    td.Weibull: (1, "scale", ("concentration",)),
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
    dist.OrderedLogistic: ("predictor", "cut", "gap"),
    td.Categorical: (),  # as many as there are categories beside the first
    dist.BetaBinomial: ("total_count", "concentration1", "concentration0"),
    dist.ZeroInflatedPoisson: ("rate", "gate_logits"),
    dist.ZeroInflatedNegativeBinomial: ("total_count", "logits", "gate_logits"),
}
RENAMED: dict[type, type] = {dist.GammaPoisson: td.NegativeBinomial}  # the same density of other arguments
POSITIVE = frozenset(
    ["scale", "asymmetry", "df", "rate", "concentration", "concentration0", "concentration1", "total_count"]
)
RESIDUAL, RATIO, VALUE = "residual", "log ratio", "value"
OF_VALUES = (RESIDUAL, RATIO, VALUE)  # slots that are no argument
UNLIKE = "its family or shape changes with latents or parameters"
CHANGES = (
    "its scale or mask depends on latents or parameters",
    "its observed value depends on latents or parameters",
)


def is_log(family: type, name: str) -> bool:
    """True if a slot is the log of the argument; a Binomial may have rows without a trial."""
    return name in POSITIVE and not (family in (td.Binomial, dist.BetaBinomial) and name == "total_count")


@dataclass(frozen=True)
class Spec:
    """The part of a term that does not change: family, rows, weights, data.

    Attributes:
        family: class that the density is rebuilt from.
        slots: names of the slots, in order.
        shape: shape of the rows before they are flattened.
        weight: scale times mask of each row, flat.
        value: the observed value of each row, flat (inf for the highest of ordered categories); None for a
            latent.
        latent: the latent site of the rows; None for data.
        is_log: whether a residual is one of log values.
        hidden: what stands in for the values of data of weight zero, wherever those are.
        cutpoints: their number, of ordered categories.
    """

    name: str
    family: type
    slots: tuple[str, ...]
    shape: tuple[int, ...]
    weight: Tensor
    value: Tensor | None
    latent: Latent | None
    is_log: bool = False
    hidden: Tensor | None = None
    cutpoints: int = 0

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """What is added to the density of the logs of data, to make it the density of the data."""
        if self.is_log and self.value is not None:
            return -self.value.log()
        return torch.zeros((), dtype=torch.float64)

    @property
    def is_bounded(self) -> bool:
        """True for a latent whose density has a Jacobian on the unconstrained scale."""
        return self.latent is not None and not is_identity(self.latent.transform)

    def argument(self, name: str, slot: Tensor) -> Tensor:
        """The argument of the density that a slot stands for."""
        return slot.exp() if is_log(self.family, name) else slot

    def _arguments(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        usual = {name: slot for name, slot in slots.items() if not is_linked([name])}
        return {name: self.argument(name, slot) for name, slot in usual.items()} | arguments(slots)

    def is_like(self, site: Site) -> bool:
        """False if the family or the shape is another one in a run."""
        family = td.LogNormal if self.is_log and self.family is td.Normal else self.family
        return _family(leaf_of(site["fn"]).dist) is family and _shape(site) == self.shape

    def changes(self, site: Site) -> Tensor:
        """Which of `CHANGES` differ in a run that is like this one, also in one of many under vmap."""
        is_reweighted = _weight(site, self.shape) != self.weight
        is_used = self.slots[0] != RESIDUAL or self.is_log  # other than in a slot
        if not is_used or self.value is None:
            return torch.stack([is_reweighted.any(), torch.tensor(False)])
        value = _observed(site, self.shape, self.cutpoints)
        is_same = (value == self.value) | (value.isnan() & self.value.isnan()) | (self.weight == 0)
        return torch.stack([is_reweighted.any(), ~is_same.all()])

    def log_density(self, eta: Mapping[str, Tensor]) -> Any:
        """Log density of each row at given slots, (..., rows); with the Jacobian for a latent."""
        args = self._arguments({name: eta[name] for name in self.slots if name not in OF_VALUES})
        if self.slots[0] == RESIDUAL:
            residual = eta[RESIDUAL]
            fn = self.family(loc=torch.zeros_like(residual), validate_args=False, **args)
            return fn.log_prob(residual) + self.jacobian
        if self.slots[0] == RATIO:
            return _log_ratio_density(self.family, eta[RATIO], args) + self.jacobian
        if self.family is dist.OrderedLogistic:
            assert self.value is not None
            if LOW in self.slots:
                return log_between(self.value, eta)
            below = eta["predictor"] - eta["cut"]
            return ordered(self.value, eta["gap"], softplus(below), softplus(-below - eta["gap"]))
        if self.family is td.Categorical:
            assert self.value is not None
            return log_share(self.value, {name: eta[name] for name in self.slots})
        if self.value is not None:
            return lean_log_prob(self.family(**args, validate_args=False), self.value)
        assert self.latent is not None
        u = eta[VALUE]
        z, slope = u, torch.zeros_like(u)
        for part in plain_parts([self.latent.transform]):
            image = part(z)
            slope = slope + part.log_abs_det_jacobian(z, image)
            z = image
        return lean_log_prob(self.family(**args, validate_args=False), z) + slope


def changes_of(
    specs: Mapping[str, Spec], sites: Mapping[str, Site], _: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`Spec.changes` of each term in a run, wherever that is; none where it is not like the others at all."""
    none = torch.zeros(len(CHANGES), dtype=torch.bool)
    return {n: s.changes(sites[n]) if s.is_like(sites[n]) else none for n, s in specs.items()}


def _log_ratio_density(family: type, r: Tensor, args: Mapping[str, Tensor]) -> Tensor:
    """Log density of the log of a value at scale (or rate) 1."""
    if family is td.HalfNormal:
        return 0.5 * math.log(2 / math.pi) + r - 0.5 * torch.exp(2 * r)
    if family is td.HalfCauchy:
        return math.log(2 / math.pi) + r - softplus(2 * r)
    if family is td.Exponential:
        return r - r.exp()
    shape = args["concentration"]
    if family is td.Weibull:
        return shape.log() + shape * r - torch.exp(shape * r)
    return shape * r - torch.lgamma(shape) - r.exp()


def spec_of(site: Site, latent: Latent | None) -> Spec | str:
    """The static part of a term, or why it has no slots."""
    leaf = leaf_of(site["fn"])
    if len(leaf.dist.event_shape):
        return f"{type(leaf.dist).__name__} is no elementwise family"
    family = _family(leaf.dist)
    if family is None:
        return f"no slots for {type(leaf.dist).__name__}"
    if latent is not None and not is_elementwise(latent.transform):
        return "its bijector is not elementwise"
    shape = _shape(site)
    flat = _weight(site, shape).clone()
    cutpoints = leaf.dist.cutpoints.shape[-1] if family is dist.OrderedLogistic else 0
    value, hidden = None, None
    if latent is None:
        value = _observed(site, shape, cutpoints)
        hidden = _hidden(leaf.dist, value, flat)
        value = value if hidden is None else torch.where(flat == 0, hidden, value)
    if latent is not None and leaf.dist.support.is_discrete:
        return "a discrete latent"
    is_positive = _is_log(latent) if value is None else bool((value > 0).all())

    def spec(family: type, slots: tuple[str, ...], is_log: bool = False) -> Spec:
        return Spec(site["name"], family, slots, shape, flat, value, latent, is_log, hidden, cutpoints)

    if family is td.LogNormal and is_positive:
        return spec(td.Normal, (RESIDUAL, "scale"), is_log=True)
    if family in LOCATION:
        if latent is not None and not is_identity(latent.transform):
            return f"{family.__name__} prior on a bounded latent"
        return spec(family, (RESIDUAL, *LOCATION[family]))
    if family in SCALED and is_positive:
        return spec(family, (RATIO, *SCALED[family][2]), is_log=True)
    if family is td.Categorical:
        found = odds(leaf.dist)
        return found if isinstance(found, str) else spec(family, found)
    first = () if latent is None else (VALUE,)
    return spec(family, (*first, *GENERAL[family]))


def _shape(site: Site) -> tuple[int, ...]:
    """Of the rows of a term."""
    return tuple(np.broadcast_shapes(site["value"].shape, leaf_of(site["fn"]).dist.batch_shape))


def _weight(site: Site, shape: tuple[int, ...]) -> Tensor:
    """Scale times mask of each row, flat."""
    weight = element_weight(site, leaf_of(site["fn"]).inner)
    return torch.as_tensor(weight, dtype=torch.float64).expand(shape).reshape(-1)


def _observed(site: Site, shape: tuple[int, ...], cutpoints: int) -> Tensor:
    """The observed value of each row, flat; of ordered categories inf for the highest."""
    value: Tensor = site["value"].expand(shape).reshape(-1).to(torch.float64)
    return torch.where(value >= cutpoints, torch.inf, value) if cutpoints else value


def _hidden(fn: Any, value: Tensor, weight: Tensor) -> Tensor | None:
    """A value with a finite density in every row, for those of weight zero; None if there are none.

    Weight zero times an infinite density, at the edge of a support, would be nan.
    """
    kept = value[weight != 0]
    if len(kept) == len(value):
        return None
    if fn.support.is_discrete:  # zero: a row may have fewer trials than another's successes
        return torch.zeros((), dtype=torch.float64)
    return kept[0] if len(kept) else torch.tensor(0.5, dtype=torch.float64)


def read(spec: Spec, site: Site, u: Tensor | None) -> dict[str, Tensor]:
    """The slots of a term in one run, each shaped (rows,)."""
    fn = leaf_of(site["fn"]).dist
    found: dict[str, Tensor] = {}
    observed = site["value"]
    if spec.hidden is not None:
        observed = torch.where(spec.weight.reshape(spec.shape) == 0, spec.hidden, observed)
    if spec.family is dist.OrderedLogistic:
        found = (gap_slots if LOW in spec.slots else ordered_slots)(fn, observed, spec.shape)
    elif spec.family is td.Categorical:
        found = odds_slots(fn, spec.shape)
    for name in spec.slots if not found else ():
        if name == RESIDUAL:
            value = observed if u is None else u
            found[name] = (value.log() if spec.is_log and u is None else value) - fn.loc
        elif name == RATIO:
            sign, scale, _ = SCALED[spec.family]
            value = observed.to(torch.float64).log() if u is None else u
            log_scale = torch.as_tensor(getattr(fn, scale), dtype=torch.float64).log()
            found[name] = sign * value + (log_scale if scale == "rate" else -log_scale)
        elif name == VALUE:
            assert u is not None
            found[name] = u
        elif is_linked([name]):
            found[name] = slot_of(fn, name)
        else:
            given = torch.as_tensor(_argument(fn, name), dtype=torch.float64)
            found[name] = given.log() if is_log(spec.family, name) else given
    return {name: slot.expand(spec.shape).reshape(-1) for name, slot in found.items()}


def _argument(fn: Any, name: str) -> Any:
    if isinstance(fn, dist.GammaPoisson):
        return fn.concentration if name == "total_count" else -fn.rate.log()
    return getattr(fn, name)


def _family(leaf: Any) -> type | None:
    for family in type(leaf).__mro__:
        known = RENAMED.get(family, family)
        if (known in LOCATION or known in GENERAL) and is_same_density(type(leaf), family):
            return known
    return None


def _is_log(latent: Latent | None) -> bool:
    return latent is not None and [type(p) for p in plain_parts([latent.transform])] == [td.ExpTransform]
