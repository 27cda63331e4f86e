"""`Diagnosis`: how far a fit can be believed, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ..errors import ModelError
from ..fit.edges import sentences
from ..fit.result import VEMResult
from .arrowhead import Vector
from .checks import one_more_step, other_starts, reparameterise, unmoved
from .drift import FAR, SMALL_GAP, drift, of_the_parameters
from .importance import KHAT_LIMIT, MISSING_LIMIT, NUM_DRAWS, Correction, Pool, at_noise, choose, pools
from .rows import RowKhat, row_khat

SHIFT_LIMIT = 0.2  # posterior sds that a mean may be off by
SD_LIMIT = 1.5  # factor that an sd may be off by
GAIN_LIMIT = 0.01  # nats that one more E-step may gain
MOST_SCALARS = 20_000_000  # draws times latents looked at for moments
CORRECTED_DRAWS = 8000  # of the linear response, held against the weighted draws


class Verdict(Enum):
    """Whether to use a fit.

    Example:
        >>> Verdict.GOOD.value
        'Use it: means within 0.2 sd and sds within a factor of 1.5 of the importance-weighted posterior.'
    """

    GOOD = (
        f"Use it: means within {SHIFT_LIMIT} sd and sds within a factor of {SD_LIMIT} of the "
        "importance-weighted posterior."
    )
    USE_WITH_CORRECTION = "Use corrected draws; the guide's own moments are off where the reasons say so."
    UNRELIABLE = "Do not use it as it stands."


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """How far a fit can be believed.

    Attributes:
        khat: Pareto tail index of the guide's own importance weights p / q. A joint measure, strict
            in high dimension: a high one alone does not condemn a fit.
        khat_corrected: the same of draws with the linear-response covariance; nan without one.
        khat_globals: the same of the globals alone, rows of local latents summed out; looked at where the
            others are high and the model has 100 rows or more, else nan.
        rows: k-hat of each row of local latents, globals at their medians; None without rows.
        elbo, elbo_se: evidence lower bound in nats and its standard error, from the same draws.
        gap: evidence by the best weighted draws minus ELBO in nats: about KL(q || p).
        drift: by parameter, the standard errors that a Newton step on the log likelihood would move
            it by: what a loose bound does to estimates. Empty where the gap is next to nothing, and
            where there are no weights or standard errors.
        gradient: norm of the bound's gradient in posterior sds, per square root of dimension.
        gain: nats that one more exact E-step would gain.
        verdict: what to do with the fit.
        correction: which draws to use: None (the guide's), "linear_response" or "psis".
        reasons: why, one sentence each; empty for a good fit with good parameters.
        actions: what to do next, one sentence each.
        notes: what else was seen.
        table: for each site the worst scalar: shift of the guide's mean in posterior sds, its sd
            over the posterior's, the same of the linear response, and linear-response over
            mean-field sd. None where there is nothing to hold the guide against.
        num_draws: draws looked at.

    References:
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?, ICML. Vehtari, Simpson,
        Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).

    Example:
        >>> print(Diagnosis(0.3, -31.6, 0.01, Verdict.UNRELIABLE, reasons=("k-hat is high",)))
        UNRELIABLE. Do not use it as it stands.
        k-hat 0.30 (20,000 draws), ELBO -31.600 +- 0.010
        - k-hat is high
    """

    khat: float
    elbo: float
    elbo_se: float
    verdict: Verdict
    correction: Correction = None
    reasons: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_draws: int = NUM_DRAWS
    khat_corrected: float = float("nan")
    khat_globals: float = float("nan")
    rows: RowKhat | None = field(default=None, compare=False)
    gap: float = float("nan")
    drift: Mapping[str, float] = field(default_factory=dict)
    gradient: float = float("nan")
    gain: float = float("nan")
    table: pd.DataFrame | None = field(default=None, compare=False)

    @property
    def headline(self) -> str:
        """The verdict in a sentence or two."""
        name, advice = self.verdict.name.replace("_", " "), self.verdict.value
        if self.num_draws == 1 and self.verdict is Verdict.GOOD:
            advice = "Converged. No latent is random: there is no posterior to judge."
        if self.correction:
            advice = advice.replace("draws;", f"draws, correction={self.correction!r};")
        far = [name for name, move in self.drift.items() if move > FAR]
        if far and self.verdict is not Verdict.UNRELIABLE:
            advice += f" That is of the latents given the parameters; estimates of {', '.join(far)} are off."
        return f"{name}. {advice}"

    @property
    def numbers(self) -> str:
        """k-hat of all kinds, in a line."""
        if self.num_draws == 1:
            return "no draws"
        parts = [f"k-hat {self.khat:.2f} ({self.num_draws:,} draws)"]
        if np.isfinite(self.khat_corrected):
            parts.append(f"{self.khat_corrected:.2f} with linear response")
        if np.isfinite(self.khat_globals):
            parts.append(f"{self.khat_globals:.2f} of the globals")
        if self.rows is not None:
            row, worst = self.rows.worst
            where = f" (row {row} of {self.rows.plate})" if worst > 0 else ""
            parts.append(f"at most {worst:.2f} by row{where}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        lines = [self.headline, f"{self.numbers}, ELBO {self.elbo:.3f} +- {self.elbo_se:.3f}"]
        lines += [f"- {text}" for text in (*self.reasons, *self.notes)]
        return "\n".join(lines + [f"next: {text}" for text in self.actions])


def diagnose(fit: VEMResult, *, num_draws: int = NUM_DRAWS, restarts: int = 0, seed: int = 1) -> Diagnosis:
    """Judge a fit by weighted draws from its guide and from its linear response.

    Args:
        fit: the result.
        num_draws: draws from each; k-hat needs many (with 1,000 the same fit gives .34 to .77), and
            they are doubled where it is near its limit and not yet known to 0.1.
        restarts: fits from other starts (draws from the prior) to hold this one against.
        seed: of the draws.

    Returns:
        A `Diagnosis`. The parameters theta are held at their estimates: the verdict judges the
        posterior of the latents given them. What a loose bound has done to the estimates is among
        the reasons from one standard error on, and in the notes below that.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor(2.0)}, progress=False)
        >>> fit.diagnose(num_draws=1000).verdict.name
        'GOOD'
    """
    if num_draws < 100:
        raise ValueError(f"num_draws={num_draws}: k-hat needs at least 100 draws")
    gradient, gain = one_more_step(fit) if fit.converged else (float("nan"), float("nan"))
    reasons, actions, notes = _of_the_fit(fit, gain, restarts, seed)
    if fit.setup.problem.guide is None or not fit.setup.objective.specs:
        return _without_draws(fit, seed, reasons, actions, notes)
    is_usual = (num_draws, seed) == (NUM_DRAWS, 1)
    found = fit._pools if is_usual else pools(fit, num_draws, seed)
    guide, best = found[0], choose(found)
    khats = {pool.proposal: pool.khat for pool in found}
    ratio = guide.log_ratio
    verdict, correction, table = _by_draws(fit, found, reasons, actions)
    if guide.no_wider:
        notes.append(f"no wider draws were looked at: {guide.no_wider}")
    gap = best.log_evidence - float(ratio.mean())
    moves: Mapping[str, float] = {}
    if best.is_usable and gap > SMALL_GAP:
        moves = drift(fit, best)
        for texts, more in zip((reasons, actions, notes), of_the_parameters(fit, moves, gap), strict=True):
            texts += more
    rows = row_khat(fit, seed) if np.isfinite(ratio).all() else None
    notes += unmoved(fit) + (rows.notes if rows is not None else [])
    if verdict is not Verdict.UNRELIABLE:
        chosen = f"correction={correction!r}" if correction else ""
        actions.append(
            f"fit.to_arviz({chosen}) to look at it, fit.compare_nuts() to hold it against NUTS"
            + (", fit.diagnose(restarts=4) to look for other modes" if not restarts else "")
        )
    return Diagnosis(
        guide.khat,
        float(ratio.mean()),
        float(ratio.std() / len(ratio) ** 0.5),
        verdict,
        correction,
        tuple(reasons),
        tuple(actions),
        tuple(notes),
        num_draws=len(ratio),
        khat_corrected=khats.get("linear_response", np.nan),
        khat_globals=khats.get("nested", np.nan),
        rows=rows,
        gap=gap,
        drift=moves,
        gradient=gradient,
        gain=gain,
        table=table,
    )


def _of_the_fit(
    fit: VEMResult, gain: float, restarts: int, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Reasons, actions and notes that need no draws: status, one more E-step, other starts."""
    reasons, actions, notes = [], [], sentences(fit.boundary)
    if not fit.converged:
        reasons.append(f"{fit.status.name}: {fit.status.value}")
    elif gain > GAIN_LIMIT:
        reasons.append(f"one more E-step would gain {gain:.2g} nats")
        actions.append("fit again from here: fit_vem(..., init=fit, tol=1e-10)")
    if restarts:
        better, spread = other_starts(fit, restarts, seed)
        notes.append(spread)
        if better is not None:
            reasons.append(better)
            actions.append(
                "fit from several starts and keep the best; modes that are equally good need NUTS or a prior"
            )
    return reasons, actions, notes


