"""KL of vectors and matrices: Gaussians, simplices, correlations, Wishart, mixtures."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .entropy import normal_entropy
from .forms import CorrCholeskyNormal, StickBreakingNormal
from .quadrature import mean_softplus
from .table import divergence, register_kl


@register_kl(td.Normal, td.MultivariateNormal)
def _normal_mvn(q: Any, p: Any) -> Tensor:
    # P = L^-T L^-1, whose diagonal is the sums of squares of the columns of L^-1. One inverse serves all
    # rows that share a factor.
    factor = p._unbroadcasted_scale_tril
    scale, loc = torch.broadcast_tensors(q.scale, q.loc)
    size = p.event_shape[0]
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    shift = ((loc - p.loc).unsqueeze(-2) @ inverse.mT).squeeze(-2)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    quadratic = (inverse.square().sum(-2) * scale.square() + shift.square()).sum(-1)
    return 0.5 * (quadratic - size + log_det) - scale.log().sum(-1)


@register_kl(td.Normal, td.LowRankMultivariateNormal)
def _normal_low_rank(q: Any, p: Any) -> Tensor:
    scale, loc = torch.broadcast_tensors(q.scale, q.loc)
    factor, noise = p.cov_factor, p.cov_diag
    rank = factor.shape[-1]
    # Woodbury: P = D^-1 - D^-1 W C^-1 W' D^-1 with C = 1 + W' D^-1 W = L L'
    scaled = factor / noise.unsqueeze(-1)
    core = torch.eye(rank, dtype=factor.dtype, device=factor.device) + factor.mT @ scaled
    lower = torch.linalg.cholesky(core)
    thin = torch.linalg.solve_triangular(lower, scaled.mT, upper=False)
    diagonal = 1 / noise - thin.square().sum(-2)
    shift = loc - p.loc
    quadratic = (shift**2 / noise).sum(-1) - (thin @ shift.unsqueeze(-1)).square().sum((-2, -1))
    log_det = noise.log().sum(-1) + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (diagonal * scale**2).sum(-1)
    return 0.5 * (trace + quadratic - p.event_shape[0] + log_det) - scale.log().sum(-1)


def _to_normal(q: Any, p: Any, log_det: Tensor) -> Tensor:
    size = q.event_shape[0]
    square = ((q.variance + (q.loc - p.loc) ** 2) / p.scale**2 + 2 * p.scale.log()).sum(-1)
    return 0.5 * (square - size - log_det)


@register_kl(td.MultivariateNormal, td.Normal)
def _mvn_normal(q: Any, p: Any) -> Tensor:
    return _to_normal(q, p, 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1))


@register_kl(td.LowRankMultivariateNormal, td.Normal)
def _low_rank_normal(q: Any, p: Any) -> Tensor:
    log_core = 2 * q._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _to_normal(q, p, q.cov_diag.log().sum(-1) + log_core)


@register_kl(StickBreakingNormal, td.Dirichlet)
def _stick_breaking_dirichlet(q: StickBreakingNormal, p: Any) -> Tensor:
    """Each stick is a logit-Normal: log p(z) + log |J| splits over the sticks."""
    loc, scale = torch.broadcast_tensors(q.loc, q.scale)
    alpha = p.concentration
    sticks = loc.shape[-1]
    offset = torch.arange(sticks, 0, -1, dtype=loc.dtype, device=loc.device).log()
    behind = alpha.sum(-1, keepdim=True) - alpha.cumsum(-1)
    mean = loc - offset
    above = mean_softplus(mean, scale)  # E softplus(u - o); softplus(o - u) is that minus (u - o)
    parts = alpha[..., :-1] * (above - mean) + behind[..., :-1] * above
    log_norm = torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))
    return log_norm + (parts - normal_entropy(scale)).sum(-1)


@register_kl(CorrCholeskyNormal, td.LKJCholesky)
def _tanh_lkj(q: CorrCholeskyNormal, p: Any) -> Tensor:
    """Canonical partial correlations are independent Betas on (-1, 1) under the LKJ density."""
    loc, scale = torch.broadcast_tensors(q.loc, q.scale)
    size = q.event_shape[0]
    _, columns = torch.tril_indices(size, size, -1, device=loc.device)
    c = p.concentration.unsqueeze(-1) + (size - 2 - columns).to(loc.dtype) / 2
    constant = (2 * c - 1) * math.log(2) + 2 * torch.lgamma(c) - torch.lgamma(2 * c)
    # log sech^2 u = 2 log 2 - 2 u - 2 softplus(-2 u)
    log_sech2 = 2 * math.log(2) - 2 * loc - 2 * mean_softplus(-2 * loc, 2 * scale)
    return (constant - c * log_sech2 - normal_entropy(scale)).sum(-1)


@register_kl(td.Wishart, td.Wishart)
def _wisharts(q: Any, p: Any) -> Tensor:
    """Torch's own value comes without a gradient in q."""
    size = q.event_shape[-1]
    df, other = q.df, p.df
    lower, upper = q._unbroadcasted_scale_tril, p._unbroadcasted_scale_tril
    log_det_q = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det_p = 2 * upper.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    ratio = torch.linalg.solve_triangular(upper, lower, upper=False).square().sum((-2, -1))
    index = torch.arange(size, dtype=lower.dtype, device=lower.device) / 2
    digammas = torch.digamma(df.unsqueeze(-1) / 2 - index).sum(-1)
    gammas = (torch.lgamma(other.unsqueeze(-1) / 2 - index) - torch.lgamma(df.unsqueeze(-1) / 2 - index)).sum(
        -1
    )
    return (
        0.5 * other * (log_det_p - log_det_q)
        + 0.5 * df * (ratio - size)
        + gammas
        + 0.5 * (df - other) * digammas
    )


def _mixture(q: Any, p: Any) -> Tensor:
    """KL(q || sum_k w_k p_k) <= -log sum_k w_k exp(-KL(q || p_k)) (Hershey and Olsen, 2007)."""
    components = p._component_distribution
    lifted = _unsqueezed(q, len(components.event_shape))
    kl = divergence(lifted, components)
    return -torch.logsumexp(p._mixture_distribution.logits - kl, dim=-1)


def _unsqueezed(q: Any, event_dim: int) -> Any:
    """Q with a batch dimension of size one on the right, to meet a mixture's components."""
    dim = -1 - event_dim
    return type(q)(q.loc.unsqueeze(dim), q.scale.unsqueeze(dim))


register_kl(td.Normal, td.MixtureSameFamily, is_bound=True)(_mixture)
