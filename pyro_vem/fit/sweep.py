"""One sweep of closed-form updates: each factor or parameter at its best given the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..bound.lifted.moments import Moments
from ..bound.lifted.terms import LiftedTerms
from .setup import Setup
from .state import State, elbo_at

EDGE = 2.0**-40  # smallest probability that an M-step gives; 1 - EDGE is exact, as its logit has to be
POSITIVE = ("scale", "rate", "concentration", "concentration1", "concentration0")


class Sweep:
    """The values of both blocks while closed forms move them.

    Statistics are kept up to date one variable at a time, and so are the parts of the log joint
    that a repeated update does not touch.

    Args:
        setup: the problem.
        terms: its closed forms.
        phi: the guide's parameters where the sweep starts, constrained.
        theta: the model's.
        statistics: expected ones there, if they are known.
    """

    def __init__(
        self,
        setup: Setup,
        terms: LiftedTerms,
        phi: Mapping[str, Tensor],
        theta: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._setup, self._terms = setup, terms
        self.phi, self.theta = dict(phi), dict(theta)
        with torch.no_grad():
            self.statistics = dict(statistics or terms.statistics(self.phi, self.theta))
        self.singular: dict[str, None] = {}  # covariances that stayed, as their moments are singular
        self._kept: dict[str, Tensor] = {}
        has = setup.processes.has
        self._own = {site.name for site in setup.prototype.latents if has(site.plates)}

    @classmethod
    def at(cls, setup: Setup, terms: LiftedTerms, phi: Tensor, theta: Tensor) -> "Sweep":
        """A sweep from flat vectors."""
        return cls(setup, terms, setup.phi.constrained(phi), setup.theta_values(theta))

    @torch.no_grad()
    def update(self, batch: Sequence[str]) -> None:
        """Move some variables that share no table to their best values, moments of vectors among them."""
        lifted = self._terms.lifted
        names = [name for name in batch if name not in lifted.matching.found]
        moments = [lifted.matching.found[name] for name in batch if name in lifted.matching.found]
        sites = [name for own in moments for name in own.sites]
        natural, weights = lifted.slopes(names, sites, self.statistics, self.theta, self._kept)
        self.take(names, natural)
        for own in moments:
            self._match(own, weights)

    @torch.no_grad()
    def take(self, batch: Sequence[str], natural: Sequence[Tensor]) -> None:
        """The same with their natural parameters known; a pure function of what the sweep holds."""
        lifted, guide = self._terms.lifted, self._terms.guide
        for name, own in zip(batch, natural, strict=True):
            coding = lifted.found.codings[name]
            eta = own if name in self._own else self._setup.processes.total(own)
            if name in lifted.latents:
                assert guide is not None
                now = coding.factor(guide.factor_values(name, self.phi))
                made = coding.outside(lifted.updated(name, eta, now, self.theta, self._terms.shares[name]))
                self._move(name, made)
            else:
                value = self._best(name, eta)  # not a number where no row has an element of it
                self.theta[name] = torch.where(torch.isfinite(value), value, self.theta[name])
                self._moved(name, self.theta)

    def _match(self, moments: Moments, weights: Mapping[str, Tensor]) -> None:
        """Give vectors the mean and the covariance of their moments."""
        lifted, guide = self._terms.lifted, self._terms.guide
        factors = guide.factor_values if guide is not None else None
        total = self._setup.processes.total
        made, is_short = lifted.matching.best(moments, factors, self.phi, self.theta, weights, total)
        self.theta |= made
        self._kept = {}  # parameters may move coefficients
        if is_short:
            self.singular |= dict.fromkeys(moments.factors)

    @torch.no_grad()
    def level(self, batch: Sequence[str]) -> None:
        """Give all components of some simplexes one weight."""
        for name in batch:
            assert self._terms.guide is not None
            values = self._terms.guide.factor_values(name, self.phi)
            self._move(name, {key: torch.ones_like(value) for key, value in values.items()})

    @torch.no_grad()
    def flat(self) -> tuple[Tensor, Tensor]:
        """Where the sweep has come to: phi and theta."""
        return self._setup.phi.flat(self.phi), self._setup.theta.flat(self.theta)

    @torch.no_grad()
    def state(self) -> State:
        """The same as a state, with its bound; of known statistics, where they are all that it needs."""
        setup = self._setup
        phi, theta = (part.numpy() for part in self.flat())
        if setup.objective.rest.rows:
            return State(phi, theta, elbo_at(setup, phi, theta))
        own = self._terms.value(self.phi, self.theta, self.statistics)
        return State(phi, theta, float(setup.processes.total(own)))

    def _move(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give a factor new parameters, unless they lie outside their range."""
        guide = self._terms.guide
        assert guide is not None
        fine = [torch.isfinite(value).all() for value in values.values()]
        fine += [(value > 0).all() for key, value in values.items() if key in POSITIVE]
        now, is_fine = guide.factor_values(name, self.phi), torch.stack(fine).all()
        made = {key: torch.where(is_fine, value, now[key]) for key, value in values.items()}
        self.phi |= {guide.parameter_name(key, name): value for key, value in made.items()}
        self._moved(name, made)

    def _moved(self, name: str, values: Mapping[str, Tensor]) -> None:
        lifted = self._terms.lifted
        self.statistics[name] = lifted.statistic(name, values)
        for table in lifted.found.tables.values():
            if name in table.scope or name not in lifted.latents:  # parameters may move coefficients
                self._kept.pop(table.name, None)

    def _best(self, name: str, eta: Tensor) -> Tensor:
        coding = self._terms.lifted.found.codings[name]
        assert coding.family.best is not None
        u = coding.family.best(eta)
        u = coding.flat(u) if u.dim() == 2 else u
        if coding.variable.support == "simplex":
            u = u.reshape(-1, coding.variable.shape[-1]).clamp(min=EDGE)
            u = (u / u.sum(-1, keepdim=True)).reshape(-1)
        elif coding.variable.support == "unit":
            u = u.clamp(EDGE, 1 - EDGE)
        return coding.variable.placed(u)
