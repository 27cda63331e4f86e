"""E log p of Student t and Cauchy rows: at most two-dimensional quadratures, whatever of them is random.

With nu = exp(d) and t = log scale + d / 2 the log density of a residual r is

    A(d) - log(pi) / 2 - log scale - (1 + nu) h(r, t) / 2,    h = log(1 + r^2 exp(-2 t)).

A needs nodes in d alone. E[nu h] is E[nu] times E[h] at other means: weighting a Gaussian by exp(d) moves
it by its covariance with d. So degrees of freedom are no third dimension.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kl.quadrature import softplus
from .reduced import MOST_AT_NODES, Rows, mean_of, reduced

LARGE = math.log(30.0)  # of a, from where the series is exact to rounding
SERIES = {1: -1 / 8, 3: 1 / 192, 5: -1 / 640, 7: 17 / 14336}  # of log Gamma(a + 1/2) / Gamma(a) / sqrt(a)


def mean_normaliser(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E A(m + s x), A(d) = log Gamma((nu + 1) / 2) - log Gamma(nu / 2) - d / 2, by quadrature.

    A tends to -log(2) / 2 for many degrees of freedom: it is their series there, as differences of large
    logarithms of Gamma would be rounding.

    References:
        Tricomi and Erdelyi (1951), The asymptotic expansion of a ratio of gamma functions, Pacific
        Journal of Mathematics 1.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> log_df = torch.tensor([0.0, 40.0]).double()
        >>> mean_normaliser(log_df, 0 * one, 0 * one, one).exp()  # 1 / sqrt(pi), 1 / sqrt(2)
        tensor([0.5642, 0.7071], dtype=torch.float64)
    """
    return mean_of(_normaliser, _slopes, m, s, nodes, weights)


def _normaliser(d: Tensor) -> Tensor:
    log_a = d - math.log(2.0)
    a, u = log_a.clamp(max=LARGE).exp(), torch.exp(-log_a.clamp(min=LARGE))
    below = torch.lgamma(a + 0.5) - torch.lgamma(1 + a) + log_a - d / 2
    above = -0.5 * math.log(2.0) + sum(c * u**k for k, c in SERIES.items())
    return torch.where(log_a < LARGE, below, above)


def _slopes(d: Tensor) -> tuple[Tensor, Tensor]:
    log_a = d - math.log(2.0)
    a, u = log_a.clamp(max=LARGE).exp(), torch.exp(-log_a.clamp(min=LARGE))
    first = a * (torch.digamma(a + 0.5) - torch.digamma(1 + a)) + 1
    trigamma = torch.special.polygamma(1, a + 0.5) - torch.special.polygamma(1, 1 + a)
    second = first - 1 + a * a * trigamma
    first_above = -sum(k * c * u**k for k, c in SERIES.items())
    second_above = sum(k * k * c * u**k for k, c in SERIES.items())
    is_low = log_a < LARGE
    return torch.where(is_low, first - 0.5, first_above), torch.where(is_low, second, second_above)


def mean_tail(
    mean: Mapping[str, Tensor], cov: Mapping[str, Tensor], nodes: Tensor, weights: Tensor
) -> Tensor:
    """E h(r, t), r and t jointly Gaussian, by quadrature; twice differentiable in all moments.

    Args:
        mean: means of "r" and "t", any shape.
        cov: covariances "rr", "rt" and "tt", those that are not zero everywhere.
        nodes: of the quadrature, in each dimension that is random.
        weights: of the nodes.

    Example:
        >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
        >>> mean_tail({"r": one, "t": zero}, {}, zero, one).exp()  # 1 + r^2
        tensor([2.], dtype=torch.float64)
    """
    zero = torch.zeros((), dtype=torch.float64)
    by_t = cov["tt"].clamp_min(1e-300).sqrt() if "tt" in cov else zero
    shared = cov["rt"] / by_t if "rt" in cov and "tt" in cov else zero
    own = (cov["rr"] - shared * shared).clamp_min(1e-300).sqrt() if "rr" in cov else zero
    inputs = torch.broadcast_tensors(mean["r"], shared, own, mean["t"], by_t)
    single = nodes.new_zeros(1), weights.new_ones(1)
    (x, w), (y, v) = ((nodes, weights) if key in cov else single for key in ("tt", "rr"))
    x, y = (part.reshape(-1) for part in torch.meshgrid(x, y, indexing="ij"))
    powers = (w.unsqueeze(1) * v).reshape(-1) * torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])
    is_value = not any(part.requires_grad for part in inputs)
    with torch.no_grad():
        flat = torch.stack([part.reshape(-1) for part in inputs])
        parts = flat.split(max(1, MOST_AT_NODES // len(x)), 1)
        found = torch.cat([_at_nodes(part, x, y, powers, is_value) for part in parts], 1)
        found = found.reshape(len(found), *inputs[0].shape)
    return found[0] if is_value else reduced(_rows(found), *inputs)


def _at_nodes(inputs: Tensor, x: Tensor, y: Tensor, powers: Tensor, is_value: bool) -> Tensor:
    """Sums over nodes: of h, and of its derivatives times monomials in the nodes."""
    m_r, shared, own, m_t, by_t = inputs
    x, y = x.unsqueeze(1), y.unsqueeze(1)
    r, t = m_r + shared * x + own * y, m_t + by_t * x
    value = powers[:1] @ softplus(2 * (r.abs().log() - t))
    if is_value:
        return value
    rate = torch.exp(-t)
    z = r * rate
    kept = 1 / (1 + z * z)
    by_r, square = 2 * z * rate * kept, z * z * kept
    rr, rt, tt = 2 * rate * rate * (1 - z * z) * kept**2, -2 * by_r * kept, 4 * square * kept
    sums = [powers[:3] @ by_r, powers[:2] @ (-2 * square), powers @ rr, powers[:5] @ rt, powers[:4] @ tt]
    return torch.cat([value, *sums])


def _rows(found: Tensor) -> Rows:
    """`_at_nodes` as derivatives in (mean of r, its part in x, its part in y, mean of t, its part in x)."""
    value, slopes, rr, rt, tt = found[0], found[1:6], found[6:12], found[12:17], found[17:21]
    bends: dict[Any, Tensor] = {
        (0, 0): rr[0], (0, 1): rr[1], (0, 2): rr[2], (1, 1): rr[3], (1, 2): rr[4], (2, 2): rr[5],
        (0, 3): rt[0], (0, 4): rt[1], (1, 3): rt[1], (1, 4): rt[3], (2, 3): rt[2], (2, 4): rt[4],
        (3, 3): tt[0], (3, 4): tt[1], (4, 4): tt[3],
    }  # fmt: skip
    return Rows(value, tuple(slopes), bends)
