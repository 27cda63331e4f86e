"""The part of a bound that needs no draws: compiled terms at the moments of a Gaussian guide."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..guides.factorised import FactorisedNormal, normal_through
from ..model.parameters import Parameter
from ..model.runtime import Site
from ..model.sites import Latent
from .certificate import View
from .compiled.compile import Compiled, Variables
from .compiled.expect import ROUGHLY, SETTLED
from .compiled.linear import weighted_sum
from .compiled.moments import Moments
from .exact import ExactTerms
from .kl import lookup, negative_entropy
from .kl.entropy import normal_entropy
from .tables import PlanRow
from .terms import site_divergence
from .weights import same_weights

Values = Mapping[str, Tensor]


Factors = Callable[[Values], dict[str, tuple[Tensor, Tensor]]]
Flat = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def factors_of(problem: Any, guide: Any, views: Mapping[str, View], names: Collection[str]) -> Factors | None:
    """How to read a guide's factors off its parameters; None if it has no such factors.

    Ours says where they are; where an encoder makes them, or Pyro's AutoNormal does, the guide is
    run, at no particular noise.
    """
    if isinstance(guide, FactorisedNormal):
        free = [name for name in names if name not in guide.encoded]
        made = {name: name for name in guide.encoded}
    elif set(views) == set(names) and all(view.is_alone for view in views.values()):
        free, made = [], {name: view.auxiliary for name, view in views.items()}
    else:
        return None

    def factors(phi: Values) -> dict[str, tuple[Tensor, Tensor]]:
        found = {n: (phi[guide.loc_name(n)], phi[guide.scale_name(n)]) for n in free}
        sites = problem.run_guide(phi, {}).sites if made else {}
        return found | {name: _base_moments(sites[site]["fn"]) for name, site in made.items()}

    return factors


def _base_moments(fn: Any) -> tuple[Tensor, Tensor]:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.loc, fn.scale


class Deterministic(ExactTerms):
    """Compiled terms of a problem with a factorised Gaussian guide.

    Args:
        problem: model, guide and data (`pyro_vem.bound.objective.Problem`).
        latents: sites with a factor.
        factors: mean and standard deviation of each factor, on the unconstrained scale, from phi.
        parameters: of the M-step, those that are no MAP sites.
        map_sites: latents whose values are parameters.
        held: parameters that no step moves.
        seed: of the probes.
        flat: means of all variables and standard deviations of the latents, straight from the flat
            vectors of phi and theta; None where the guide's factors must be computed.
    """

    def __init__(
        self,
        problem: Any,
        latents: Mapping[str, Latent],
        factors: Factors,
        parameters: tuple[Parameter, ...],
        map_sites: tuple[Latent, ...],
        held: Values,
        seed: int,
        flat: Flat | None,
    ) -> None:
        self.factors = factors
        self.variables = Variables(
            latents, {p.name: p for p in parameters}, {site.name: site for site in map_sites}
        )
        self._flat = flat if self.variables.is_unconstrained else None
        self.shares = {name: problem.share(p.name for p in site.plates) for name, site in latents.items()}
        # Elements that the model masks out and never uses have no factor.
        used = {name: ~site.idle_in(site.unconstrained) for name, site in latents.items()}
        self.weights = {name: self.shares[name] * used[name].double() for name in latents}
        self.compiled = Compiled(problem.run_model, self.variables, held, seed, self.weights)
        self._weighted: tuple[frozenset[str], tuple[Tensor, Tensor]] | None = None
        self.priors = {name: p for name, p in self.compiled.constant.items() if self._has_divergence(name, p)}

    @property
    def names(self) -> frozenset[str]:
        """Rows of the plan that are compiled."""
        return frozenset(self.compiled.terms) | frozenset(self.priors)

    @property
    def refused(self) -> Mapping[str, str]:
        """Why the other rows are not compiled."""
        return self.compiled.refused

    @property
    def rough(self) -> Collection[str]:
        """Rows that were compiled, and found to differ from draws."""
        return self.compiled.rough

    @property
    def num_elements(self) -> int:
        """Densities that one draw costs."""
        return self.compiled.rows

    @property
    def is_small(self) -> bool:
        """True if the linear maps of all terms are matrices."""
        return self.compiled.merged.is_small

    @property
    def work(self) -> int:
        """Values of densities that one evaluation at nodes takes."""
        return self.compiled.work

    def begin_again(self) -> None:
        """As few nodes as at first."""
        self.compiled.begin_again()

    def shown(self, row: PlanRow) -> PlanRow:
        """A row of the plan with the method and the proof of its compiled term."""
        term = self.compiled.terms.get(row.site)
        if term is None or (row.kind == "KL" and row.method == "closed form" and term.is_alone):
            return row
        return replace(row, method=term.method, proof=term.proof)

    def refuse(self, name: str, reason: str) -> bool:
        """Sample a row from here on; False if it has no compiled term."""
        if name not in self.compiled.terms:
            return False
        self.compiled.refuse(name, reason, is_rough=True)
        return True

    def value(self, phi: Values, theta: Values) -> Tensor:
        """The sum of all compiled rows."""
        return self.total(self.moments(phi, theta))

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
        return {**p, "fn": fn, "scale": self.shares[name], "mask": mask}

    def moments(self, phi: Values, theta: Values) -> Moments:
        """Means and standard deviations of the guide's factors; parameters as means."""
        factors, parameters = self.factors(phi), self.variables.flat_theta(theta)
        names = list(self.variables.latents)
        locs = [factors[name][0].reshape(-1) for name in names]
        sds = [factors[name][1].reshape(-1) for name in names]
        centre = torch.cat([*locs, *(parameters[name] for name in list(self.compiled.where)[len(names) :])])
        return Moments(centre, torch.cat(sds), self.compiled.where, names)

    def flat_total(self, phi: Tensor, theta: Tensor) -> Tensor | None:
        """The sum of all compiled rows from flat vectors; None if they do not hold the moments."""
        if self._flat is None:
            return None
        names = list(self.variables.latents)
        return self.total(Moments(*self._flat(phi, theta), self.compiled.where, names))

    def terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Each compiled row's part of the ELBO, in nats."""
        moments = self.moments(phi, theta)
        found = {}
        for name, value in self.compiled.values(moments).items():
            if name in self.weights:  # a latent: E[log p] on the unconstrained scale, plus the entropy
                value = value + (self.weights[name] * normal_entropy(moments.scale[name])).sum()
            found[name] = value
        return found | self._divergences(moments)

    def total(self, moments: Moments) -> Tensor:
        """The sum of all compiled rows, with the terms of one family evaluated together."""
        parts = self.compiled.merged.values(moments)
        parts += self._divergences(moments).values()
        weight, constant = self._entropy_weights()
        parts += [weighted_sum(weight, moments.scale.flat.log()), constant]
        return torch.stack(parts).sum()

    def _entropy_weights(self) -> tuple[Tensor, Tensor]:
        """One weight for each latent element: zero where no compiled term of its own has the entropy.

        And the sum of entropies of sd one.
        """
        key = frozenset(self.compiled.terms)
        if self._weighted is None or self._weighted[0] != key:
            weight = torch.cat([w if n in key else torch.zeros_like(w) for n, w in self.weights.items()])
            self._weighted = key, (weight, (weight * normal_entropy(torch.ones_like(weight))).sum())
        return self._weighted[1]

    def _divergences(self, moments: Moments) -> dict[str, Tensor]:
        found = {}
        for name, p in self.priors.items():
            q = self._factor(name, p, moments.centre[name], moments.scale[name])
            found[name] = -site_divergence(q, p).sum()
        return found

    def refine(self, phi: Values, theta: Values, is_last: bool) -> bool:
        """Enough quadrature nodes for every term; True if something changed."""
        with torch.no_grad():
            return self.compiled.refine(self.moments(phi, theta), SETTLED if is_last else ROUGHLY)

    def recheck(self, phi: Values, theta: Values, seed: int) -> list[str]:
        """Names of terms that were refused because they differ from the model at draws of the guide."""
        with torch.no_grad():
            return self.compiled.recheck(self.moments(phi, theta), seed)
