"""Weights of the globals alone, the rows of a plate summed out: for models with many local latents.

A joint k-hat grows with the number of rows, however well each is fitted. Here only the globals are
weighted; the latents of each row are integrated by a few draws of their own, given the globals.
"""

import numpy as np
from scipy import optimize
from scipy.special import logsumexp, ndtri

from ..fit.result import VEMResult
from .arrowhead import Arrowhead, Indices, Vector
from .importance import TAILS, Pool, affordable, as_pool, at_noise, effective_of, t_density
from .linear_response import LinearResponse, as_noise
from .rows import by_owner, owners_of

FEWEST_ROWS = 100  # below, the joint weights are the better judge
NUM_DRAWS, INNER = 4000, 16  # of the globals, and of each row for every one of those
WIDER = 1.2  # sds of the inner points over those of linear response: weights stay bounded
CHUNK = 128  # draws of the globals at a time


def nested_pool(
    fit: VEMResult, response: LinearResponse, seed: int, num_draws: int = NUM_DRAWS
) -> Pool | None:
    """Draws of the globals from a t distribution, with one draw of each row's latents given them.

    For each draw of the globals, a randomly shifted lattice of 16 points estimates each row's
    marginal likelihood, and one of the points is kept, chosen by its weight: it follows the row's
    posterior given the globals, so that the globals' weights are the draw's. (With independent
    points instead, errors of 2,000 rows add up to 6 nats.)

    Returns:
        None where the model has fewer than 100 rows, or rows that cannot be told apart.

    References:
        Tran, Scharth, Pitt and Kohn (2013), Importance sampling squared, arXiv:1309.3339.
    """
    inverse = response.inverse
    if not isinstance(inverse, Arrowhead) or inverse.plate is None or inverse.plate.size < FEWEST_ROWS:
        return None
    plate = inverse.plate
    owners = owners_of(fit, plate, [s for s in fit.setup.objective.specs if plate in s.plates])
    if owners is None:
        return None
    row = inverse.row_of(response.where)
    local = np.argsort(row, kind="stable")[(row < 0).sum() :].reshape(plate.size, -1)
    rest = np.flatnonzero(row < 0)
    if not len(rest):
        return None
    sampler = _Sampler(response, inverse, local, rest)
    generator = np.random.default_rng(seed)
    num = max(200, affordable(fit, num_draws * INNER) // INNER)
    kept, ratios = [], []
    for start in range(0, num, CHUNK):
        size = min(CHUNK, num - start)
        points, log_q_rest, log_q_rows = sampler.draw(size, generator)
        densities = at_noise(fit, as_noise(fit, response, points), "model_rows", "guide_rows")
        rows, others = by_owner(densities, owners, plate.size)
        noise = (points - response.loc) / response.scale  # the guide's own density, taken out again
        own = -0.5 * np.square(noise) - np.log(response.scale) - 0.5 * np.log(2 * np.pi)
        rows = (rows + own[:, local].sum(2)).reshape(size, INNER, -1) - log_q_rows
        others = (others + own[:, rest].sum(1)).reshape(size, INNER)[:, 0]
        chosen = (rows + generator.gumbel(size=rows.shape)).argmax(1)  # (size, rows)
        joint = points.reshape(size, INNER, -1)
        best = joint[:, 0].copy()
        best[:, local] = joint[np.arange(size)[:, None, None], chosen[:, :, None], local]
        kept.append(best)
        ratios.append(others - log_q_rest + (logsumexp(rows, axis=1) - np.log(INNER)).sum(1))
    return as_pool(
        "nested", np.concatenate(ratios), sampler.best(num), as_noise(fit, response, np.concatenate(kept))
    )


class _Sampler:
    """Globals from a t, rows given them from wider Normals with the linear-response conditionals."""

    def __init__(self, response: LinearResponse, inverse: Arrowhead, local: Indices, rest: Indices) -> None:
        self.response, self.local, self.rest = response, local, rest
        lengths, where = response.lengths, response.where
        self.root = np.linalg.cholesky(response.covariance(rest))
        gain, blocks = inverse.given(where[local], where[rest])
        self.gain = gain * lengths[local][:, :, None] / lengths[rest]
        scale = lengths[local]
        self.roots = np.linalg.cholesky(blocks * scale[:, :, None] * scale[:, None, :])

    def draw(self, num: int, generator: np.random.Generator) -> tuple[Vector, Vector, Vector]:
        """Points (num * INNER, scalars), log density of the globals (num,) and of rows (num, INNER, rows)."""
        loc, rows, width = self.response.loc, *self.local.shape
        z, log_q_rest = _t(generator, (num,), len(self.rest))
        shift = z @ self.root.T
        inner, log_q_rows = _lattice(generator, num, rows, width)
        points = np.empty((num, INNER, len(loc)))
        points[:, :, self.rest] = (loc[self.rest] + shift)[:, None]
        centre = loc[self.local] + np.einsum("rbg,ng->nrb", self.gain, shift)
        points[:, :, self.local] = centre[:, None] + np.einsum("rbc,nkrc->nkrb", self.roots, inner)
        log_root = np.log(np.diagonal(self.roots, axis1=1, axis2=2)).sum(1)
        log_q_rest = log_q_rest - np.log(np.diag(self.root)).sum()
        return points.reshape(num * INNER, -1), log_q_rest, log_q_rows - log_root

    def best(self, num: int) -> float:
        """Effective draws of the globals if their posterior were Normal."""
        z, log_q = _t(np.random.default_rng(0), (num,), len(self.rest))
        return effective_of(-0.5 * np.square(z).sum(1) - log_q)


def _lattice(generator: np.random.Generator, num: int, rows: int, width: int) -> tuple[Vector, Vector]:
    """Points (num, INNER, rows, width) of a Normal with sd WIDER, a shifted lattice each, and their density.

    One dimension is stratified; more follow the generalised golden ratio (Roberts 2018).
    """
    ratio = optimize.brentq(lambda x: x ** (width + 1) - x - 1, 1.0, 2.0)
    steps = np.full(1, 1 / INNER) if width == 1 else ratio ** -np.arange(1.0, width + 1)
    shift = generator.random((num, 1, rows, width))
    z = ndtri((np.arange(INNER)[:, None, None] * steps + shift) % 1)
    z = np.clip(z, -8, 8)  # a shift of exactly zero
    density = -0.5 * np.square(z).sum(-1) - width * (np.log(WIDER) + 0.5 * np.log(2 * np.pi))
    return WIDER * z, density


def _t(generator: np.random.Generator, shape: tuple[int, ...], width: int) -> tuple[Vector, Vector]:
    """Draws of a standard t in `width` dimensions, and their log density."""
    z = generator.standard_normal((*shape, width))
    z /= np.sqrt(generator.chisquare(TAILS, shape) / TAILS)[..., None]
    return z, t_density(np.square(z).sum(-1), width, TAILS)
