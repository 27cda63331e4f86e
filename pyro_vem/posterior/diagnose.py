"""`Diagnosis`: how far a fit can be believed."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor

from ..fit.result import VEMResult

KHAT_LIMIT = 0.7  # Vehtari et al. (2024): above, importance weights have no usable mean
SHIFT_LIMIT = 0.2  # posterior sds
SD_LIMIT = 1.6  # ratio of standard deviations
MOST_SCALARS = 20_000_000  # draws times latents looked at for the shift


class Verdict(Enum):
    """Whether to use a fit.

    Example:
        >>> Verdict.GOOD.value
        'Use it: the guide is close to the posterior as far as its own draws can tell.'
    """

    GOOD = "Use it: the guide is close to the posterior as far as its own draws can tell."
    USE_WITH_CORRECTION = (
        "Weight the draws by exp(lp - log_q), both in sample_stats of fit.to_arviz(): the guide covers "
        "the posterior, but its moments are off where the reasons say so."
    )
    UNRELIABLE = "Do not use it as it stands."


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """How far a fit can be believed.

    Attributes:
        khat: Pareto tail index of the importance weights p / q. Below 0.7 the guide covers the
            posterior well enough for importance sampling; a joint measure, strict in high
            dimension.
        elbo, elbo_se: evidence lower bound in nats and its standard error, from the same draws.
        verdict: what to do with the fit.
        reasons: why, one sentence each; empty for a good fit.
        num_draws: fresh draws looked at.

    References:
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?, ICML. Vehtari, Simpson,
        Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).

    Example:
        >>> print(Diagnosis(0.3, -31.6, 0.01, Verdict.GOOD, (), 20000))
        GOOD. Use it: the guide is close to the posterior as far as its own draws can tell.
        k-hat 0.30, ELBO -31.600 +- 0.010 (20,000 draws)
    """

    khat: float
    elbo: float
    elbo_se: float
    verdict: Verdict
    reasons: tuple[str, ...]
    num_draws: int

    def __repr__(self) -> str:
        lines = [
            f"{self.verdict.name.replace('_', ' ')}. {self.verdict.value}",
            f"k-hat {self.khat:.2f}, ELBO {self.elbo:.3f} +- {self.elbo_se:.3f} ({self.num_draws:,} draws)",
        ]
        return "\n".join(lines + [f"- {reason}" for reason in self.reasons])


def diagnose(fit: VEMResult, *, num_draws: int = 20_000, seed: int = 1) -> Diagnosis:
    """Judge a fit by fresh draws from its guide.

    Args:
        fit: the result.
        num_draws: fresh draws; k-hat needs many (with 1,000 the same fit gives .34 to .77).
        seed: of the draws.

    Returns:
        A `Diagnosis`. The parameters theta are held at their estimates: it judges the posterior
        of the latents given them.

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
    densities = fit.draw(num_draws, seed, "densities")["densities"]
    ratio = (densities["log_p"] - densities["log_q"]).numpy()
    reasons = [] if fit.converged else [f"{fit.status.name}: {fit.status.value}"]
    elbo, se = float(ratio.mean()), float(ratio.std() / len(ratio) ** 0.5)
    if not np.isfinite(ratio).all():
        share = float(np.mean(~np.isfinite(ratio)))
        reasons.append(f"{share:.1%} of the draws have no finite density: the guide leaves the support")
        return Diagnosis(np.inf, elbo, se, Verdict.UNRELIABLE, tuple(reasons), num_draws)
    weights, khat = smoothed_weights(ratio)
    if khat > KHAT_LIMIT:
        reasons.append(
            f"k-hat {khat:.2f} is above {KHAT_LIMIT}: some region of the posterior is missed; "
            "reparameterise the model (pyro.infer.reparam) or hold the fit against NUTS"
        )
    if reasons or fit.setup.problem.guide is None:
        verdict = Verdict.UNRELIABLE if reasons else Verdict.GOOD
        return Diagnosis(khat, elbo, se, verdict, tuple(reasons), num_draws)
    count = sum(value[0].numel() for value in fit.sample(1).values())
    looked = min(num_draws, max(1, MOST_SCALARS // max(1, count)))
    shifts = _shifts(fit.draw(looked, seed, "values")["values"], weights[:looked])
    verdict = Verdict.USE_WITH_CORRECTION if shifts else Verdict.GOOD
    return Diagnosis(khat, elbo, se, verdict, tuple(shifts), num_draws)


def smoothed_weights(log_ratio: Any) -> tuple[Any, float]:
    """Pareto-smoothed normalised weights and k-hat; equal weights and 0 for constant ratios.

    Example:
        >>> smoothed_weights(np.zeros(200))[1]
        0.0
    """
    import arviz as az

    # A guide that is the posterior has constant ratios: no tail to fit.
    if np.ptp(log_ratio) < 1e-6 * (1 + abs(log_ratio[0])):
        return np.full(len(log_ratio), 1 / len(log_ratio)), 0.0
    log_weights, khat = az.psislw(log_ratio - log_ratio.max())
    weights = np.exp(np.asarray(log_weights))
    return weights / weights.sum(), float(khat)


def _shifts(values: Mapping[str, Tensor], weights: Any) -> list[str]:
    """Sites whose importance-weighted mean or sd disagrees with the guide's own."""
    weights = weights / weights.sum()
    found = []
    for name, value in values.items():
        x = value.numpy().reshape(len(value), -1)
        mean, sd = x.mean(0), x.std(0)
        better = weights @ x
        spread = np.sqrt(np.maximum(weights @ x**2 - better**2, 0))
        moving = sd > 1e-12 * (1 + np.abs(mean))
        shift = np.max(np.abs(better - mean)[moving] / np.maximum(sd, spread)[moving], initial=0.0)
        ratio = spread[moving] / sd[moving]
        if shift > SHIFT_LIMIT:
            found.append(f"site {name!r}: importance weights move its mean by {shift:.2f} posterior sd")
        elif np.max(ratio, initial=1.0) > SD_LIMIT or np.min(ratio, initial=1.0) < 1 / SD_LIMIT:
            found.append(f"site {name!r}: importance weights change its sd by a factor beyond {SD_LIMIT:g}")
    return found
