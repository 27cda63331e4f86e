"""One slot as an affine map of the variables, conditional on a few local ones, and its probing.

Everything is found from values of the slot at chosen points: no source is read and no derivative
is taken, so a dependence through ``float`` or numpy is seen like any other. Which element of a
variable a row depends on is read off bit patterns; coefficients are differences. What is found is
checked against the model at other points before it is believed.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .bilinear import Bilinear, Values

Evaluate: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Slots by key, (points, rows) each, at a batch of points."""

ROUNDING = 1e-9  # relative; differences from a straight line below it are rounding
FAINT = 1e-13  # relative; changes below it are rounding
VERIFIED = 1e-8
# In sds, of the points that a compiled slot is verified at.
SPREADS = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 1.2, 1.2, 1.2)
SHIFT = 0.4  # of a conditioning variable, per step
FEW_BITS = 4  # of the number of an element, that are looked at together
MOST_DENSE = 20_000_000  # entries of a dense coefficient matrix


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows' elements of a variable; the only element of a scalar is left to broadcasting."""
    return x if x.shape[-1] == 1 else x.index_select(-1, index)


def product(first: Tensor, *others: Tensor) -> Tensor:
    """Product of some factors."""
    return functools.reduce(torch.mul, others, first)


def compact(values: Tensor) -> Tensor:
    """One element where all rows have the same but for rounding: the rest is left to broadcasting."""
    if not len(values):
        return values
    low, high = values.aminmax()
    return values[:1] if bool(high - low <= 1e-13 * high.abs()) else values


class Scaled(Protocol):
    """Parts of a slot whose coefficients depend on conditions, see `Local`."""

    @property
    def rate(self) -> dict[str, Tensor]:
        """By an exponential."""

    @property
    def slope(self) -> dict[str, Tensor]:
        """Linearly."""


@dataclass(frozen=True)
class Local:
    """coefficient_n * variable[index_n] for each row n, scaled by what the slot is conditional on.

    Attributes:
        rate: for each conditioning variable c: the coefficient is multiplied by
            exp(rate_n (x_c - base)).
        slope: likewise by 1 + slope_n (x_c - base).
    """

    index: Tensor
    coefficient: Tensor
    rate: dict[str, Tensor] = field(default_factory=dict)
    slope: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Dense:
    """matrix @ variable, rows scaled like a `Local`."""

    matrix: Tensor
    rate: dict[str, Tensor] = field(default_factory=dict)
    slope: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """A variable that the slot is not affine in: its index for each row, and its part of the offset.

    The part is linear * (x - base) + size * (exp(rate * (x - base)) - 1), row by row.
    """

    index: Tensor
    base: Tensor
    linear: Tensor
    size: Tensor
    rate: Tensor

    def shift(self, x: Tensor) -> Tensor:
        """X - base at the rows' own elements; x is (..., rows)."""
        return x - self.base

    def offset(self, x: Tensor) -> Tensor:
        """What the variable adds by itself."""
        by = self.shift(x)
        return self.linear * by + self.size * torch.expm1(self.rate * by)


@dataclass(frozen=True)
class AffineSlot:
    """offset + conditions' parts + sum of locals and denses, and of products of other variables."""

    offset: Tensor
    conditions: dict[str, Condition]
    locals: dict[str, Local]
    denses: dict[str, Dense]
    products: Bilinear | None = None

    @property
    def variables(self) -> tuple[str, ...]:
        """Variables that the slot depends on."""
        multiplied = self.products.variables if self.products is not None else ()
        return (*self.conditions, *self.locals, *self.denses, *multiplied)

    def factors(self, part: Scaled, given: Values) -> list[Tensor]:
        """What a coefficient is multiplied by at values of the conditions, (..., rows) each."""
        rates = [
            torch.exp(rate * self.conditions[name].shift(given[name])) for name, rate in part.rate.items()
        ]
        return rates + [
            1 + slope * self.conditions[name].shift(given[name]) for name, slope in part.slope.items()
        ]

    def alone(self, given: Values) -> Tensor:
        """The offset, with what the conditions add at values of theirs, (..., rows)."""
        total = self.offset
        for name, condition in self.conditions.items():
            total = total + condition.offset(given[name])
        for name, part in self.locals.items():
            if name in given:  # another slot's condition, which this one is affine in
                total = total + product(given[name], part.coefficient, *self.factors(part, given))
        return total

    def at(self, values: Values) -> Tensor:
        """The slot's value at one point, or at a batch of them."""
        given = {name: pick(values[name], c.index) for name, c in self.conditions.items()}
        total = self.alone(given)
        for name, part in self.locals.items():
            if name not in given:
                at = pick(values[name], part.index)
                total = total + product(at, part.coefficient, *self.factors(part, given))
        for name, dense in self.denses.items():
            total = total + product(values[name] @ dense.matrix.mT, *self.factors(dense, given))
        return total if self.products is None else total + self.products.at(values)


