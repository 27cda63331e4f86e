"""The moments of a model: found once, asked for log densities and for the M-step."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ...model.parameters import Parameter
from ...model.runtime import Execution
from ..weights import widened
from .coupled import Coupled, coupled_of
from .lift import Found, Live, Probe
from .moments import Moments, Total, Values
from .table import Monomial, Table
from .variables import generic
from .vectors import Search, is_vectors, known_means, may_be_covariance

Factors = Callable[[str, Values], dict[str, Tensor]]
Tables = dict[str, Table | Coupled]
Free = tuple[Callable[[Tensor], Tensor], Tensor]


@dataclass
class Matching:
    """Which parameters are moments of vectors, and what follows.

    Attributes:
        probe: runs the model.
        execute: the same, for its sites.
        latents: those that are no parameters.
        depth: dimensions that plates take.
        found: moments by the first parameter of their covariance, which stands for all of them.
        refused: why vectors with a matrix of parameters have none, by site.
    """

    probe: Probe
    execute: Callable[[Values], Execution]
    latents: Collection[str]
    depth: int
    found: dict[str, Moments] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def observed(
        self, run: Execution, parameters: Sequence[Parameter], free: Mapping[str, Free]
    ) -> dict[str, str]:
        """Look at observed vectors, and take their parameters out of the probe's variables; says why.

        Args:
            run: of the model.
            parameters: all of them.
            free: the bijector of each, and its start on the unconstrained scale.
        """
        seen = [name for name, site in run.sites.items() if site["is_observed"] and is_vectors(site)]
        self._search(run, seen, [p for p in parameters if "$$$" not in p.name], is_latent=False)
        names = sorted({name for moments in self.found.values() for name in moments.names})
        for name in names:
            self.probe.variables.pop(name, None)
            self.probe.base.pop(name, None)
            generator = self.probe.generator
            self.probe.others[name] = generic(*free[name], generator), generic(*free[name], generator)
        return dict.fromkeys(names, "its M-step is a match of moments")

    def priors(self, run: Execution, parameters: Sequence[Parameter], found: Found) -> None:
        """Look at latent vectors whose priors move with parameters that have no statistics."""
        sites = [n for n, c in found.codings.items() if c.variable.is_vector and n in found.live]
        self._search(run, sites, [p for p in parameters if p.name in found.refused], is_latent=True)

    def _search(
        self, run: Execution, sites: Sequence[str], parameters: Sequence[Parameter], is_latent: bool
    ) -> None:
        lengths = {run.sites[site]["value"].shape[-1] for site in sites}
        taken = {name for moments in self.found.values() for name in moments.names}
        own = [p for p in parameters if p.name not in taken and p.init.dim() and p.init.shape[-1] in lengths]
        free = {p.name: p for p in own}
        if not any(may_be_covariance(p) for p in own):
            return
        probe, generator = self.probe, self.probe.generator
        seen = {name: probe.moved_by(name) for name in free}
        points = [
            probe.values({n: v.random(generator) for n, v in probe.variables.items()}, other)
            for other in (0, 1)
        ]
        apart = self.execute({**points[0], **{name: points[1][name] for name in self.latents}})
        runs = [self.execute(point) for point in points]
        search = Search(runs, points, apart, free, seen, dict.fromkeys(sites, is_latent), self.depth)
        found = search.moments()
        self.found |= {moments.factors[0]: moments for moments in found}
        self.refused |= search.refusals(found)

    def closed(self, names: Collection[str], found: Found) -> list[str]:
        """Those whose parameters are all among some names, and whose sites are all tables."""
        return [
            n
            for n, m in self.found.items()
            if set(m.names) <= set(names) and found.tables.keys() >= {*m.sites}
        ]

    def of(self, name: str) -> Moments | None:
        """The moments that a site takes part in."""
        return next((m for m in self.found.values() if name in m.sites), None)

    def is_direct(self, name: str, live: Live | None) -> bool:
        """True if a site's coefficients at other parameters take no run of the model."""
        own = self.of(name)
        return own is not None and (own.loc is not None if live is None else own.is_direct)

    def notes(self, name: str) -> list[str]:
        """What the plan says of a site's vectors."""
        own = self.of(name)
        return [*([] if own is None else [own.note]), *filter(None, [self.refused.get(name)])]

    def prior(self, name: str, given: Values, now: Table | Coupled) -> Coupled:
        """A prior of vectors at parameters; without a run where these are its arguments themselves."""
        known = self.of(name)
        if known is None or known.loc is None:
            made = self.probe.vectors_of(name, given)
        else:
            variable = self.probe.variables[name]
            made = coupled_of(known.prior(given, variable.shape, float(now.scale)), variable)
        assert isinstance(made, Coupled)
        return made

    def direct(self, given: Values, tables: Tables, lives: Mapping[str, Live]) -> Iterator[tuple[str, Table]]:
        """Tables of sites whose log densities are functions of parameters alone, at other ones."""
        for moments in self.found.values():
            if not moments.is_direct or lives.keys().isdisjoint(moments.sites):
                continue
            for name, value in moments.densities(given).items():
                table = tables.get(name)
                if isinstance(table, Table):
                    grouping = lives[name].grouping
                    if grouping is not None:
                        value = grouping.added(value * widened(table.scale, table.inner))
                    yield name, replace(table, monomials=(Monomial((), value),))

    def best(
        self,
        moments: Moments,
        factors: Factors | None,
        phi: Values,
        theta: Values,
        weights: Values,
        total: Total,
    ) -> tuple[dict[str, Tensor], bool]:
        """Parameters of vectors at their best, and whether some stay where they are; see `Moments.best`."""
        q = {v.name: factors(v.name, phi) for v in moments.vectors if v.values is None} if factors else {}
        known: dict[str, Tensor] = {}
        if moments.loc is None:
            latents = {n: v for n, v in self.probe.values({}).items() if n in self.latents}
            run = self.execute({**latents, **theta})
            known = {v.name: known_means(run.sites[v.name], self.depth) for v in moments.vectors}
        return moments.best(theta, q, weights, known, total)
