"""From probes to products: which elements a row multiplies, by which coefficients.

A variable comes in *units*: it is one if each row sees one element of it, else the slices along one
of its axes are (the factors of ``z[i, k]``), of which each row sees one element each. A slot is affine
in every unit's own function (the value, or an exponential of it), and a product of two units shows in
how the coefficient of one moves with the other. All of it is found from values, and believed
only once the slot agrees with the model at other points.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .affine import MOST_DENSE, ROUNDING, SHIFT, Probe, differs
from .bilinear import Bilinear, Values
from .columns import arranged
from .stars import products_of
from .units import NoProducts, Seen, Unit

MOST_NAMES = 40  # of variables in slots with products
MOST_FACTORS = 64  # slices of one variable
AT_ONCE = 5_000_000  # numbers of all slots that are probed together
NEAR = 1e-3  # of a whole number, for one that tells an element
FADED = 1e-10  # of a slot: what moves it by less is left out


class ProductFitter:
    """Finds the products in some slots from probes that they share.

    Args:
        probe: evaluates the slots.
        keys: the slots, each with the variables that it depends on, and whether it is affine in them.
        shapes: of the variables.
        generator: of the steps.

    Attributes:
        found: products by slot, for those that have some.
        refused: why other slots have none.
    """

    def __init__(
        self,
        probe: Probe,
        keys: Mapping[str, Mapping[str, bool]],
        shapes: Mapping[str, Sequence[int]],
        generator: torch.Generator,
    ) -> None:
        self.probe, self.shapes = probe, shapes
        self.found: dict[str, Bilinear] = {}
        self.refused: dict[str, str] = {}
        names = [k for k in probe.sizes if any(k in some for some in keys.values())]
        if not keys or len(names) > MOST_NAMES:
            return
        self.names = self._mixed(keys, names)
        self.units = {k: self._units(k) for k in names if any(k in some for some in self.names.values())}
        self._probe_partners(generator)
        for key in keys:
            try:
                self.found[key] = self._fit(key)
            except NoProducts as reason:
                self.refused[key] = str(reason)

    def _mixed(self, keys: Mapping[str, Mapping[str, bool]], names: list[str]) -> dict[str, list[str]]:
        """Variables of each slot that it is not affine in, or not together with the others."""
        probe = self.probe
        points = [probe.moved(dict.fromkeys(names, 1.0))]
        points += [probe.moved({k: 1.0 for k in names if k != name}) for name in names]
        values = probe.at(points)
        found: dict[str, list[str]] = {}
        for key, known in keys.items():
            here, (there, *without) = probe.here[key], values[key]
            found[key] = []
            for name, is_affine in known.items():
                alone, rest = probe.along(name, key)[0], without[names.index(name)]
                scale = torch.stack([here, alone, rest, there]).abs().amax(0)
                if not is_affine or bool(differs(there + here, rest + alone, scale).any()):
                    found[key].append(name)
        return found

    def _units(self, name: str) -> list[Unit]:
        """A variable in units that suit all slots; none if there are no such units."""
        shape = tuple(self.shapes[name])
        places = torch.arange(self.probe.sizes[name])
        axes = sorted((d for d in range(len(shape)) if 1 < shape[d] <= MOST_FACTORS), key=lambda d: shape[d])
        slices = (places.reshape(shape).movedim(d, 0).reshape(shape[d], -1) for d in axes)
        ways = [[places], *([*way] for way in slices)]
        for way in ways:
            units = [Unit(name, positions) for positions in way]
            if self._are_seen(units[:1]) and self._are_seen(units):  # what a slice shows, most ways fail at
                return units
        return []

    def _are_seen(self, units: Sequence[Unit]) -> bool:
        """True if each row of every slot sees one element of each unit, at most; and which one."""
        groups, rate = [], None
        for unit in units:
            code = torch.arange(len(unit.positions)) / len(unit.positions)
            groups.append([self._shifted(unit, SHIFT * by) for by in (1.0, 2.0, 1 + code)])
        for unit, values in zip(units, self._each(groups), strict=True):
            for key in (key for key, names in self.names.items() if unit.name in names):
                scale, live = self._moved_rows(key, values[key])
                if rate is None and bool(live.any()):
                    rate = _rate(self.probe.here[key], values[key], scale)
                unit.rate = rate or 0.0
                seen = self._seen(unit, key, values[key], scale, live)
                if seen is None:
                    return False
                unit.seen[key] = seen
        return True

    def _moved_rows(self, key: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """The size of each row at some points, and whether the first of them moves it."""
        here = self.probe.here[key]
        scale = torch.maximum(here.abs(), values.abs().amax(0))
        return scale, (values[0] - here).abs() > FADED * (scale + 0.1 * scale.max())

    def _seen(self, unit: Unit, key: str, values: Tensor, scale: Tensor, live: Tensor) -> Seen | None:
        """A slot at one step of a unit, at two, and at one that is longer the later an element comes."""
        here, size, rate = self.probe.here[key], len(unit.positions), unit.rate
        first, second, coded = values
        once = first - here
        if bool((live & differs(second, first + math.exp(rate * SHIFT) * once, scale)).any()):
            return None
        ratio = (coded - here) / torch.where(live, once, 1.0)
        if rate:  # to the ratio of steps, from that of changes
            ratio = torch.log1p((ratio * math.expm1(rate * SHIFT)).clamp_min(FADED - 1)) / (rate * SHIFT)
        number = torch.where(live, size * (ratio - 1), 0.0)
        nearest = number.round().clamp(0, size - 1)
        if not bool(((number - nearest).abs() <= NEAR).all()):
            return None
        index = unit.positions[nearest.long()]
        change = unit.change(self.probe.base[unit.name][index], SHIFT)
        return Seen(index, torch.where(live, once / change, 0.0))

    def _shifted(self, unit: Unit, by: Tensor | float, point: Values | None = None) -> dict[str, Tensor]:
        """A point, or the base, with the elements of a unit moved."""
        point = self.probe.base if point is None else point
        moved = point[unit.name].clone()
        moved[unit.positions] += by
        return {**point, unit.name: moved}

    def _each(self, groups: Sequence[list[dict[str, Tensor]]]) -> Iterator[dict[str, Tensor]]:
        """The slots at groups of points, as many at once as memory allows."""
        rows = sum(len(values) for values in self.probe.here.values())
        few = max(1, AT_ONCE // max(1, rows * max(map(len, groups), default=1)))
        for start in range(0, len(groups), few):
            some = groups[start : start + few]
            values = self.probe.at([point for group in some for point in group])
            first = 0
            for group in some:
                yield {key: v[first : first + len(group)] for key, v in values.items()}
                first += len(group)

    def _probe_partners(self, generator: torch.Generator) -> None:
        """How each unit's coefficients change where all units have moved, each by steps of its own."""
        units = [unit for some in self.units.values() for unit in some]
        if not units:
            return
        points: list[dict[str, Tensor]] = [dict(self.probe.base), dict(self.probe.base)]
        for i, step in enumerate(self.probe._steps(generator, len(units)).tolist()):
            units[i].moves = (step, step * (1 + (i + 1) / len(units)))
            points = [
                self._shifted(units[i], by, point) for by, point in zip(units[i].moves, points, strict=True)
            ]
        there = self.probe.at(points)
        groups = [[self._shifted(unit, SHIFT, point) for point in points] for unit in units]
        for unit, values in zip(units, self._each(groups), strict=True):
            for key, seen in unit.seen.items():
                base = self.probe.base[unit.name][seen.index]
                for i, by in enumerate(unit.moves):
                    slope = (values[key][i] - there[key][i]) / unit.change(base + by, SHIFT)
                    seen.by.append(torch.where(seen.slope != 0, slope - seen.slope, 0.0))

    def _fit(self, key: str) -> Bilinear:
        """The products of one slot.

        Raises:
            NoProducts: if it has none, or others than of two units.
        """
        for name in self.names[key]:
            if not self.units[name]:
                raise NoProducts(f"rows see several elements of {name}, or are not affine in it")
        units = [u for name in self.names[key] for u in self.units[name] if bool(u.seen[key].slope.any())]
        if not units or len(units) * len(self.probe.here[key]) > MOST_DENSE:
            raise NoProducts("products of several elements")
        return arranged(products_of(key, units, self.probe))


def _rate(here: Tensor, values: Tensor, scale: Tensor) -> float:
    """Of the exponential that a slot is affine in, from the row that moves most; zero if in values."""
    row = ((values[0] - here).abs() / (scale + 1e-300)).argmax()
    first, second = values[0][row] - here[row], values[1][row] - values[0][row]
    growth = float(second / first)
    if not growth > 0 or abs(growth - 1) < ROUNDING * float(scale[row] / first.abs()):
        return 0.0
    rate = math.log(growth) / SHIFT
    return round(rate) if abs(rate - round(rate)) < NEAR**2 else rate
