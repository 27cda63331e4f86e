"""Terms that run the model but see few numbers of the guide's noise: a tensor grid over those."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.checks import SingularMatrix
from .compiled.forms import gauss_hermite
from .compiled.nodes import tensor_grid
from .draws import NoiseSpec, independent_noise
from .tables import Plan

Rows = Callable[[Plan, dict[str, Tensor]], dict[str, Tensor]]
"""Each row's value at a batch of noise, (points,) by site."""

MOST_DIMENSIONS = 3
FIRST_NODES = 8
MOST_POINTS, MOST_NODES = 4096, 128  # of a grid: runs of the model, and nodes of a dimension
MOST_SITES = 64  # of the guide, whose noise is varied one site at a time
SETTLED = 1e-8  # change of a row, relative, on doubling its nodes


@dataclass(frozen=True)
class Batch:
    """Rows of the plan that are evaluated together.

    Attributes:
        plan: the rows.
        scope: guide sites whose noise they see; empty where none is.
        nodes: of the grid in each dimension; 0 for fixed draws.
        steady: rows among them that no noise enters.
    """

    plan: Plan
    scope: tuple[str, ...] = ()
    nodes: int = 0
    steady: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Sites of the rows."""
        return tuple(row.site for row in self.plan.rows)


def scopes(
    places: Sequence[Rows], plan: Plan, specs: Sequence[NoiseSpec], generator: torch.Generator
) -> dict[str, tuple[str, ...]]:
    """Guide sites whose noise each row of a plan changes with, by site; found by redrawing them.

    What a row sees at one place may be hidden at another: a loading that starts at zero hides
    what it loads on.
    """
    found = [_scopes(rows, plan, specs, generator) for rows in places]
    names = [spec.name for spec in specs]
    return {
        row.site: tuple(name for name in names if any(name in scope[row.site] for scope in found))
        for row in plan.rows
    }


def _scopes(
    rows: Rows, plan: Plan, specs: Sequence[NoiseSpec], generator: torch.Generator
) -> dict[str, tuple[str, ...]]:
    here, there = (
        {name: value[0] for name, value in independent_noise(specs, 1, generator).items()} for _ in range(2)
    )
    points = [here, there]
    if len(specs) <= MOST_SITES:
        points += [{**here, spec.name: there[spec.name]} for spec in specs]
    found = rows(plan, {name: torch.stack([point[name] for point in points]) for name in here})
    result = {}
    for name, values in found.items():
        changed = [not torch.equal(values[0], value) for value in values]
        is_steady = not any(changed)
        one_by_one = tuple(spec.name for spec, c in zip(specs, changed[2:], strict=False) if c)
        all_of_them = tuple(spec.name for spec in specs)
        result[name] = () if is_steady else one_by_one if len(specs) <= MOST_SITES else all_of_them
    return result


def grid(specs: Iterable[NoiseSpec], scope: tuple[str, ...], n: int) -> tuple[dict[str, Tensor], Tensor]:
    """A tensor grid of n nodes over the noise of some sites, zero elsewhere; and its weights.

    Example:
        >>> noise, weights = grid([NoiseSpec("z", (), (2,), ()), NoiseSpec("w", (), (), ())], ("z",), 4)
        >>> noise["z"].shape, noise["w"].shape, bool((weights @ noise["z"] ** 2 - 1).abs().max() < 1e-9)
        (torch.Size([16, 2]), torch.Size([16]), True)
    """
    specs = list(specs)
    dimensions = sum(spec.size for spec in specs if spec.name in scope)
    nodes, weights = tensor_grid(gauss_hermite(n), dimensions)
    noise, start = {}, 0
    for spec in specs:
        if spec.name in scope:
            noise[spec.name] = nodes[:, start : start + spec.size].reshape(-1, *spec.shape)
            start += spec.size
        else:
            noise[spec.name] = torch.zeros(len(nodes), *spec.shape, dtype=torch.float64)
    return noise, weights


def split(
    places: Sequence[Rows],
    plan: Plan,
    specs: Sequence[NoiseSpec],
    generator: torch.Generator,
    rough: Collection[str],
) -> tuple[Batch, ...]:
    """The rows of a plan by how they are evaluated: at any noise, on grids, on draws.

    Rows that no noise enters go with the draws, where there are any: they cost nothing there.

    Args:
        places: the rows at the present parameters, and at others.
        plan: which rows.
        specs: the noise of each guide site.
        generator: of the noise that shows what rows see.
        rough: sites whose rows are drawn.
    """
    rows = places[0]
    sizes = {spec.name: spec.size for spec in specs}
    by_scope: dict[tuple[str, ...], list[str]] = {}
    for name, scope in scopes(places, plan, specs, generator).items():
        by_scope.setdefault(scope, []).append(name)
    quiet = by_scope.pop((), [])
    steady, drawn = [n for n in quiet if n not in rough], [n for n in quiet if n in rough]
    batches = []
    for scope, names in by_scope.items():
        smooth = [name for name in names if name not in rough]
        on_grid: list[str] = []
        if smooth and sum(sizes[name] for name in scope) <= MOST_DIMENSIONS:
            nodes, on_grid = _enough_nodes(rows, _only(plan, smooth), specs, scope)
            if on_grid:
                batches.append(Batch(_only(plan, on_grid), scope, nodes))
        drawn += [name for name in names if name not in on_grid]
    if drawn:
        batches.append(Batch(_only(plan, [*steady, *drawn]), tuple(sizes), 0, tuple(steady)))
    elif steady:
        batches.append(Batch(_only(plan, steady), steady=tuple(steady)))
    return tuple(batches)


def _only(plan: Plan, names: Sequence[str]) -> Plan:
    return replace(plan, rows=tuple(row for row in plan.rows if row.site in names))


def _enough_nodes(
    rows: Rows, plan: Plan, specs: Sequence[NoiseSpec], scope: tuple[str, ...]
) -> tuple[int, list[str]]:
    """The first count whose double changes none of some rows, and these: those that settle at all."""
    dimensions = sum(spec.size for spec in specs if spec.name in scope)

    def value(n: int) -> dict[str, Tensor]:
        noise, weights = grid(specs, scope, n)
        try:
            return {name: weights @ v for name, v in rows(plan, noise).items()}
        except SingularMatrix:  # so far out that a matrix is singular: such a grid settles nothing
            return {row.site: torch.tensor(torch.nan) for row in plan.rows}

    n, before = FIRST_NODES, value(FIRST_NODES)
    enough, moving = n, set(before)
    while moving and 2 * n <= MOST_NODES and (2 * n) ** dimensions <= MOST_POINTS:
        after = value(2 * n)
        left = {k for k in moving if not (after[k] - before[k]).abs() <= SETTLED * (1 + after[k].abs())}
        enough = n if left != moving else enough
        n, before, moving = 2 * n, after, left
    return enough, [name for name in before if name not in moving]