def differs(a: Tensor, b: Tensor, scale: Tensor, rounding: float = ROUNDING) -> Tensor:
    """True where two slots differ by more than rounding, of their own size and of the largest row's."""
    most = scale.max() if scale.numel() else scale.sum()
    return ~((a - b).abs() <= rounding * scale + 1e-13 * most)


class Probe:
    """All evaluations that every slot needs, made once and shared.

    Args:
        evaluate: the slots at a batch of points.
        sizes: number of elements of each variable.
        generator: of base point and steps.
        lengths: of the steps of some variables, of others one.

    Attributes:
        here: the slots at the base point.
        all_moved: where all variables are moved by one and two of their steps.
        points, truth: points at which compiled slots are verified, and the slots there.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        sizes: Mapping[str, int],
        generator: torch.Generator,
        lengths: Mapping[str, float] | None = None,
    ) -> None:
        self.evaluate, self.sizes = evaluate, dict(sizes)
        self.length = dict.fromkeys(sizes, 1.0) | dict(lengths or {})
        elsewhere = [
            {k: spread * self.reach(k) * self._normal(generator, n) for k, n in sizes.items()}
            for spread in SPREADS
        ]
        self.base = {k: 0.3 * self.reach(k) * self._normal(generator, n) for k, n in sizes.items()}
        self.step = {k: self.length[k] * self._steps(generator, n) for k, n in sizes.items()}
        points = [self.base]
        for k in sizes:
            points += [self.moved({k: c}) for c in (1.0, 2.0, 3.0)]
        begun = {k: self._num_bits(k) if self._num_bits(k) <= FEW_BITS else 1 for k in sizes if sizes[k] > 1}
        first = [point for k, bits in begun.items() for b in range(bits) for point in self._bit(k, b)]
        last = [self.moved(dict.fromkeys(sizes, c)) for c in (1.0, 2.0)] + elsewhere
        cut = len(points), *(2 * bits for bits in begun.values()), 2, len(SPREADS)
        values = {key: v.split(cut) for key, v in self.at(points + first + last).items()}
        self._values, self._order = {key: v[0] for key, v in values.items()}, list(sizes)
        self.here = {key: v[0][0] for key, v in values.items()}
        self.all_moved = {key: v[-2] for key, v in values.items()}
        self.points = {k: torch.stack([point[k] for point in elsewhere]) for k in sizes}
        self.truth = {key: v[-1] for key, v in values.items()}
        bits = {k: {key: v[i] for key, v in values.items()} for i, k in enumerate(begun, start=1)}
        self.bits = self._all_bits(begun, bits)

    def reach(self, k: str) -> float:
        """How far from zero points are: no farther than short steps go."""
        return min(1.0, self.length[k])

    def along(self, k: str, key: str) -> Tensor:
        """A slot with one variable moved by one, two and three of its steps, (3, rows)."""
        start = 1 + 3 * self._order.index(k)
        return self._values[key][start : start + 3]

    def moving(self, key: str) -> list[str]:
        """Variables that change at least a bit of a slot."""
        changed = (self._values[key][1:] != self.here[key]).any(-1).reshape(-1, 3).any(-1)
        return [self._order[i] for i in changed.nonzero().flatten().tolist()]

    @staticmethod
    def _normal(generator: torch.Generator, n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    @staticmethod
    def _steps(generator: torch.Generator, n: int) -> Tensor:
        size = 0.3 + 0.3 * torch.rand(n, generator=generator, dtype=torch.float64)
        return size * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1)

    def moved(self, by: Mapping[str, float], only: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The base with some variables moved by multiples of their steps (at some elements only)."""
        point = dict(self.base)
        for k, c in by.items():
            step = self.step[k] if only is None or k not in only else self.step[k] * only[k]
            point[k] = point[k] + c * step
        return point

    def at(self, points: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The slots at some points, in batches."""
        parts = []
        for start in range(0, len(points), 128):
            chunk = points[start : start + 128]
            parts.append(self.evaluate({k: torch.stack([p[k] for p in chunk]) for k in self.base}))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _bit(self, k: str, b: int) -> list[dict[str, Tensor]]:
        """Two points: only those elements of k moved whose bit b is 0, or 1."""
        bit = (torch.arange(self.sizes[k]) >> b) & 1
        return [self.moved({k: 1.0}, {k: (bit == side).to(torch.float64)}) for side in (0, 1)]

    def _num_bits(self, k: str) -> int:
        return math.ceil(math.log2(self.sizes[k]))

    def _all_bits(
        self, begun: Mapping[str, int], first: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Slots at the points of every bit, (2 * bits, rows); of those begun only where no row is local."""
        wanted = {
            k: range(number, self._num_bits(k))
            for k, number in begun.items()
            if number < self._num_bits(k)
            and any(self._may_be_local(v[:2], key) for key, v in first[k].items())
        }
        points = [point for k, bits in wanted.items() for b in bits for point in self._bit(k, b)]
        if not points:
            return first
        found = {key: v.split([2 * len(b) for b in wanted.values()]) for key, v in self.at(points).items()}
        more = {k: {key: v[i] for key, v in found.items()} for i, k in enumerate(wanted)}
        return {
            k: {key: torch.cat([v, more[k][key]]) for key, v in values.items()} if k in more else values
            for k, values in first.items()
        }

    def _may_be_local(self, sides: Tensor, key: str) -> bool:
        """False if nothing moves a slot, or some row moves with elements on both sides of bit 0."""
        here = self.here[key]
        moved = differs(sides, here, torch.maximum(sides.abs().amax(0), here.abs()), FAINT)
        return bool(moved.any()) and not bool((moved[0] & moved[1]).any())


@dataclass(frozen=True)
class Dependence:
    """How one slot depends on one variable."""

    rows: Tensor  # which rows do
    is_affine: bool
    index: Tensor | None  # the element of each row; None if some row depends on several


def dependence_on(probe: Probe, key: str, k: str) -> Dependence | None:
    """None where the slot does not depend on the variable."""
    f0, (f1, f2, f3) = probe.here[key], probe.along(k, key)
    scale = torch.stack([f0, f1, f2, f3]).abs().amax(0)
    rows = differs(f1, f0, scale, FAINT) | differs(f2, f0, scale, FAINT)
    if not bool(rows.any()):
        return None
    is_affine = not bool((differs(f2 + f0, 2 * f1, scale) | differs(f3 + 2 * f0, 3 * f1, scale)).any())
    return Dependence(rows, is_affine, _index(probe, key, k, rows))


def _index(probe: Probe, key: str, k: str, rows: Tensor) -> Tensor | None:
    f0, index = probe.here[key], torch.zeros(len(rows), dtype=torch.long)
    if probe.sizes[k] == 1:
        return index
    values = probe.bits[k][key]
    scale = f0.abs()
    for b in range(len(values) // 2):
        zero, one = (differs(values[2 * b + side], f0, scale, FAINT) for side in (0, 1))
        if bool((rows & (zero == one)).any()):  # both sides move it, or neither: several elements
            return None
        index += (one & rows).long() << b
    return index
