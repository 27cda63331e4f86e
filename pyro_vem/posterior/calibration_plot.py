"""What ranks say: `Calibration`, the envelope that uniform ranks stay in, and the picture."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri
from scipy.stats import binom

Counts = NDArray[np.int64]

FALSE_ALARM = 1e-3  # probability that a calibrated fit is called miscalibrated, all scalars together
FAILED = -1  # rank of a fit without draws
LEAST = 1e-12  # p-value that rounding leaves
MOST_POINTS = 199  # at which an ECDF is looked at
ROUNDING = 1 + 1e-9  # tails that are equal differ by less
CLEAR = 3.0  # standard errors at which a shift or a spread is named
MOST_REASONS, MOST_LABELS = 5, 8


class CalibrationVerdict(Enum):
    """Whether a fit recovers what its data were simulated from.

    Example:
        >>> CalibrationVerdict.CALIBRATED.value
        'True values rank among the draws as they should, as far as this many simulations can tell.'
    """

    CALIBRATED = "True values rank among the draws as they should, as far as this many simulations can tell."
    MISCALIBRATED = "True values do not rank among the draws as they should: see the reasons and plot()."


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of true values among a fit's draws, and what they say.

    Attributes:
        ranks: by scalar, (num_simulations,): how many draws lie below the true value, from 0 to
            num_draws; -1 where the fit failed.
        num_draws: draws of each fit.
        table: a row for each scalar: p_value (that of the farthest point of its rank ECDF), inside
            (the envelope of the verdict), shift and spread (mean and sd of the truth among the
            draws, in posterior sds: 0 and 1 when calibrated) and a hint where it is outside.
        verdict: MISCALIBRATED if a scalar leaves its envelope. A calibrated fit does so in one case
            of 1,000: the level is shared out among the scalars (Bonferroni).
        reasons: why, one sentence each, and how many fits failed.
        failures: what went wrong, by simulation. A failure counts as a miss of every scalar, on the
            side where it does more harm.
        notes: what was held fixed or left out, and how many fits warned.
        seconds: wall time.
    """

    ranks: Mapping[str, Counts]
    num_draws: int
    table: pd.DataFrame
    verdict: CalibrationVerdict
    reasons: tuple[str, ...]
    failures: Mapping[int, str]
    notes: tuple[str, ...] = ()
    seconds: float = float("nan")

    @classmethod
    def of(
        cls,
        ranks: Mapping[str, Counts],
        num_draws: int,
        failures: Mapping[int, str] | None = None,
        notes: Iterable[str] = (),
        seconds: float = float("nan"),
    ) -> "Calibration":
        """Judge ranks, also of draws that come from elsewhere.

        Example:
            >>> ranks = np.random.default_rng(0).integers(0, 100, 200)
            >>> Calibration.of({"z": ranks}, 99).verdict.name
            'CALIBRATED'
            >>> Calibration.of({"z": ranks // 2}, 99).reasons
            ("'z': biased high and too wide (p = ...
        """
        failures = dict(failures or {})
        rows = {name: _judged(column, num_draws, FALSE_ALARM / len(ranks)) for name, column in ranks.items()}
        table = pd.DataFrame.from_dict(
            rows, orient="index", columns=["p_value", "inside", "shift", "spread", "hint"]
        )
        outside = table[~table["inside"]].sort_values("p_value")
        reasons = [
            f"{name!r}: {row['hint']} (p = {row['p_value']:.1g}, shift {row['shift']:+.2f}, "
            f"spread {row['spread']:.2f})"
            for name, row in outside.head(MOST_REASONS).iterrows()
        ]
        if len(outside) > MOST_REASONS:
            reasons.append(f"and {len(outside) - MOST_REASONS} more of {len(table)} scalars")
        if failures:
            text, _ = Counter(failures.values()).most_common(1)[0]
            reasons.append(f"{len(failures)} fits failed and count as misses, for example: {text}")
        verdict = CalibrationVerdict.MISCALIBRATED if len(outside) else CalibrationVerdict.CALIBRATED
        return cls(ranks, num_draws, table, verdict, tuple(reasons), failures, tuple(notes), seconds)

    @property
    def num_simulations(self) -> int:
        """Simulated data sets, failures included."""
        return len(next(iter(self.ranks.values())))

    @property
    def alpha(self) -> float:
        """Level of one scalar's envelope."""
        return FALSE_ALARM / len(self.ranks)

    def plot(self, ax: Any = None) -> Any:
        """Rank ECDFs with their envelope, see `pyro_vem.posterior.calibration_plot.plot`."""
        return plot(self, ax)

    def __repr__(self) -> str:
        head = (
            f"{self.num_simulations:,} simulations, {self.num_draws:,} draws each, "
            f"{len(self.failures)} failed, {self.seconds:.1f} s"
        )
        table = self.table.sort_values("p_value", kind="stable")
        formats = {"p_value": "{:.2g}".format, "shift": "{:+.2f}".format, "spread": "{:.2f}".format}
        text = table.to_string(formatters=formats, max_rows=20)
        lines = [f"{self.verdict.name}. {self.verdict.value}", head, text]
        return "\n".join([*lines, *(f"- {line}" for line in (*self.reasons, *self.notes))])


