"""The part of a bound that needs no draws: compiled terms at the moments of a Gaussian guide."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..guides.factorised import FactorisedNormal, normal_through
from ..model.parameters import Parameter
from ..model.runtime import Site
from ..model.sites import Latent
from .compiled.compile import Compiled, Variables
from .compiled.expect import Moments
from .kl import lookup, negative_entropy
from .kl.entropy import normal_entropy
from .terms import site_divergence
from .weights import same_weights

Values = Mapping[str, Tensor]


class Deterministic:
    """Compiled terms of a problem with a factorised guide of ours.

    Args:
        problem: model, guide and data (`pyro_vem.bound.objective.Problem`).
        guide: the guide, its latents bound.
        parameters: of the M-step, those that are no MAP sites.
        map_sites: latents whose values are parameters.
        held: parameters that no step moves.
        seed: of the probes.
    """

    def __init__(
        self,
        problem: Any,
        guide: FactorisedNormal,
        parameters: tuple[Parameter, ...],
        map_sites: tuple[Latent, ...],
        held: Values,
        seed: int,
    ) -> None:
        self.problem, self.guide = problem, guide
        latents = {site.name: site for site in guide.latents()}
        self.variables = Variables(
            latents, {p.name: p for p in parameters}, {site.name: site for site in map_sites}
        )
        self.compiled = Compiled(problem.run_model, self.variables, held, seed)
        self.weights = {name: _entropy_weight(site) for name, site in latents.items()}
        self.priors = {name: p for name, p in self.compiled.constant.items() if self._has_divergence(name, p)}

    @property
    def names(self) -> frozenset[str]:
        """Rows of the plan that are compiled."""
        return frozenset(self.compiled.terms) | frozenset(self.priors)

    def _has_divergence(self, name: str, p: Site) -> bool:
        start = self.variables.latents[name].unconstrained
        q = self._factor(name, p, start, torch.ones_like(start))
        entry = lookup(q["fn"], p["fn"])
        is_right = entry is not None and not entry.is_bound
        return is_right and (same_weights(q, p) or negative_entropy(q["fn"]) is not None)

    def _factor(self, name: str, p: Site, loc: Tensor, scale: Tensor) -> Site:
        """The guide's record of a site, as its factor at given moments."""
        site = self.variables.latents[name]
        shape = site.unconstrained.shape
        fn = normal_through(site.transform, loc.reshape(shape), scale.reshape(shape), site.event_dim)
        mask = None if site.idle is None else ~site.idle
        return {**p, "fn": fn, "scale": 1.0, "mask": mask}

    def moments(self, phi: Values, theta: Values) -> Moments:
        """Means and standard deviations of the guide's factors; parameters as means."""
        centre, scale = self.variables.flat_theta(theta), {}
        encoded = self._encoded(phi) if self.guide.encoded else {}
        for name in self.variables.latents:
            if name in encoded:
                loc, sd = encoded[name]
            else:
                loc, sd = phi[self.guide.loc_name(name)], phi[self.guide.scale_name(name)]
            centre[name], scale[name] = loc.reshape(-1), sd.reshape(-1)
        return Moments(centre, scale)

    def _encoded(self, phi: Values) -> dict[str, tuple[Tensor, Tensor]]:
        sites = self.problem.run_guide(phi, {}).sites
        found = {}
        for name in self.guide.encoded:
            base = sites[name]["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            found[name] = (base.loc, base.scale)
        return found

    def terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Each compiled row's part of the ELBO, in nats."""
        moments = self.moments(phi, theta)
        found = {}
        for name, term in self.compiled.terms.items():
            value = term.expectation(moments)
            if name in self.weights:  # a latent: E[log p] on the unconstrained scale, plus the entropy
                value = value + (self.weights[name] * normal_entropy(moments.scale[name])).sum()
            found[name] = value
        for name, p in self.priors.items():
            q = self._factor(name, p, moments.centre[name], moments.scale[name])
            found[name] = -site_divergence(q, p).sum()
        return found

    def refine(self, phi: Values, theta: Values) -> bool:
        """Enough quadrature nodes for every term; True if something changed."""
        with torch.no_grad():
            return self.compiled.refine(self.moments(phi, theta))

    def recheck(self, phi: Values, theta: Values, seed: int) -> list[str]:
        """Names of terms that were refused because they differ from the model at draws of the guide."""
        with torch.no_grad():
            return self.compiled.recheck(self.moments(phi, theta), seed)


def _entropy_weight(site: Latent) -> Tensor:
    """One for each element of a factor, zero for those that the model masks out and never uses."""
    weight = torch.ones(site.unconstrained.shape, dtype=torch.float64)
    if site.idle is not None:
        idle = site.idle.reshape(site.idle.shape + (1,) * (weight.dim() - site.idle.dim()))
        weight = torch.where(idle, 0.0, weight)
    return weight.reshape(-1)
