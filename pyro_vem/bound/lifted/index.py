"""Which element of a variable each element of a factor depends on, found by probing values.

Elements take one of a few levels, and a run for each digit of an element's number gives every
element its digit's level: the levels that a factor's element shows spell the number of what it
depends on. A factor that shows anything else depends on several elements. No derivative is taken,
so what a model does in numpy or float() is seen as well.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Elements = dict[str, Tensor]
TOLERANCE = 1e-11  # relative, for values that should be equal bit for bit
CHECK = 1e-8  # relative, for what an affine function predicts


class Run(Protocol):
    """Values of one variable, flat, to the elements of every factor; the other variables stand still."""

    def __call__(self, u: Tensor, only: Collection[str] | None = None) -> Elements:
        """The factors at some values; `only` those that are wanted."""


@dataclass(frozen=True)
class Index:
    """Where a variable enters.

    Attributes:
        where: number of the element, for every element of each factor that depends on it.
        several: factors whose elements depend on more than one element, or on none by value.
    """

    where: Mapping[str, Tensor]
    several: frozenset[str]


def coded_index(run: Run, layout: Tensor, levels: Tensor, seed: int) -> Index:
    """Where groups of elements enter, by codes.

    Args:
        run: evaluates the factors.
        layout: flat positions of the members of each group, (groups, members).
        levels: values that a group takes, (levels, members).
        seed: of the last, random code.
    """
    groups, base = len(layout), len(levels)

    def at(codes: Tensor, only: Collection[str] | None = None) -> Elements:
        values = torch.empty(layout.numel(), dtype=torch.float64)
        values[layout] = levels[codes]
        return run(values, only)

    zeros = torch.zeros(groups, dtype=torch.long)
    plain = [at(zeros + level) for level in range(base)]
    names = [name for name in plain[0] if _differ(plain, name)]
    stacks = {name: torch.stack([run[name] for run in plain]) for name in names}
    where = {name: torch.zeros(plain[0][name].shape, dtype=torch.long) for name in names}
    several: set[str] = {n for n in names if not bool(torch.isfinite(stacks[n]).all())}
    numbers = torch.arange(groups)
    step = 1
    while step < groups:
        found = at(numbers // step % base, names)
        for name in names:
            digit, is_level = _nearest(found[name], stacks[name])
            where[name] += step * digit
            if not is_level:
                several.add(name)
        step *= base
    codes = torch.randint(base, (groups,), generator=torch.Generator().manual_seed(seed))
    found = at(codes, names)
    for name in names:
        where[name].clamp_(max=groups - 1)
        expected = stacks[name].gather(0, codes[where[name]].unsqueeze(0)).squeeze(0)
        if not _is_close(found[name], expected):
            several.add(name)
    return Index({n: where[n] for n in names if n not in several}, frozenset(several))


def simplex_index(run: Run, rows: int, size: int, seed: int) -> Index:
    """Where the components of simplexes enter as a + b log p, by ratios of differences.

    Components cannot move one at a time, but a factor that is affine in the log of one of them
    shows the ratio of its differences between random points.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(4, rows, size, generator=generator, dtype=torch.float64)
    points = noise.softmax(-1).reshape(4, -1)
    logs = (points[1:] / points[0]).log()
    runs = [run(point) for point in points]
    table, order = (logs[0] / logs[1]).sort()
    where, several = {}, set()
    for name in runs[0]:
        if not _differ(runs, name):
            continue
        if not bool(torch.stack([r[name] for r in runs]).isfinite().all()):
            several.add(name)
            continue
        first, second, third = (runs[i][name] - runs[0][name] for i in (1, 2, 3))
        size_of = 1 + runs[0][name].abs()
        place = torch.searchsorted(table, (first / second).nan_to_num(0.0).contiguous())
        best = torch.full_like(first, torch.inf)
        found = torch.zeros_like(place)
        for offset in (-2, -1, 0, 1):
            j = order[(place + offset).clamp(0, len(order) - 1)]
            slope = (first * logs[0][j] + second * logs[1][j]) / (logs[0][j].square() + logs[1][j].square())
            error = torch.stack([d - slope * t[j] for d, t in zip((first, second, third), logs, strict=True)])
            error = error.abs().amax(0) / size_of
            found, best = torch.where(error < best, j, found), torch.minimum(error, best)
        if bool((best > CHECK).any()):
            several.add(name)
        else:
            where[name] = found
    return Index(where, frozenset(several))


def _differ(runs: list[Elements], name: str) -> bool:
    first = runs[0][name]
    return any(not _is_close(run[name], first) for run in runs[1:])


def _is_close(a: Tensor, b: Tensor) -> bool:
    same = (a - b).abs() <= TOLERANCE * (1 + b.abs())
    return a.shape == b.shape and bool((same | (a == b)).all())


def _nearest(found: Tensor, levels: Tensor) -> tuple[Tensor, bool]:
    """The level that each element shows, and whether every element shows one."""
    gap = (levels - found).abs()
    least, digit = gap.min(0)
    return digit, bool((least <= TOLERANCE * (1 + found.abs())).all())