def _without_draws(
    fit: VEMResult, seed: int, reasons: list[str], actions: list[str], notes: list[str]
) -> Diagnosis:
    """A fit without a random latent: there is no q to judge."""
    densities = fit.draw(1, seed, "densities")["densities"]
    bound = float(densities["log_p"][0] - densities["log_q"][0])
    if fit.setup.problem.guide is not None:
        latents = ", ".join(repr(site.name) for site in fit.setup.latents)
        reasons = [*reasons, f"the guide has no spread at {latents}: a point, not a posterior"]
    verdict = Verdict.UNRELIABLE if reasons else Verdict.GOOD
    texts = tuple(reasons), tuple(actions), tuple(notes)
    return Diagnosis(np.nan, bound, 0.0, verdict, None, *texts, num_draws=1)


def _by_draws(
    fit: VEMResult, found: tuple[Pool, ...], reasons: list[str], actions: list[str]
) -> tuple[Verdict, Correction, pd.DataFrame | None]:
    """What weighted draws say of a fit, and the table that says why; adds to reasons and actions."""
    guide, best = found[0], choose(found)
    finite = np.isfinite(guide.log_ratio)
    verdict, correction, table = Verdict.UNRELIABLE, None, None
    if not finite.all():
        reasons.append(
            f"{1 - finite.mean():.1%} of the draws have no finite density: the guide leaves the support"
        )
    elif not best.is_usable:
        reasons += _uncovered(found)
        actions += reparameterise(fit)
    elif not reasons:
        table = _moments(fit, guide, best)
        reasons += _unjudged(fit, table)
        if not reasons:
            verdict, correction, own = _judge(table)
            reasons += own
    return verdict, correction, table


