"""E log p of negative binomial rows whose total count is random: one-dimensional quadratures.

With k = exp(t) failures and logits l the log density of a count y is

    g(t, y) - log Gamma(y + 1) + y l - (k + y) softplus(l),    g = log Gamma(k + y) - log Gamma(k).

g needs nodes in t alone. E[k softplus(l)] is E[k] times E softplus at another mean: weighting a Gaussian by
exp(t) moves it by its covariance with t.
"""

import torch
from torch import Tensor

from .reduced import after_stirling, mean_of, mean_softplus, slopes_after_stirling


def mean_rising(m: Tensor, s: Tensor, y: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E g(m + s x, y), g(t, y) = log Gamma(exp(t) + y) - log Gamma(exp(t)), by quadrature.

    By what Stirling leaves of either, as differences of large logarithms of Gamma would be rounding.
    Where all rows share m and s, only counts that differ are worked on.

    Args:
        m: means, of one row or of all.
        s: standard deviations likewise.
        y: counts, one a row.
        nodes: of the quadrature, one-dimensional.
        weights: of the nodes.

    Example:
        >>> one, y = torch.ones(1).double(), torch.tensor([0.0, 1.0, 3.0, 1.0]).double()
        >>> t = torch.tensor([2.0]).double().log()
        >>> mean_rising(t, 0 * one, y, 0 * one, one).exp()  # 1, 2, 2 * 3 * 4
        tensor([ 1.0000,  2.0000, 24.0000,  2.0000], dtype=torch.float64)
        >>> mean_rising(t + 40, 0 * one, y, 0 * one, one) / (t + 40)  # a power of k
        tensor([0., 1., 3., 1.], dtype=torch.float64)
    """
    if m.numel() > 1 or s.numel() > 1:
        return mean_of(_rising, _slopes, *torch.broadcast_tensors(m, s, y)[:2], nodes, weights, y)
    kinds, where = y.unique(return_inverse=True)
    m, s = (part.reshape(1).expand(len(kinds)) for part in (m, s))
    return mean_of(_rising, _slopes, m, s, nodes, weights, kinds)[where]


def _rising(t: Tensor, y: Tensor) -> Tensor:
    k = t.exp()
    far = (k + y).log()
    return k * torch.log1p(y / k) + y * far - y + after_stirling(far) - after_stirling(t)


def _slopes(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    k = t.exp()
    total, part = k * torch.log1p(y / k), k / (k + y)
    (near, near_bend), (far, far_bend) = slopes_after_stirling(t), slopes_after_stirling((k + y).log())
    slope = total + far * part - near
    return slope, total - y * part + far_bend * part**2 + far * part * (1 - part) - near_bend


def mean_log_density(
    y: Tensor,
    t: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor],
    c: Tensor,
    nodes: Tensor,
    weights: Tensor,
) -> Tensor:
    """E log p of each row; twice differentiable in all moments.

    Args:
        y: counts.
        t: mean and sd of the log of the total count.
        logits: mean and sd of the logits.
        c: covariance of both.
        nodes: of the quadrature, one-dimensional.
        weights: of the nodes.
    """
    (m_t, s_t), (m_l, s_l) = t, logits
    above = torch.exp(m_t + s_t**2 / 2) * mean_softplus(m_l + c, s_l, nodes, weights)
    above = above + y * (mean_softplus(m_l, s_l, nodes, weights) - m_l)
    return mean_rising(m_t, s_t, y, nodes, weights) - torch.lgamma(y + 1) - above
