"""Finding closed forms in an ordinary model: is its log joint affine in each site's statistics?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..weights import widened
from .coupled import Coupled
from .elements import Piece
from .families import Family
from .index import CHECK, Index, Run, coded_index, simplex_index
from .table import (
    ROUNDING,
    Grouping,
    Monomial,
    Rows,
    Table,
    grid_of,
    grouping,
    in_rows,
    monomials_of,
    narrowed,
)
from .variables import LEVELS, Coding, Variable, families_of

MOST_RUNS = 600  # of the model, for one factor
Pieces = dict[str, Piece]
Evaluate = Callable[[Mapping[str, Tensor], Collection[str] | None], Pieces]
"""Values of all latents and parameters -> the log density of every site, or of those that are wanted."""
Vectors = Callable[[Variable, Mapping[str, Tensor]], Coupled | str]
"""A variable and values of all -> its prior of vectors as a quadratic, or why it is none."""


@dataclass
class Probe:
    """Runs of a model at chosen values; what is not chosen stands at generic ones.

    Attributes:
        evaluate: log densities at values.
        vectors: priors of vectors at values.
        variables: those that may have statistics.
        others: two values each of those that cannot.
    """

    evaluate: Evaluate
    vectors: Vectors
    variables: dict[str, Variable]
    others: dict[str, tuple[Tensor, Tensor]]
    generator: torch.Generator
    base: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = {name: v.random(self.generator) for name, v in self.variables.items()}

    def pieces(
        self,
        u: Mapping[str, Tensor],
        given: Mapping[str, Tensor] | None = None,
        only: Collection[str] | None = None,
    ) -> Pieces:
        """The log densities at flat internal values of variables, and at given values of others."""
        return self.evaluate({**self.values(u), **(given or {})}, only)

    def vectors_of(self, name: str, given: Mapping[str, Tensor] | None = None) -> Coupled | str:
        """A variable's prior of vectors, at given values of others."""
        return self.vectors(self.variables[name], {**self.values({}), **(given or {})})

    def values(self, u: Mapping[str, Tensor], other: int = 0) -> dict[str, Tensor]:
        """Values of everything, where variables stand at u; `other` chooses those of the rest."""
        values = {name: v.placed(u.get(name, self.base[name])) for name, v in self.variables.items()}
        return {**values, **{name: pair[other] for name, pair in self.others.items()}}

    def along(self, name: str) -> Run:
        """The factors as a function of one variable."""

        def run(u: Tensor, only: Collection[str] | None = None) -> dict[str, Tensor]:
            return {factor: piece.value for factor, piece in self.pieces({name: u}, only=only).items()}

        return run

    def moved_by(self, name: str) -> set[str]:
        """Factors that see a variable or another one."""
        first = self.pieces({})
        if name in self.others:
            second = self.pieces({}, {name: self.others[name][1]})
        else:
            second = self.pieces({name: self.variables[name].random(self.generator)})
        return {factor for factor in first if not torch.equal(first[factor].value, second[factor].value)}


@dataclass(frozen=True)
class Live:
    """How to compute the coefficients of a factor anew: they are functions of parameters.

    Attributes:
        scope: its variables.
        kept: its monomials.
        grouping: of its elements; None if a discrete site must see each of them.
    """

    scope: tuple[str, ...]
    kept: tuple[tuple[int, ...], ...]
    grouping: Grouping | None


@dataclass
class Found:
    """What probing has found.

    Attributes:
        codings: variables with statistics.
        refused: latents and parameters without, with the reason.
        tables: factors as polynomials in statistics, and priors of vectors under independent factors.
        rest: factors that are none, with the reason.
        live: factors whose coefficients move with parameters that have no statistics; None for a
            prior of vectors.
    """

    codings: dict[str, Coding]
    refused: dict[str, str]
    tables: dict[str, Table | Coupled] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)
    live: dict[str, Live | None] = field(default_factory=dict)


def lift(probe: Probe, refused: Mapping[str, str], parameters: Sequence[str], seed: int) -> Found:
    """Code every variable, then tabulate every factor, then check all of it at random points.

    Args:
        probe: runs the model.
        refused: why the probe's others have no statistics.
        parameters: those of all names that are no latents.
        seed: of the codes.
    """
    found = Found({}, dict(refused))
    for variable in list(probe.variables.values()):
        if variable.name in found.refused:
            continue
        coding = _coding(probe, variable, seed)
        if variable.is_tied and (isinstance(coding, str) or coding.failed):
            coding = _coupled(probe, found, variable, parameters, seed) or coding
        if isinstance(coding, str):
            found.refused[variable.name] = coding
        elif coding.failed and not variable.is_latent:  # of a latent the rest can be sampled
            factor, reason = next(iter(coding.failed.items()))
            found.refused[variable.name] = f"{factor}: {reason}"
        else:
            found.codings[variable.name] = coding
            probe.variables[variable.name] = coding.variable
    _tabulate(probe, found, parameters)
    _check(probe, found)
    return found