def _uncovered(found: tuple[Pool, ...]) -> list[str]:
    """Why no weights can be believed."""
    texts = []
    for pool in found:
        what = {"nested": "globals"}.get(pool.proposal, pool.proposal.replace("_", " "))
        if pool.khat > pool.limit:
            funnel = " where a scale is latent" if pool.limit < KHAT_LIMIT else ""
            texts.append(
                f"k-hat {pool.khat:.2f} of the {what} is above {pool.limit}{funnel}: some region is missed"
            )
        elif pool.missing > MISSING_LIMIT:
            texts.append(f"draws of the {what} miss {pool.missing:.2f} nats of the evidence that others find")
        elif pool.is_narrow:
            texts.append(
                f"weights of the {what} are much more equal than those of wider draws: a region is missed"
            )
        else:
            texts.append(
                f"weights of the {what} rest on {pool.effective:.0f} draws (limit {pool.fewest:.0f})"
            )
    return texts


def _moments(fit: VEMResult, guide: Pool, best: Pool) -> pd.DataFrame:
    """The guide and its linear response held against weighted draws, site by site."""
    scalars = sum(spec.size for spec in fit.setup.objective.specs)
    num = max(1000, MOST_SCALARS // max(1, scalars))

    def values(pool: Pool) -> dict[str, Tensor]:
        return at_noise(fit, {name: noise[:num] for name, noise in pool.noise.items()}, "values")["values"]

    weighted, plain = values(best), values(guide)
    weights = best.weights[:num] / best.weights[:num].sum()
    has_weight = weights > 0  # a draw may be infinite where its weight is zero
    positive = weights[has_weight]
    response: Mapping[str, Tensor] = {}
    try:
        response = fit.sample(min(num, len(guide.weights), CORRECTED_DRAWS), 2, correction="linear_response")
    except ModelError:
        response = {}
    found = {}
    for name, draws in weighted.items():
        x = draws.numpy().reshape(len(draws), -1)[has_weight]
        mean = positive @ x
        sd = np.sqrt(np.maximum(positive @ np.square(x - mean), 0))
        moving = ~(sd <= 1e-12 * (1 + np.abs(mean)))  # what is not a number moves too
        if moving.any():
            shift, ratio = _against(plain[name], mean, sd, moving)
            nothing = np.full_like(shift, np.nan)
            shift_lr, ratio_lr = (
                _against(response[name], mean, sd, moving) if response else (nothing, nothing)
            )
            lifted = ratio_lr / ratio
            found[name] = (
                shift.max(), ratio[_farthest(ratio)], shift_lr.max(), ratio_lr[_farthest(ratio_lr)],
                lifted[_farthest(lifted)],
            )  # fmt: skip
    columns = ["mean_shift", "sd_ratio", "mean_shift_lr", "sd_ratio_lr", "lr_over_mean_field"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("site")


def _unjudged(fit: VEMResult, table: pd.DataFrame) -> list[str]:
    """Latents without a spread, and sites without finite moments."""
    points = [site.name for site in fit.setup.latents if site.name not in table.index]
    texts = (
        [f"the guide has no spread at {', '.join(map(repr, points))}: a point, not a posterior"]
        if points
        else []
    )
    broken = table.index[~np.isfinite(table[["mean_shift", "sd_ratio"]]).all(axis=1)]
    if len(broken):
        texts.append(f"moments of {', '.join(map(repr, broken))} are not finite")
    return texts


def _against(values: Tensor, mean: Vector, sd: Vector, moving: Any) -> tuple[Vector, Vector]:
    """Shifts of the means in sds, and ratios of the sds, scalar by scalar."""
    x = values.numpy().reshape(len(values), -1)[:, moving]
    own = x.std(0)
    return np.abs(x.mean(0) - mean[moving]) / np.maximum(own, sd[moving]), own / sd[moving]


def _farthest(ratio: Vector) -> int:
    """Position of the ratio that is farthest from one."""
    return int(np.argmax(np.abs(np.log(np.maximum(ratio, 1e-300)))))


def _judge(table: pd.DataFrame) -> tuple[Verdict, Correction, list[str]]:
    """The mildest correction under which every site is within its limits."""
    own = _wrong(table, "mean_shift", "sd_ratio")
    if not own:
        return Verdict.GOOD, None, []
    has_response = not table["sd_ratio_lr"].isna().any()
    is_mended = has_response and not _wrong(table, "mean_shift_lr", "sd_ratio_lr")
    return Verdict.USE_WITH_CORRECTION, "linear_response" if is_mended else "psis", own


def _wrong(table: pd.DataFrame, shift: str, ratio: str) -> list[str]:
    """Sites whose moments are beyond their limits, in a sentence for means and one for sds."""
    moved = table[table[shift] > SHIFT_LIMIT][shift]
    scaled = table[~table[ratio].between(1 / SD_LIMIT, SD_LIMIT)][ratio]
    texts = []
    if len(moved):
        texts.append(f"means off by {_listing(moved)} posterior sds")
    if len(scaled):
        texts.append(f"sds at worst {_listing(scaled)} of the posterior's")
    return texts


def _listing(values: pd.Series, most: int = 5) -> str:
    parts = [f"{value:.2f} ({site!r})" for site, value in values.iloc[:most].items()]
    rest = f" and {len(values) - most} sites more" if len(values) > most else ""
    return ", ".join(parts) + rest
