"""The part of a bound that is a polynomial in expected statistics, with its natural gradients."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from ...errors import UnsupportedModelError
from ...model.density import sum_last
from ...model.parameters import Parameter
from ...model.prototype import Prototype
from .contraction import Factor, components, log_sum, seat
from .coupled import Coupled, coupled_of
from .elements import identities, impossible, pieces, possible
from .lift import Found, Pieces, Probe, grid_values, misfits
from .masked import Masked
from .matching import Factors, Matching, Tables
from .placing import lift_placed
from .table import Table, monomials_of
from .variables import Variable, generic, variables_of

LEVEL = 1e-9  # nats within which components are equal
Values = Mapping[str, Tensor]


class Lifted:
    """Closed-form terms of a problem: expectations of tables at expected statistics.

    Args:
        run: runs the model at parameters and latents.
        prototype: structure of the model.
        parameters: of the M-step.
        map_sites: latents whose values are parameters.
        held: parameters that no step moves.
        depth: dimensions that plates take.
        seed: of the probes.
    """

    def __init__(
        self,
        run: Callable[[Values, Values], Any],
        prototype: Prototype,
        parameters: Sequence[Parameter],
        map_sites: Collection[str],
        held: Values,
        depth: int,
        seed: int,
    ) -> None:
        self.map_sites, self.observed = tuple(map_sites), frozenset(prototype.observed)
        latent_names = {site.name for site in prototype.latents}
        start = {p.name: p.init.double() for p in parameters} | {s.name: s.init for s in prototype.latents}

        def execute(values: Values) -> Any:
            theta = {n: v for n, v in values.items() if n not in latent_names}
            return run({**held, **theta}, {n: values[n] for n in latent_names})

        def evaluate(values: Values, only: Collection[str] | None) -> Pieces:
            return possible(pieces(execute(values), depth, only), self.impossible)

        def vectors(variable: Variable, values: Values) -> Coupled | str:
            return coupled_of(execute(values).sites[variable.name], variable)

        first = run({**held, **{p.name: start[p.name] for p in parameters}}, start)
        known = pieces(first, depth)
        self.impossible = impossible(known)
        self.discrete = identities(first)
        self.plates = {
            self.discrete[name]: tuple(plate.dim for plate in plates)
            for name, plates in prototype.summed_out.items()
            if name in self.discrete
        }
        self.sizes = {n: [(p.dim, p.size) for p in plates] for n, plates in prototype.summed_out.items()}
        variables, refused = variables_of(prototype, first, parameters, self.map_sites)
        generator = torch.Generator().manual_seed(seed)
        free = {s.name: (s.transform, s.unconstrained) for s in prototype.latents}
        free |= {p.name: (transform_to(p.constraint), p.unconstrained) for p in parameters}
        others = {n: (generic(*free[n], generator), generic(*free[n], generator)) for n in refused}
        self.probe = Probe(evaluate, vectors, variables, others, generator)
        self.parameters = tuple(p.name for p in parameters) + self.map_sites
        self.latents = tuple(s.name for s in prototype.latents if s.name not in self.map_sites)
        self.matching = Matching(self.probe, execute, self.latents, depth)
        with torch.no_grad():
            refused |= self.matching.observed(first, parameters, free)
            self.found: Found = lift_placed(self.probe, refused, self.parameters, seed)
            self.matching.priors(first, parameters, self.found)
        self.masked = Masked.of(first, depth, self.plates) if self.latents else Masked()
        for name, reason in self.found.rest.items():
            if known[name].discrete:
                raise UnsupportedModelError(
                    f"site {name!r} depends on a discrete site and has no closed form: {reason} "
                    "(guide=MeanFieldNormal(model) needs none)"
                )
        self._live: tuple[Values, Tables] | None = None
        self._noise: dict[str, Tensor] = {}
        self._is_alone = False

    @property
    def names(self) -> frozenset[str]:
        """Sites whose factor is a table."""
        return frozenset(self.found.tables)

    @property
    def blocks(self) -> frozenset[str]:
        """Latents whose vectors have one factor each."""
        codings = self.found.codings.items()
        return frozenset(n for n, c in codings if c.layout.shape[1] > 1 and c.variable.is_latent)

    @property
    def singles(self) -> frozenset[str]:
        """Latent vectors whose elements have one factor each, though they are dependent a priori."""
        codings = self.found.codings.items()
        return frozenset(n for n, c in codings if c.layout.shape[1] == 1 and c.variable.is_vector)

    @property
    def runs_model(self) -> bool:
        """True if coefficients that move with parameters take runs of the model."""
        return any(not self.matching.is_direct(name, live) for name, live in self.found.live.items())

    @property
    def is_complete(self) -> bool:
        """True if every factor is a table, and every latent has statistics."""
        return not self.found.rest and not set(self.found.refused) & set(self.latents)

    def why_not(self) -> str:
        """The first reason why it is not complete."""
        reasons = self.found.rest or {n: r for n, r in self.found.refused.items() if n in self.latents}
        return next((f"{name}: {reason}" for name, reason in reasons.items()), "")

    def closed(self, names: Collection[str]) -> tuple[str, ...]:
        """Variables whose factors are all tables, and whose best value is known; keys of `Matching.found`."""
        rest = set(self.found.rest)
        return *(
            n
            for n, c in self.found.codings.items()
            if n in names and not c.failed and not rest & set(c.where)
            and (c.family.updated if n in self.latents else c.family.best) is not None
        ), *self.matching.closed(names, self.found)  # fmt: skip

    def proof(self, name: str) -> str:
        """What the plan says of a table."""
        table = self.found.tables[name]
        families = {n: self.found.codings[n].family.name for n in table.index}
        seen = ", ".join(f"{n} ({family})" for n, family in families.items()) or "no variable"
        text = f"affine in the statistics of {seen}{self.masked.note(name)}"
        if isinstance(table, Coupled):
            text = f"quadratic in the means of {seen}, whose elements have factors of their own"
        if name in self.found.live:
            text = f"{text}; coefficients move with parameters"
        return "; ".join([text, *self.matching.notes(name)])

    @property
    def inner(self) -> frozenset[str]:
        """Latents that a discrete site's own factor depends on: weights, which follow responsibilities."""
        tables = [self.found.tables[name] for name in self.discrete]
        return frozenset(n for table in tables for n in table.scope if n in self.latents)

    def batches(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """Variables in groups whose members share no table: each group moves at once."""
        groups: list[tuple[set[str], list[str]]] = []
        for name in names:
            tables = {t.name for t in self.found.tables.values() if name in t.index}
            if name in self.matching.found:
                tables = set(self.matching.found[name].sites)
            for used, members in groups:
                if not used & tables:
                    used |= tables
                    members.append(name)
                    break
            else:
                groups.append((tables, [name]))
        return [tuple(members) for _, members in groups]

    def statistics(self, factors: Factors | None, phi: Values, theta: Values) -> dict[str, Tensor]:
        """Expected statistics of the latents, and the statistics of the parameters.

        Args:
            factors: a site's name and phi to the parameters of its factor; None without latents.
            phi: the guide's parameters.
            theta: the model's.
        """
        return {
            name: self.statistic(name, factors(name, phi) if factors and name in self.latents else theta)
            for name in self.found.codings
        }

    def statistic(self, name: str, values: Values) -> Tensor:
        """A variable's statistics, from its factor's parameters or from theta."""
        coding = self.found.codings[name]
        if name not in self.latents:
            return coding.statistics(values[name])
        assert coding.family.expected is not None
        return coding.family.expected(coding.factor(values))

    def updated(
        self, name: str, eta: Tensor, now: Values, theta: Values, share: float = 1.0
    ) -> dict[str, Tensor]:
        """A latent's best factor at natural parameters; rows of dependent vectors go there by Newton.

        `share` is what the site's own terms are scaled by, which `eta` is not.
        """
        table, coding = self.tables(theta).get(name), self.found.codings[name]
        if isinstance(table, Coupled):
            return replace(table, scale=table.scale / share).updated(eta, now)
        assert coding.family.updated is not None
        return coding.family.updated(eta, now)

    def entropy(self, name: str, values: Values) -> Tensor:
        """Of a latent's factor with these parameters, in nats."""
        coding = self.found.codings[name]
        assert coding.family.entropy is not None
        inner = coding.family.entropy(coding.factor(values)).sum()
        return inner + coding.variable.unit.log().sum()

    def tables(self, theta: Values) -> Tables:
        """All tables, those whose coefficients move with parameters at these ones."""
        if not self.found.live:
            return self.found.tables
        given = {n: theta[n] for n in self.found.refused if n in self.parameters}
        needs_gradient = torch.is_grad_enabled() and any(v.requires_grad for v in given.values())
        if not needs_gradient and self._live is not None:
            known = self._live[0]
            if all(torch.equal(known[n], given[n]) for n in given):
                return self._live[1]
        made, lives = dict(self.found.tables), {n: v for n, v in self.found.live.items() if v is not None}
        for name in self.found.live.keys() - lives.keys():
            made[name] = self.matching.prior(name, given, made[name])
        direct = dict(self.matching.direct(given, made, lives))
        made |= direct
        scopes = {name: live.scope for name, live in lives.items() if name not in direct}
        for name, values in grid_values(self.probe, self.found, scopes, given).items():
            live, table = lives[name], made[name]
            assert isinstance(table, Table)
            codings = [self.found.codings[n] for n in live.scope]
            _, monomials = monomials_of(values, name, codings, live.kept)
            if live.grouping is not None:
                monomials = [replace(m, coefficient=live.grouping.added(m.coefficient)) for m in monomials]
            made[name] = replace(table, monomials=tuple(monomials))
        if not needs_gradient:
            self._live = {n: v.detach().clone() for n, v in given.items()}, made
        return made

    def expected(
        self,
        statistics: Values,
        theta: Values,
        only: Collection[str] | None = None,
        kept: dict[str, Tensor] | None = None,
        raised: Values | None = None,
    ) -> dict[str, Tensor]:
        """Every table's part of the bound without entropies, in nats.

        What is summed out together is one term, at its first observed site.

        Args:
            statistics: expected ones, by variable.
            theta: the model's parameters.
            only: variables; tables that none of them enters may be left out.
            kept: values of tables with discrete sites that none of them enters; filled on the way.
            raised: what is added to log densities of tables with discrete sites, by element.
        """
        found, factors, raised = {}, [], raised or {}
        for name, table in self.tables(theta).items():
            if isinstance(table, Table) and table.discrete:
                is_still = kept is not None and only is not None and table.scope.isdisjoint(only)
                factor = self._factor(table, statistics, kept if is_still else None)
                if name in raised:
                    factor = replace(factor, value=factor.value + sum_last(raised[name], table.inner))
                factors.append(factor)
                found[name] = torch.zeros((), dtype=torch.float64)
            elif only is None or not table.scope.isdisjoint(only):
                found[name] = table.value(statistics).sum()
        for members in components(factors):
            scopes = [self.found.tables[f.name].scope for f in members]
            is_wanted = only is None or any(not scope.isdisjoint(only) for scope in scopes)
            if is_wanted or any(f.name in raised for f in members):
                found[seat(members, self.observed)] = log_sum(members, self.plates)
        return found

    @contextmanager
    def noisy(self, size: float, generator: torch.Generator, is_alone: bool) -> Iterator[None]:
        """Random logits at each discrete site inside the block; alone, or added to what the factors say."""
        tables = self.found.tables
        shapes = {name: tables[name].shape[: -tables[name].inner or None] for name in self.discrete}
        self._noise = {
            name: size * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        self._is_alone = is_alone
        try:
            yield
        finally:
            self._noise = {}

    def _factor(self, table: Table, statistics: Values, kept: dict[str, Tensor] | None = None) -> Factor:
        known = None if kept is None else kept.get(table.name)
        value = sum_last(table.value(statistics).expand(table.shape), table.inner) if known is None else known
        value = self.masked.out(table, value)
        if kept is not None:
            kept[table.name] = value
        if self._noise:
            value = (value - value.detach() if self._is_alone else value) + self._noise.get(table.name, 0.0)
        if table.name in self.impossible:
            value = torch.where(self.impossible[table.name], -torch.inf, value)
        return Factor(table.name, value, table.discrete, table.scale)

    def slopes(
        self,
        names: Sequence[str],
        sites: Sequence[str],
        statistics: Values,
        theta: Values,
        kept: dict[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Derivatives of the expected log joint in some variables' statistics, and in sites' log densities.

        The second of sites with discrete ones only. Written out, or with discrete sites by autograd, where
        `kept` is as in `expected`.
        """
        tables = self.tables(theta)
        entered = [t for t in tables.values() if not t.scope.isdisjoint(names)]
        shapes = {n: t.shape for n in sites if isinstance(t := tables[n], Table) and t.discrete}
        if not (shapes or any(table.discrete for table in entered)):
            slopes = {name: [t.slope(name, statistics) for t in entered if name in t.scope] for name in names}
            return [sum(slopes[name], torch.zeros_like(statistics[name])) for name in names], {}
        leaves = {name: statistics[name].detach().requires_grad_() for name in names}
        raised = {n: torch.zeros(shape, dtype=torch.float64).requires_grad_() for n, shape in shapes.items()}
        with torch.enable_grad():
            terms = self.expected({**statistics, **leaves}, theta, names, kept, raised)
            total, parts = torch.stack(list(terms.values())).sum(), [*leaves.values(), *raised.values()]
            found = list(torch.autograd.grad(total, parts, materialize_grads=True))
        return found[: len(leaves)], dict(zip(raised, found[len(leaves) :], strict=True))

    def total(self, names: Sequence[str], statistics: Values, theta: Values) -> Tensor:
        """The part of the expected log joint that some variables enter."""
        return torch.stack(list(self.expected(statistics, theta, names).values())).sum()

    def responsibilities(self, statistics: Values, theta: Values) -> dict[str, Tensor]:
        """Marginal probabilities of each discrete site: (values, *plates)."""
        tables = self.tables(theta)
        factors = [
            self._factor(t, statistics) for t in tables.values() if isinstance(t, Table) and t.discrete
        ]
        values = [f.value.detach().clone().requires_grad_() for f in factors]
        with torch.enable_grad():
            made = [replace(f, value=v, scale=1.0) for f, v in zip(factors, values, strict=True)]
            sums = [log_sum(members, self.plates) for members in components(made)]
            marginals = torch.autograd.grad(torch.stack(sums).sum(), values) if sums else ()
        found = {}
        for factor, marginal in zip(factors, marginals, strict=True):
            if factor.name in self.discrete:
                others = [i for i, d in enumerate(factor.discrete) if d != self.discrete[factor.name]]
                value = marginal.sum(others) if others else marginal
                kept = self.plates[self.discrete[factor.name]]
                outer = [d for d in range(1 - value.dim(), 0) if d not in kept]
                found[factor.name] = value.sum(outer) if outer else value
        for name in set(self.discrete) - set(found):  # sites with one value
            sizes = [size for dim, size in self.sizes[name]]
            found[name] = torch.ones(1, *sizes, dtype=torch.float64)
        return found

    def are_level(self, statistics: Values, theta: Values) -> bool:
        """True if no observation tells the values of discrete sites apart: components are equal."""
        tables = [t for t in self.tables(theta).values() if t.discrete and t.name in self.observed]
        values = [table.value(statistics).expand(table.shape) for table in tables]
        return bool(values) and all(bool((value - value[:1]).abs().max() < LEVEL) for value in values)

    def drop(self, name: str, reason: str) -> None:
        """Take a table back: the factor is sampled from here on.

        Raises:
            UnsupportedModelError: where it depends on a discrete site.
        """
        if self.found.tables[name].discrete:
            raise UnsupportedModelError(
                f"site {name!r} depends on a discrete site, and {reason} "
                "(guide=MeanFieldNormal(model) needs no table)"
            )
        del self.found.tables[name]
        self.found.live.pop(name, None)
        self._live = None
        self.found.rest[name] = reason

    def misfits(self, values: Values) -> dict[str, float]:
        """Tables that differ from the model at values of all variables (a kink may lie between)."""
        u = {n: v.within(v.internal(values[n])) for n, v in self.probe.variables.items()}
        given = {n: values[n] for n in self.probe.others}
        return misfits(self.found, self.tables(values), u, self.probe.pieces(u, given))