def _judged(ranks: Counts, num_draws: int, alpha: float) -> tuple[float, bool, float, float, str]:
    """A row of the table."""
    band = envelope(len(ranks), num_draws)
    p_value = band.p_value(band.counts(ranks))
    shift, spread, hint = shape(ranks, num_draws)
    is_inside = p_value > alpha
    other = "failed fits" if FAILED in ranks else "another shape"
    return p_value, is_inside, shift, spread, "" if is_inside else hint or other


@dataclass(frozen=True, eq=False)
class Envelope:
    """Where the ECDF of uniform ranks lies, at all points at once.

    ArviZ 0.x has this band, to 1e-5 of its level: too coarse for the levels here; ArviZ 1.x has
    another. This one is exact: the counts below the points are a Poisson process that is known to
    have `num_simulations` events, so that the probability of staying between two boundaries is a
    chain of convolutions.

    Attributes:
        num_simulations: ranks in a sample, each uniform on 0, ..., num_draws.
        num_draws: largest rank.
        points: an ECDF counts the ranks below each of these, (points,).
        tails: two-sided binomial tail of each count, (points, num_simulations + 1).

    References:
        Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison, Statistics
        and Computing 32. Moscovich and Nadler (2017), Fast calculation of boundary crossing
        probabilities for Poisson processes, Statistics & Probability Letters 123.

    Example:
        >>> envelope(2, 1).p_value(np.array([2]))  # both ranks are 0: as likely as both being 1
        0.5
    """

    num_simulations: int
    num_draws: int
    points: Counts
    tails: NDArray[np.float64]

    def counts(self, ranks: Counts) -> Counts:
        """Ranks below each point; failed fits are misses on the side where they do more harm."""
        below = np.searchsorted(np.sort(ranks), self.points).astype(np.int64)
        above = below - int((ranks == FAILED).sum())
        return min(below, above, key=self._tail)

    def p_value(self, counts: Counts) -> float:
        """Probability that the ECDF of uniform ranks is as extreme somewhere; 1e-12 where it is less."""
        return max(self._leaving(self._tail(counts)), LEAST)

    def bounds(self, alpha: float) -> tuple[Counts, Counts]:
        """Lowest and highest counts of the ECDFs whose p-value is above `alpha`."""
        levels = np.unique(self.tails)
        low, high = 0, len(levels) - 1
        while low < high:  # the first level that too many leave
            middle = (low + high) // 2
            low, high = (low, middle) if self._leaving(levels[middle]) > alpha else (middle + 1, high)
        return self._between(levels[low] / ROUNDING**2)

    def _tail(self, counts: Counts) -> float:
        return float(self.tails[np.arange(len(counts)), counts].min())

    def _between(self, level: float) -> tuple[Counts, Counts]:
        """Lowest and highest count whose tail is above a level; crossed where there is none."""
        inside = self.tails > level * ROUNDING
        low, high = inside.argmax(1), self.num_simulations - inside[:, ::-1].argmax(1)
        return low, np.where(inside.any(1), high, -1)

    def _leaving(self, level: float) -> float:
        """Probability that the tail is at or below a level at some point."""
        low, high = self._between(level)
        if bool((low > high).any()):
            return 1.0
        n, start, mass = self.num_simulations, 0, np.ones(1)
        gaps = np.diff(self.points, prepend=0, append=self.num_draws + 1)
        rates = (n * gaps / (self.num_draws + 1)).tolist()
        for first, last, rate in zip([*low.tolist(), n], [*high.tolist(), n], rates, strict=True):
            mass = np.convolve(mass, _poisson(last - start, rate))[first - start : last - start + 1]
            start = first
        return float(np.clip(1 - mass[0] / _poisson(n, float(n))[n], 0.0, 1.0))