def _coding(probe: Probe, variable: Variable, seed: int) -> Coding | str:
    """The layout and the family that the fewest factors refuse."""
    best: Coding | None = None
    if variable.support == "simplex":
        size = variable.shape[-1]
        index = simplex_index(probe.along(variable.name), variable.size // size, size, seed)
        layout = torch.arange(variable.size).unsqueeze(-1)
        failed = dict.fromkeys(index.several, "not affine in the log of one component")
        return Coding(variable, variable.families[0], layout, index.where, failed)
    for layout in variable.layouts():
        index = coded_index(probe.along(variable.name), layout, _levels(variable, layout), seed)
        for family in families_of(variable, layout):
            coding = _tried(probe, variable, family, layout, index)
            if best is None or len(coding.failed) < len(best.failed):
                best = coding
            if not best.failed:
                return best
    return best or "its elements are tied together"


def _coupled(
    probe: Probe, found: Found, variable: Variable, parameters: Sequence[str], seed: int
) -> Coding | None:
    """Vectors by single elements, with their own prior as a quadratic; None if that fails too."""
    name, variable = variable.name, variable.with_one_unit()
    movers = [v for v in (*probe.variables, *probe.others) if v != name and name in probe.moved_by(v)]
    if any(v not in parameters for v in movers):
        return None
    before, probe.variables[name] = probe.variables[name], variable
    layout = torch.arange(variable.size).unsqueeze(-1)
    index = coded_index(probe.along(name), layout, _levels(variable, layout), seed)
    for family in variable.families:
        coding = _tried(probe, variable, family, layout, index)
        if set(coding.failed) <= {name}:
            probe.variables[name] = coding.variable
            table = probe.vectors_of(name)
            if isinstance(table, str):
                break
            found.tables[name] = table
            found.refused |= {v: f"it moves the prior of {name}" for v in movers}
            if movers:
                found.live[name] = None
            return replace(coding, failed={})
    probe.variables[name] = before
    return None


def _levels(variable: Variable, layout: Tensor) -> Tensor:
    levels = torch.tensor(LEVELS[variable.support], dtype=torch.float64).unsqueeze(-1)
    members = torch.arange(layout.shape[1])
    if variable.support == "real":
        return levels * (1 + 0.31 * members) + 0.17 * members.square() * levels.square()
    return levels.expand(-1, layout.shape[1])


def _tried(probe: Probe, variable: Variable, family: Family, layout: Tensor, index: Index) -> Coding:
    """Hold the factors against an affine function of a family's statistics."""
    if not family.has_unit:
        variable = variable.without_unit()
    before = probe.variables[variable.name]
    probe.variables[variable.name] = variable
    run, groups, support = probe.along(variable.name), len(layout), variable.support
    two = torch.tensor(LEVELS[support][:2], dtype=torch.float64)
    checks = 0.7 * two.unsqueeze(-1).expand(-1, layout.shape[1])
    checks = checks * (1 - 0.13 * torch.arange(layout.shape[1]))
    points = torch.cat([family.probes, checks])
    failed = dict.fromkeys(index.several, "an element of it depends on several elements")
    coding, design = Coding(variable, family, layout, index.where, failed), family.design(checks)
    runs = [run(coding.flat(point.expand(groups, -1)), index.where) for point in points]
    num = family.num + 1
    for name in index.where:
        values = torch.stack([r[name] for r in runs])
        table = coding.solved(values[:num], index.where[name])
        size = 1 + torch.tensordot(design.abs(), table.abs(), ([1], [0]))
        error = (torch.tensordot(design, table, ([1], [0])) - values[num:]).abs() / size
        if not bool((error <= CHECK).all()):
            failed[name] = f"not affine in the statistics of {family.name}"
    probe.variables[variable.name] = before
    return coding


def _tabulate(probe: Probe, found: Found, parameters: Sequence[str]) -> None:
    """Coefficients of every factor, from runs on the grid of its variables' probes."""
    first = probe.pieces({})
    scopes = {n: tuple(v for v, c in found.codings.items() if n in c.where) for n in first}
    seen = {name: probe.moved_by(name) for name in found.refused}
    for name in first:
        if name in found.tables:
            continue
        reasons = [c.failed[name] for c in found.codings.values() if name in c.failed]
        reasons += [
            f"depends on {other}: {why}"
            for other, why in found.refused.items()
            if other not in parameters and name in seen[other]
        ]
        runs = len(grid_of([found.codings[n] for n in scopes[name]]))
        if runs > MOST_RUNS:
            reasons.append(f"{runs:,} runs of the model would be needed")
        if reasons:
            found.rest[name] = reasons[0]
    names = [name for name in first if name not in found.rest and name not in found.tables]
    values = grid_values(probe, found, {name: scopes[name] for name in names})
    for name in names:
        is_live = any(name in seen[other] for other in found.refused)
        found.tables[name], live = _table(found, name, first[name], scopes[name], values.pop(name))
        if is_live:
            found.live[name] = live


def grid_values(
    probe: Probe,
    found: Found,
    scopes: Mapping[str, tuple[str, ...]],
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Factors at all combinations of the probes of their variables, (m_1, ..., m_r, *elements)."""
    wanted: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, scope in scopes.items():
        for powers in grid_of([found.codings[n] for n in scope]):
            wanted.setdefault(tuple(zip(scope, powers, strict=True)), []).append(name)
    values: dict[str, list[Tensor]] = {name: [] for name in scopes}
    for key, names in wanted.items():
        run = probe.pieces({n: found.codings[n].at_probe(power) for n, power in key}, given, names)
        for name in names:
            values[name].append(weighed(run[name]))
    sizes = {name: [found.codings[n].family.num + 1 for n in scope] for name, scope in scopes.items()}
    return {name: torch.stack(rows).reshape((*sizes[name], *rows[0].shape)) for name, rows in values.items()}


def weighed(piece: Piece) -> Tensor:
    """The elements, times the scale where no discrete site has to see them without it."""
    if piece.discrete or (isinstance(piece.scale, float | int) and piece.scale == 1):
        return piece.value
    value: Tensor = piece.value * widened(piece.scale, piece.inner)
    return value


def _table(
    found: Found, name: str, piece: Piece, scope: tuple[str, ...], values: Tensor
) -> tuple[Table, Live]:
    index = {n: found.codings[n].where[name] for n in scope}
    shape = tuple(values.shape[len(scope) :])
    kept, monomials = monomials_of(values, name, [found.codings[n] for n in scope], None)
    groups: Grouping | None = None
    entries: dict[str, Tensor | Rows | None] = {}
    if piece.discrete:
        noise = ROUNDING * float(values.abs().amax())
        entries |= {n: in_rows(narrowed(i), len(found.codings[n].layout)) for n, i in index.items()}
        monomials = [Monomial(m.powers, narrowed(m.coefficient, noise)) for m in monomials]
    else:
        groups, kept_index = grouping(index, shape)
        entries |= {n: _in_order(i, len(found.codings[n].layout)) for n, i in kept_index.items()}
        monomials = [Monomial(m.powers, groups.added(m.coefficient)) for m in monomials]
    table = Table(name, entries, tuple(monomials), shape, piece.discrete, piece.scale, piece.inner)
    return table, Live(scope, tuple(kept), groups)


def _in_order(index: Tensor, groups: int) -> Tensor | None:
    """None for an index that is all groups in order: nothing need be gathered."""
    return None if len(index) == groups and torch.equal(index, torch.arange(groups)) else index


def _check(probe: Probe, found: Found) -> None:
    """Hold every table against the model where all variables are random, each element by itself."""
    for _ in range(2):
        u = {name: v.random(probe.generator) for name, v in probe.variables.items()}
        seen = {n: u[n] for n in u if n in found.codings}  # others stand where coefficients were solved
        for name, error in misfits(found, found.tables, u, probe.pieces(seen)).items():
            del found.tables[name]
            found.live.pop(name, None)
            found.rest[name] = f"its table is {error:.1g} off at random values"


def misfits(
    found: Found, tables: Mapping[str, Table | Coupled], u: Mapping[str, Tensor], pieces: Pieces
) -> dict[str, float]:
    """Tables that differ from the model at given values, and by how much of their terms' size."""
    statistics = {n: c.family.statistics(c.grouped(u[n])) for n, c in found.codings.items()}
    wrong = {}
    for name, table in tables.items():
        value, size = table.value(statistics), 1 + table.size(statistics)
        exact = weighed(pieces[name])
        if not table.discrete:
            value, exact, size = value.sum(), exact.sum(), size.sum()
        error = float(((value - exact).abs() / size).max())
        if not error <= CHECK:
            wrong[name] = error
    return wrong
