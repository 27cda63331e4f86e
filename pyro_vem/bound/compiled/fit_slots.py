"""From probes to affine slots: conditions, coefficients, offsets, and the check that believes them."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .affine import (
    FAINT,
    MOST_DENSE,
    SHIFT,
    VERIFIED,
    AffineSlot,
    Condition,
    Dense,
    Dependence,
    Local,
    Probe,
    compact,
    dependence_on,
    differs,
    pick,
)
from .bilinear import Values
from .fit_products import ProductFitter

MOST_CONDITIONS = 2
MOST_TOGETHER = 12  # variables of which pairs are tried as conditions
MOST_ELEMENTS = 5_000  # of a latent that rows see several elements of: one model run each
FOLLOWED = 1e-3  # of a row's changes between those points
SHORTER, FARTHEST = range(0, 24, 4), 4.0  # halvings of steps that overflow, and how far points are in them
SMALL = 1e3  # a slot's size for its changes with a variable: longer steps lose fewer digits


class NotAffine(Exception):
    """A slot that has no compiled form, with the reason."""


class SlotFitter:
    """Fits every slot of a model from one shared set of probes.

    Args:
        probe: evaluates the slots.
        keys: the slots.
        generator: of the points.
        squared: slots of which two moments are all that is needed: they may have products of latents.
        shapes: of the variables.
    """

    def __init__(
        self,
        probe: Probe,
        keys: Sequence[str],
        generator: torch.Generator,
        squared: Collection[str] = (),
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.probe, self.keys, self.generator = probe, keys, generator
        self.found = {key: self._dependences(key) for key in keys}
        self.joint = {frozenset[str](): probe.all_moved}
        self.splits: dict[str, tuple[list[str], list[str]] | str] = {}
        for key in keys:
            try:
                self.splits[key] = self._split(key)
            except NotAffine as reason:
                self.splits[key] = str(reason)
        self._find_products([key for key in squared if isinstance(self.splits[key], str)], shapes or {})
        self._probe_conditions()
        self._probe_dense()

    def fit(self, key: str) -> AffineSlot | str:
        """The compiled slot, verified; or why there is none."""
        split = self.splits[key]
        if isinstance(split, str):
            return split
        try:
            slot = self._assemble(key, *split)
        except NotAffine as reason:
            return str(reason)
        gap = worst_gap(slot, self.probe.points, self.probe.truth[key])
        if gap > VERIFIED:
            return f"its compiled form is off by {gap:.1g} at a random point"
        if not _follows(slot, self.probe.points, self.probe.truth[key]):
            return "it varies too little for its size to be compiled: centre the data"
        return slot

    def lengths(self) -> dict[str, float]:
        """Steps as long as it takes to move slots by their own size, of variables that all are affine in.

        A residual of data near 10,000 loses four digits of coefficients to its offset in steps of one.
        """
        conditions = {k for split in self.splits.values() if not isinstance(split, str) for k in split[0]}
        ratios: dict[str, float] = {}
        for key, found in self.found.items():
            here = self.probe.here[key]
            for k, dependence in found.items():
                moved = (self.probe.along(k, key)[0] - here).abs().max()
                is_affine = dependence.is_affine and k not in conditions
                ratios[k] = max(ratios.get(k, 0.0), float(here.abs().max() / moved)) if is_affine else np.inf
        return {k: 2.0 ** np.ceil(np.log2(r)) for k, r in ratios.items() if SMALL < r < np.inf}

    def shorter(self) -> dict[str, float]:
        """Steps so short that no slot overflows, of variables that make one do so with longer ones.

        A rate is the exponential of 2,000 times a slope, if years are counted from our era.
        """
        if all(bool(values.isfinite().all()) for values in self.probe.truth.values()):
            return {}
        zero = {k: torch.zeros_like(base) for k, base in self.probe.base.items()}
        lengths = [2.0**-power for power in SHORTER]
        points = [
            zero | {k: FARTHEST * length * torch.ones_like(zero[k])} for k in zero for length in lengths
        ]
        found = self.probe.at(points).values()
        is_finite = torch.stack([values.isfinite().all(-1) for values in found]).all(0)
        longest = dict(zip(zero, is_finite.reshape(len(zero), -1).tolist(), strict=True))
        return {k: lengths[row.index(True)] for k, row in longest.items() if not row[0] and any(row)}

    def _dependences(self, key: str) -> dict[str, Dependence]:
        found = {k: dependence_on(self.probe, key, k) for k in self.probe.moving(key)}
        return {k: d for k, d in found.items() if d is not None}

    def _split(self, key: str) -> tuple[list[str], list[str]]:
        """Variables to condition on, and those that the slot is jointly affine in given them."""
        known = self.found[key]
        conditions = [k for k, d in known.items() if not d.is_affine]
        rest = [k for k in known if k not in conditions]
        for more in self._candidates(key, rest, len(conditions)):
            if self._is_jointly_affine(key, rest, {*conditions, *more}):
                conditions += more
                rest = [k for k in rest if k not in more]
                break
        else:
            raise NotAffine("products of several elements")
        for k in conditions:
            if known[k].index is None:
                raise NotAffine(f"not affine in several elements of {k}")
        if len(conditions) > MOST_CONDITIONS:
            raise NotAffine(f"not affine in {', '.join(conditions)} together")
        return conditions, rest

    def _find_products(self, keys: Collection[str], shapes: Mapping[str, Sequence[int]]) -> None:
        """Products in slots that are not affine, even given some variables."""
        known = {key: {k: d.is_affine for k, d in self.found[key].items()} for key in keys}
        fitter = ProductFitter(self.probe, known, shapes, self.generator)
        self.products = fitter.found
        for key, products in fitter.found.items():
            self.splits[key] = [], [k for k in self.found[key] if k not in products.variables]
        for key, reason in fitter.refused.items():
            self.splits[key] = f"{self.splits[key]}: {reason}"

    def _candidates(self, key: str, rest: list[str], held: int) -> Iterator[tuple[str, ...]]:
        """Further variables to condition on, the fewest and smallest first."""
        known = self.found[key]
        local = sorted(
            (k for k in rest if known[k].index is not None),
            key=lambda k: (self.probe.sizes[k], rest.index(k)),
        )
        yield ()
        for count in range(1, MOST_CONDITIONS - held + 1):
            if count == 1 or len(local) <= MOST_TOGETHER:
                yield from itertools.combinations(local, count)

    def _is_jointly_affine(self, key: str, names: list[str], fixed: set[str]) -> bool:
        """True if the slot has no second difference when all but the fixed variables move at once."""
        if len([k for k in names if k not in fixed]) < 2:
            return True
        held = frozenset(fixed)
        if held not in self.joint:
            free = [k for k in self.probe.sizes if k not in held]
            points = [self.probe.moved(dict.fromkeys(free, c)) for c in (1.0, 2.0)]
            self.joint[held] = self.probe.at(points)
        f0, (f1, f2) = self.probe.here[key], self.joint[held][key]
        return not bool(differs(f2 + f0, 2 * f1, torch.stack([f0, f1, f2]).abs().amax(0)).any())

    def _probe_conditions(self) -> None:
        """Every conditioning variable shifted, alone and with each other variable moved."""
        probe = self.probe
        self.shifted: dict[str, dict[str, Tensor]] = {}
        self.shifted_moved: dict[tuple[str, str], dict[str, Tensor]] = {}
        conditions = {k for split in self.splits.values() if not isinstance(split, str) for k in split[0]}
        for c in sorted(conditions):

            def at(times: int, extra: str | None = None, c: str = c) -> dict[str, Tensor]:
                point = probe.moved({extra: 1.0} if extra else {})
                return {**point, c: point[c] + times * SHIFT}

            others = [k for k in probe.sizes if k != c]
            points = [at(t) for t in (1, 2, 3)] + [at(t, k) for k in others for t in (1, 2)]
            values = probe.at(points)
            self.shifted[c] = {key: v[:3] for key, v in values.items()}
            for i, k in enumerate(others):
                self.shifted_moved[c, k] = {key: v[3 + 2 * i : 5 + 2 * i] for key, v in values.items()}

    def _probe_dense(self) -> None:
        """One probe for each element of the variables that some row sees several elements of."""
        probe = self.probe
        self.matrices: dict[str, dict[str, Tensor]] = {}
        wanted: dict[str, list[str]] = {}
        for key, split in self.splits.items():
            if not isinstance(split, str):
                for k in split[1]:
                    if self.found[key][k].index is None:
                        wanted.setdefault(k, []).append(key)
        for k, keys in wanted.items():
            n = probe.sizes[k]
            rows = max(len(probe.here[key]) for key in keys)
            if n * rows > MOST_DENSE or n > MOST_ELEMENTS:
                for key in keys:
                    self.splits[key] = f"{n} coefficients for each of {rows} rows"
                continue
            columns: dict[str, list[Tensor]] = {key: [] for key in keys}
            for start in range(0, n, 128):
                points = []
                for j in range(start, min(start + 128, n)):
                    moved = probe.base[k].clone()
                    moved[j] += probe.length[k]
                    points.append({**probe.base, k: moved})
                values = probe.at(points)
                for key in keys:
                    here, there = probe.here[key], values[key]
                    is_moved = differs(there, here, torch.maximum(there.abs(), here.abs()), FAINT)
                    columns[key].append(torch.where(is_moved, there - here, 0.0) / probe.length[k])
            self.matrices[k] = {key: torch.cat(rows_).T.contiguous() for key, rows_ in columns.items()}

    def _assemble(self, key: str, conditions: list[str], rest: list[str]) -> AffineSlot:
        probe, known, f0 = self.probe, self.found[key], self.probe.here[key]
        locals_, denses = {}, {}
        offset = f0.clone()
        for k in rest:
            rate, slope = self._factors(key, k, conditions)
            index = known[k].index
            if index is None:
                denses[k] = Dense(self.matrices[k][key], rate, slope)
                offset -= self.matrices[k][key] @ probe.base[k]
            else:
                delta = (probe.along(k, key)[1] - f0) / 2
                coefficient = torch.where(known[k].rows, delta / probe.step[k][index], 0.0)
                locals_[k] = Local(index, coefficient, rate, slope)
                offset -= coefficient * probe.base[k][index]
        parts = {c: self._condition(key, c, locals_, denses) for c in conditions}
        products = self.products.get(key)
        if products is not None:
            offset -= products.at(probe.base)
        return AffineSlot(offset, parts, locals_, denses, products)

    def _factors(
        self, key: str, k: str, conditions: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """How the coefficients of k scale with each condition: by an exponential, or linearly."""
        probe, f0 = self.probe, self.probe.here[key]
        here = probe.along(k, key)[0] - f0
        rates, slopes = {}, {}
        for c in conditions:
            there = self.shifted_moved[c, k][key] - self.shifted[c][key][:2]
            live = here.abs() > 1e-7 * (f0.abs() + here.abs().max())
            r1, r2 = (torch.where(live, row / torch.where(live, here, 1.0), 1.0) for row in there)
            tol = 1e-5
            if bool(((r1 - 1).abs() <= 1e-8).all() and ((r2 - 1).abs() <= 1e-8).all()):
                continue
            if bool(((r2 - r1**2).abs() <= tol * r1**2).all()) and bool((r1 > 0).all()):
                rates[c] = compact(r1.log() / SHIFT)
            elif bool(((r2 - 1 - 2 * (r1 - 1)).abs() <= tol * (1 + r1.abs())).all()):
                slopes[c] = compact((r1 - 1) / SHIFT)
            else:
                raise NotAffine(f"its coefficients of {k} are no simple function of {c}")
        return rates, slopes

    def _condition(self, key: str, c: str, locals_: dict[str, Local], denses: dict[str, Dense]) -> Condition:
        """The condition's own part of the offset, after what it does through the coefficients."""
        probe, index = self.probe, self.found[key][c].index
        assert index is not None
        base = probe.base[c][index]
        zero = torch.zeros_like(base)
        own = []
        for t, value in zip((1, 2, 3), self.shifted[c][key], strict=True):
            rest = value - probe.here[key]
            parts: list[tuple[str, Local | Dense]] = [*locals_.items(), *denses.items()]
            for name, part in parts:
                factor: Tensor | float = 1.0
                if c in part.rate:
                    factor = torch.exp(part.rate[c] * SHIFT * t)
                if c in part.slope:
                    factor = 1 + part.slope[c] * SHIFT * t
                rest = rest - (factor - 1) * _contribution(part, probe.base[name])
            own.append(rest)
        dust = 1e-13 * (probe.here[key].abs() + self.shifted[c][key].abs().amax(0))
        own = [torch.where(part.abs() <= dust, zero, part) for part in own]  # rounding is no dependence
        d1, d2, d3 = own[0], own[1] - own[0], own[2] - own[1]
        size = own[0].abs() + own[1].abs()
        tol = 1e-7 * size + 1e-9 * (size.max() + probe.here[key].abs().max())
        is_linear = (d2 - d1).abs() <= tol
        safe = torch.where(is_linear, 1.0, d1)
        ratio = torch.where(is_linear, torch.ones_like(d1), d2 / safe)
        ok = is_linear | ((ratio > 0) & ((d3 - ratio * d2).abs() <= 1e-5 * d3.abs()))
        if not bool(ok.all()):
            raise NotAffine(f"its offset is no simple function of {c}")
        rate = torch.where(is_linear, zero, ratio.log() / SHIFT)
        size = torch.where(is_linear, zero, d1 / torch.where(is_linear, 1.0, ratio - 1))
        linear = torch.where(is_linear, d1 / SHIFT, zero)
        return Condition(index, *(compact(part) for part in (base, linear, size, rate)))


def _contribution(part: Local | Dense, base: Tensor) -> Tensor:
    if isinstance(part, Dense):
        return part.matrix @ base
    return part.coefficient * pick(base, part.index)


def _follows(slot: AffineSlot, points: Values, truth: Tensor) -> bool:
    """True unless a row's changes, far smaller than the row itself, are other than the slot's."""
    if not truth.numel():
        return True
    size, change = truth.abs().amax(0), truth.amax(0) - truth.amin(0)
    gap = (slot.at(points) - truth).abs().amax(0)
    least = VERIFIED * change.max() + 30 * FAINT * (size + 0.1 * size.max())
    return bool((gap <= FOLLOWED * change + least).all())


def worst_gap(slot: AffineSlot, points: Values, truth: Tensor) -> float:
    """Largest difference of a compiled slot from the model's own values, relative to them.

    Args:
        slot: the compiled slot.
        points: a batch of points, (points, size) by variable.
        truth: the model's slot there, (points, rows).
    """
    if not truth.numel():
        return 0.0
    size = truth.abs()
    gap = (slot.at(points) - truth).abs() / (size + 1e-3 * size.amax(-1, keepdim=True) + 1e-300)
    worst = float(gap.max())
    return worst if worst == worst else float("inf")
