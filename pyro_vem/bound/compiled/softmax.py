"""Categories in any number: the mean of log sum exp of independent Gaussians, by one integral.

With Gumbel noise added to each, the largest of some numbers a_k is Gumbel about log sum exp(a). Its
distribution function is a product over k, whose mean is that of each factor if the a_k are independent:

    E log sum_k exp(a_k) = c + int [exp(-exp(c - x)) - prod_k E exp(-exp(a_k - x))] dx

for any c. With c = log E sum exp(a) both parts agree in their tails but for exp(-2 x), and the trapezoid rule
has thirteen digits at a step of 0.32. A tensor grid would have as many dimensions as there are categories.

Yellott (1977), The relationship between Luce's choice axiom, Thurstone's theory of comparative judgment, and
the double exponential distribution, J. Math. Psychol. 15. Trefethen and Weideman (2014), The exponentially
convergent trapezoidal rule, SIAM Rev. 56(3).
"""

import math

import torch
from torch import Tensor

from .reduced import MOST_AT_NODES, Square, reduced_together

STEP = 0.32  # of the trapezoid rule: it is right to exp(-pi^2 / STEP)
LEFT = 3.4  # below the least exponential of the largest: exp(-exp(LEFT)) is left
RIGHT = 15.0  # beyond the mean of their sum: exp(-2 RIGHT) is left
TINY = 1e-290  # of a factor that is divided by
FLAT = 7.0  # log of a number u from which exp(-u) is zero
POINTS, WIDENED = 70, 0.7  # of the trapezoid rule, as a rule, and times as many for each sd
WIDE = 10.0  # largest sd that the integral is kept for: farther out rows take hundreds of points
MOST_POINTS = 6_000  # enough for sds of a hundred, that steps may pass by: with fewer values are noise


def mean_log_sum(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E log sum_k exp(m_k + s_k z_k), z_k ~ N(0, 1) independent; twice differentiable in m and s.

    Args:
        m: means, (categories, ...).
        s: standard deviations, of the same shape.
        nodes: of a quadrature of N(0, 1), for each factor by itself.
        weights: of the nodes.

    Example:
        >>> m, none, one = torch.zeros(6, 1).double(), torch.zeros(1).double(), torch.ones(1).double()
        >>> mean_log_sum(m, 0 * m, none, one).exp().round(decimals=9)
        tensor([6.], dtype=torch.float64)
    """
    shape, num = m.shape[1:], len(m)
    is_value = not (m.requires_grad or s.requires_grad)
    with torch.no_grad():
        every = (part.reshape(num, -1) for part in (m, s))
        wide = max(1.0, float(s.nan_to_num().max()) * WIDENED)
        few = max(1, int(MOST_AT_NODES / (num * POINTS * len(nodes) * wide)))
        pieces = zip(*(part.split(few, 1) for part in every), strict=True)
        parts = [_few(a, b, nodes, weights, is_value) for a, b in pieces]
        found = [torch.cat(one, -1) for one in zip(*parts, strict=True)]
    if is_value:
        return found[0].reshape(shape)
    return reduced_together(Square(*found), torch.cat([m, s]).reshape(2 * num, -1)).reshape(shape)


def _few(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor, is_value: bool) -> tuple[Tensor, ...]:
    """Value, slopes and bends of few rows; the value alone where no more is asked for."""
    x, step, centre = _grid(m, s, nodes, weights)
    above = (m.unsqueeze(1) - x).unsqueeze(-1) + s[:, None, :, None] * nodes  # (categories, x, rows, nodes)
    u = above.clamp_(max=FLAT).exp_()
    density = torch.neg(u).exp_()
    factors = density @ weights
    whole = factors.prod(0)
    value = centre + step * (torch.exp(-torch.exp(centre - x)) - whole).sum(0)
    if is_value:
        return (value,)
    powers = torch.stack([weights, weights * nodes, weights * nodes * nodes], -1)
    slope = density.mul_(u)  # minus the derivative of exp(-u) in log u
    first = slope @ -powers[:, :2]
    second = slope.mul_(u.sub_(1)) @ powers
    safe = factors.clamp_min(TINY).unsqueeze(-1)
    ratios = (first / safe).movedim(-1, 0).flatten(0, 1)  # in all means, then in all sds
    slopes = -step * (whole * ratios).sum(1)
    by_row = ratios.permute(2, 0, 1).contiguous()
    bends = -step * ((by_row * whole.T.unsqueeze(1)) @ by_row.mT).permute(1, 2, 0)
    own = -step * (whole.unsqueeze(-1) * second / safe).sum(1)  # of one factor: (categories, rows, 3)
    k = torch.arange(len(m))
    bends[k, k], bends[k + len(m), k + len(m)] = own[..., 0], own[..., 2]
    bends[k, k + len(m)] = bends[k + len(m), k] = own[..., 1]
    return value, slopes, bends


def _grid(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> tuple[Tensor, float, Tensor]:
    """Points x of each row, their distance, and the log of the mean of the sum of exponentials."""

    def log_mean(times: int) -> Tensor:
        return torch.logsumexp(times * s.unsqueeze(-1) * nodes + weights.log(), -1)

    centre = torch.logsumexp(m + log_mean(1), 0)
    right = centre + RIGHT + (log_mean(2) / 2 - log_mean(1)).amax(0)
    left = (m + s * nodes.min()).amax(0) - LEFT
    span = float((right - left).max())
    number = min(MOST_POINTS, math.ceil(span / STEP)) if math.isfinite(span) else 1
    step = max(STEP, span / number)
    return left + step * torch.arange(number, dtype=m.dtype).unsqueeze(1), step, centre
