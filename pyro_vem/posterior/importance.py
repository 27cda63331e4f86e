"""Draws with Pareto-smoothed importance weights, and draws corrected by them or by linear response."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.special import gammaln, logsumexp
from torch import Tensor

from ..bound.draws import independent_noise
from ..errors import ModelError
from ..fit.result import VEMResult
from ..model.runtime import isolated
from .arrowhead import Vector
from .checks import latent_scales, reparameterise
from .containers import psis
from .linear_response import LinearResponse, as_noise

Correction: TypeAlias = Literal["linear_response", "psis"] | None

KHAT_LIMIT = 0.7  # Vehtari et al. (2024): above, importance weights have no usable mean
FUNNEL_LIMIT = 0.55  # the same where a scale is latent: a funnel's k-hat is often 0.6, and its means wrong
NEARLY_EQUAL = 0.8  # effective share of the best possible above which the tail of weights is harmless
MISSING_LIMIT = (
    0.1  # nats of evidence that draws may miss: wrong fits miss 0.12 or more, right ones 0.1 or less
)
FEWEST_EFFECTIVE = 200.0  # draws that weighted moments may rest on
EFFICIENCY = 0.2  # of the effective draws that ought to be left: below, k-hat can be lucky
NUM_DRAWS, MOST_DRAWS = 20_000, 80_000
SPREAD = 0.1  # standard error of k-hat that is small enough
MOST_DENSE = 4000  # latents of which the joint density is computed
MOST_JOINT = 1000  # latents beyond which no joint weights with correlations are tried
MOST_SCALARS = 40_000_000  # draws times latents kept
MOST_DENSITIES = 300_000_000  # draws times rows evaluated
MOST_RUNS = 4_000  # draws that each take a run of the model
TAILS = 7.0  # degrees of freedom of the linear-response proposal: weights need heavier tails than a Normal's


@dataclass(frozen=True, eq=False)
class Pool:
    """Draws from a proposal, with weights for the posterior.

    Attributes:
        proposal: "guide", "linear_response" (a t with its covariance) or "nested".
        log_ratio: log p - log q, (draws,).
        log_weights: smoothed and normalised, (draws,).
        khat: Pareto tail index of the ratios.
        best: effective number of draws if the posterior were the Normal that the proposal follows.
        noise: what the guide makes the draws from, by site.
        limit: of k-hat.
        missing: nats by which another proposal finds more evidence than this one.
        is_narrow: whether weights are much less equal on wider draws, of the linear response: there is
            mass where this proposal makes next to no draws, and its own weights cannot tell.
        no_wider: why there are no wider draws to hold this one against; empty if there are.
    """

    proposal: str
    log_ratio: Vector
    log_weights: Vector
    khat: float
    best: float
    noise: Mapping[str, Tensor]
    limit: float = KHAT_LIMIT
    missing: float = 0.0
    is_narrow: bool = False
    no_wider: str = ""

    @property
    def spread(self) -> float:
        """Standard error of k-hat: (1 + k) / sqrt(tail), that of a generalised Pareto fit."""
        n = len(self.log_ratio)
        return (1 + max(self.khat, 0.0)) / min(n / 5, 3 * n**0.5) ** 0.5

    @functools.cached_property
    def weights(self) -> Vector:
        """Exponentials of the log weights."""
        return np.exp(self.log_weights)

    @property
    def effective(self) -> float:
        """Effective number of draws."""
        return float(1 / np.square(self.weights).sum())

    @property
    def share(self) -> float:
        """Effective draws as a part of the best possible."""
        return self.effective / self.best

    @property
    def log_evidence(self) -> float:
        """Log of the mean smoothed ratio: an estimate of log p(data), in nats."""
        n = len(self.log_ratio)
        tail = -(-n // 5)  # at most: what smoothing changes
        body = int(np.argsort(self.log_ratio)[n - tail - 1])
        return float(self.log_ratio[body] - self.log_weights[body] - np.log(n))

    @property
    def is_usable(self) -> bool:
        """Whether weighted moments can be believed."""
        if self.missing > MISSING_LIMIT or self.is_narrow or not np.isfinite(self.khat):
            return False
        # Of raw weights too: smoothing may level a tail in which one draw holds a tenth of the mass.
        is_equal = min(effective_of(self.log_ratio), self.effective) > NEARLY_EQUAL * self.best
        return is_equal or (self.khat <= self.limit and self.effective >= self.fewest)

    @property
    def fewest(self) -> float:
        """Effective draws that are asked for.

        A funnel (a centred hierarchy whose scale piles up at zero) may show a k-hat of 0.6 by luck,
        and a tenth of the effective draws that it should.
        """
        return max(FEWEST_EFFECTIVE, EFFICIENCY * self.best if self.proposal != "guide" else 0.0)

    def resampled(self, num: int, seed: int) -> dict[str, Tensor]:
        """Noise of `num` draws, each drawn as often as its weight says (systematic resampling)."""
        generator = np.random.default_rng(seed)
        points = (np.arange(num) + generator.random()) / num
        index = np.searchsorted(np.cumsum(self.weights), points * self.weights.sum())
        chosen = torch.as_tensor(generator.permutation(np.minimum(index, len(self.weights) - 1)))
        return {name: value.index_select(0, chosen) for name, value in self.noise.items()}


def effective_of(log_weights: Vector) -> float:
    """Effective number of draws with these weights, which need not be normalised."""
    return float(np.exp(2 * logsumexp(log_weights) - logsumexp(2 * log_weights)))


def as_pool(proposal: str, log_ratio: Vector, best: float, noise: Mapping[str, Tensor]) -> Pool:
    """A pool with its smoothed weights."""
    log_weights, khat = psis(log_ratio)
    return Pool(proposal, log_ratio, log_weights, khat, best, noise)


def guide_pool(fit: VEMResult, num_draws: int, seed: int) -> Pool:
    """Draws from the guide itself."""

    def noise(num: int) -> tuple[dict[str, Tensor], Vector, float]:
        generator = torch.Generator().manual_seed(seed)
        return independent_noise(fit.setup.objective.specs, num, generator), np.zeros(num), float(num)

    return _pool(fit, "guide", noise, num_draws)


def response_pool(fit: VEMResult, response: LinearResponse, num_draws: int, seed: int) -> Pool:
    """Draws from a t distribution with the linear-response covariance.

    Raises:
        ModelError: where the latents are too many for their joint density.
    """
    proposal = _Elliptic.of(response, TAILS)
    normal = replace(proposal, tails=np.inf)

    def noise(num: int) -> tuple[dict[str, Tensor], Vector, float]:
        points, log_q = proposal.draw(num, np.random.default_rng(seed))
        log_ratio = normal.density(points) - log_q
        best = effective_of(log_ratio)
        return as_noise(fit, response, points), log_q - _factor_density(response, points), best

    return _pool(fit, "linear_response", noise, num_draws)


def _pool(fit: VEMResult, name: str, noise: Any, num_draws: int) -> Pool:
    """Twice as many draws until k-hat is known well enough, or its spread does not matter."""
    most = affordable(fit, MOST_DRAWS)
    num = min(num_draws, most)
    while True:
        drawn, extra, best = noise(num)
        densities = at_noise(fit, drawn, "densities")["densities"]
        ratio = (densities["log_p"] - densities["log_q"]).numpy() - extra
        pool = as_pool(name, ratio, best, drawn)
        is_known = pool.spread < SPREAD or abs(pool.khat - KHAT_LIMIT) > 4 * pool.spread
        if is_known or num_draws < NUM_DRAWS or 2 * num > most:
            return pool
        num *= 2


def affordable(fit: VEMResult, num_draws: int) -> int:
    """As many draws as memory and time allow, at least 1,000."""
    objective = fit.setup.objective
    scalars = sum(spec.size for spec in objective.specs)
    one = objective.sample(fit.guide_params, fit.params, 1, 0, ("log_likelihood",))["log_likelihood"]
    rows = sum(value.numel() for value in one.values())
    most = min(MOST_SCALARS // max(1, scalars), MOST_DENSITIES // max(1, rows))
    if not objective.is_vectorised:
        most = min(most, MOST_RUNS)
    return min(num_draws, max(1000, most))


def at_noise(fit: VEMResult, noise: Mapping[str, Tensor], *keep: str) -> dict[str, dict[str, Tensor]]:
    """Groups of `pyro_vem.bound.objective.Objective.sample` at given noise."""
    num = len(next(iter(noise.values())))
    with isolated(torch.float64):
        return fit.setup.objective.sample(fit.guide_params, fit.params, num, 0, keep, noise=noise)


def corrected(
    fit: VEMResult, num: int, seed: int, keep: tuple[str, ...], correction: str
) -> dict[str, dict[str, Tensor]]:
    """Groups at corrected draws; their log_q is the density that the draws follow.

    Raises:
        ValueError: for an unknown correction.
        ModelError: if the correction cannot be had for this fit; the message says why.
    """
    if correction == "linear_response":
        response = fit._linear_response
        points = response.draws(num, np.random.default_rng(seed))
        groups = at_noise(fit, as_noise(fit, response, points), *keep)
        if "densities" in groups:
            log_q = _Elliptic.of(response, np.inf).density(points) - _factor_density(response, points)
            groups["densities"]["log_q"] = groups["densities"]["log_q"] + torch.as_tensor(log_q)
        return groups
    if correction == "psis":
        pool = usable_pool(fit)
        groups = at_noise(fit, pool.resampled(num, seed), *keep)
        if "densities" in groups:
            groups["densities"]["log_q"] = groups["densities"]["log_p"] - pool.log_evidence
        return groups
    raise ValueError(f"correction={correction!r}: choose None, 'linear_response' or 'psis'")


def best_pool(fit: VEMResult) -> Pool:
    """The pool to weight: usable before not, then the lower k-hat.

    Raises:
        ModelError: if no latent is random.
    """
    if not fit.setup.objective.specs:
        raise ModelError("nothing to weight: no latent is random in this fit")
    return choose(fit._pools)


def usable_pool(fit: VEMResult) -> Pool:
    """The best pool.

    Raises:
        ModelError: if its weights cannot be believed; the message names a remedy.
    """
    pool = best_pool(fit)
    if not pool.is_usable:
        remedy = "; or ".join(reparameterise(fit))
        raise ModelError(
            f"no importance weights for this fit: k-hat {pool.khat:.2f} (limit {pool.limit}), "
            f"{pool.effective:.0f} effective draws (limit {pool.fewest:.0f}); {remedy}"
        )
    return pool


def choose(found: tuple[Pool, ...]) -> Pool:
    """The best of some pools."""
    return min(found, key=lambda pool: (not pool.is_usable, pool.khat))


def pools(fit: VEMResult, num_draws: int = NUM_DRAWS, seed: int = 1) -> tuple[Pool, ...]:
    """Weighted draws from the guide, its linear response, and last, if none is usable, nested ones."""
    from .nested import nested_pool

    limit = FUNNEL_LIMIT if latent_scales(fit) else KHAT_LIMIT
    found, no_wider = [guide_pool(fit, num_draws, seed)], ""
    try:
        if len(fit._linear_response.loc) <= MOST_JOINT:
            found.append(response_pool(fit, fit._linear_response, num_draws, seed + 1))
        else:
            no_wider = f"joint weights of more than {MOST_JOINT:,} latents are no use"
    except ModelError as error:
        no_wider = str(error)
    guide, wider = found[0], found[1:]
    missing = max(pool.log_evidence for pool in found) - guide.log_evidence
    is_narrow = any(pool.share < EFFICIENCY * guide.share for pool in wider)
    guide = replace(guide, missing=missing, is_narrow=is_narrow, no_wider=no_wider)
    found = [replace(pool, limit=limit) for pool in (guide, *wider)]
    if not any(pool.is_usable for pool in found):
        with contextlib.suppress(ModelError):
            nested = nested_pool(fit, fit._linear_response, seed + 2, num_draws // 5)
            found += [replace(nested, limit=limit)] if nested is not None else []
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Elliptic:
    """A multivariate t (or Normal) with the linear-response covariance matrix as its scale."""

    response: LinearResponse
    root: Vector  # lower triangular
    tails: float

    @classmethod
    def of(cls, response: LinearResponse, tails: float) -> "_Elliptic":
        if len(response.loc) > MOST_DENSE:
            raise ModelError(f"no joint density with correlations beyond {MOST_DENSE:,} latents")
        root: Vector = np.linalg.cholesky(response.covariance()).astype(np.float64)
        return cls(response, root, tails)

    def draw(self, num: int, generator: np.random.Generator) -> tuple[Vector, Vector]:
        noise = generator.standard_normal((num, len(self.root)))
        if np.isfinite(self.tails):
            noise /= np.sqrt(generator.chisquare(self.tails, num) / self.tails)[:, None]
        points = self.response.loc + noise @ self.root.T
        return points, self._density(np.square(noise).sum(1))

    def density(self, points: Vector) -> Vector:
        noise = solve_triangular(self.root, (points - self.response.loc).T, lower=True)
        return self._density(np.square(noise).sum(0))

    def _density(self, square: Vector) -> Vector:
        return t_density(square, len(self.root), self.tails) - np.log(np.diag(self.root)).sum()


def t_density(square: Vector, dim: int, tails: float) -> Vector:
    """Log density of a standard t in some dimensions, or of a Normal, at squared distances from zero."""
    if not np.isfinite(tails):
        return -0.5 * square - 0.5 * dim * np.log(2 * np.pi)
    norm = gammaln((tails + dim) / 2) - gammaln(tails / 2) - 0.5 * dim * np.log(tails * np.pi)
    return norm - 0.5 * (tails + dim) * np.log1p(square / tails)


def _factor_density(response: LinearResponse, points: Vector) -> Vector:
    """Density of the guide's own factors on the unconstrained scale."""
    noise = (points - response.loc) / response.scale
    constant = np.log(response.scale).sum() + 0.5 * len(response.loc) * np.log(2 * np.pi)
    return -0.5 * np.square(noise).sum(1) - constant