def _poisson(most: int, rate: float) -> NDArray[np.float64]:
    """Probabilities of 0, ..., most events."""
    k = np.arange(most + 1)
    return np.exp(k * np.log(rate) - rate - gammaln(k + 1))


@lru_cache(maxsize=8)
def envelope(num_simulations: int, num_draws: int) -> Envelope:
    """The envelope of a number of ranks on 0, ..., num_draws."""
    points = np.unique(np.linspace(1, num_draws, min(num_draws, MOST_POINTS)).round().astype(np.int64))
    count, share = np.arange(num_simulations + 1), points[:, None] / (num_draws + 1)
    lower, upper = (tail(count, num_simulations, share) for tail in (binom.cdf, binom.sf))
    at_least = upper + binom.pmf(count, num_simulations, share)
    return Envelope(num_simulations, num_draws, points, 2 * np.minimum(lower, at_least))


def shape(ranks: Counts, num_draws: int) -> tuple[float, float, str]:
    """Shift and spread of the true values among their draws, and what they say in words.

    Returns:
        Mean and sd of the normal scores of the ranks, in posterior sds: 0 and 1 for uniform
        ranks. A positive shift: the truth lies above the draws. A spread above 1: the draws are
        too narrow. Ranks saturate, so that both are understated where they are large.

    Example:
        >>> shape(np.array([60, 80, 99] * 50), 99)[2]
        'biased low'
        >>> shape(np.array([0, 50, 99] * 50), 99)[2]
        'too narrow'
    """
    ranks = ranks[ranks != FAILED]
    if len(ranks) < 2:
        return np.nan, np.nan, "failed fits"
    grid = ndtri((np.arange(num_draws + 1) + 0.5) / (num_draws + 1))
    scores = grid[ranks] / grid.std()
    shift, spread = float(scores.mean()), float(scores.std())
    error = len(ranks) ** -0.5
    found = []
    if abs(shift) > CLEAR * error * max(spread, 1.0):
        found.append("biased low" if shift > 0 else "biased high")
    if abs(np.log(max(spread, 1e-3))) > CLEAR * error * 0.5**0.5:
        found.append("too narrow" if spread > 1 else "too wide")
    return shift, spread, " and ".join(found)


def plot(calibration: Any, ax: Any = None) -> Any:
    """ECDF of each scalar's ranks less the uniform one, with the envelope of the verdict.

    A curve that leaves the band is in colour. How to read it: an arch above zero is a fit whose
    draws lie too high, a trough one whose draws lie too low; above zero at the left and below at
    the right are draws that are too narrow, the reverse is too wide.

    Args:
        calibration: what ``calibrate()`` returned.
        ax: matplotlib axes; new ones by default.

    Returns:
        The axes.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
    table, num = calibration.table, calibration.num_simulations
    band = envelope(num, calibration.num_draws)
    share = band.points / (calibration.num_draws + 1)
    low, high = (np.array(side) / num - share for side in band.bounds(calibration.alpha))
    ax.fill_between(share, low, high, color="0.88", zorder=0, label="envelope of uniform ranks")
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    worst = [name for name in table["p_value"].sort_values().index if not table["inside"][name]]
    inside = [name for name in table.index if name not in worst]
    for name in [*inside, *worst]:
        curve = band.counts(calibration.ranks[name]) / num - share
        style = {"color": "0.4", "linewidth": 0.9, "alpha": 0.7}
        if name in worst:
            place = worst.index(name)
            label = f"{name}: {table['hint'][name]}" if place < MOST_LABELS else None
            style = {"color": f"C{place % 10}", "linewidth": 1.4, "label": label, "zorder": 4 - place / 1e6}
        elif name == inside[0]:
            style["label"] = name if len(inside) == 1 else f"{len(inside)} scalars inside"
        ax.plot([0, *share, 1], [0, *curve, 0], **style)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the draws below the true value")
    ax.set_ylabel("ECDF - uniform")
    ax.set_title(f"{calibration.verdict.name}, {num:,} simulations", fontsize=11)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)  # hides no curve
    return ax
