"""KL of a Gaussian, on its own or another scale, to priors of one dimension.

With u ~ N(m, s^2) on the unconstrained scale and z = T(u), KL = -H(s) - E[log p(T(u)) + log T'(u)],
where H(s) = log s + 1/2 log(2 pi e). Expectations are closed, or one-dimensional quadratures that
are exact to rounding.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from ...errors import UnsupportedModelError
from .entropy import normal_entropy
from .forms import LogitNormal
from .quadrature import mean_softplus, normal_mean
from .table import register_kl


def _moments(q: Any) -> tuple[Tensor, Tensor]:
    loc, scale = torch.broadcast_tensors(q.loc, q.scale)
    return loc, scale


@register_kl(td.LogNormal, td.LogNormal)
@register_kl(td.Normal, td.Normal)
def _gaussians(q: Any, p: Any) -> Tensor:
    ratio = (q.scale / p.scale) ** 2
    return 0.5 * (ratio + ((q.loc - p.loc) / p.scale) ** 2 - 1 - ratio.log())


# On the real line


@register_kl(td.Normal, td.Laplace)
def _laplace(q: Any, p: Any) -> Tensor:
    shift = (q.loc - p.loc) / q.scale
    spread = q.scale * (math.sqrt(2 / math.pi) * torch.exp(-0.5 * shift**2))
    distance = spread + (q.loc - p.loc) * torch.erf(shift / math.sqrt(2))
    return (2 * p.scale).log() + distance / p.scale - normal_entropy(q.scale)


@register_kl(td.Normal, td.Gumbel)
def _gumbel(q: Any, p: Any) -> Tensor:
    mean = (q.loc - p.loc) / p.scale
    return p.scale.log() + mean + torch.exp(-mean + 0.5 * (q.scale / p.scale) ** 2) - normal_entropy(q.scale)


@register_kl(td.Normal, dist.Logistic)
def _logistic(q: Any, p: Any) -> Tensor:
    mean, sd = torch.broadcast_tensors((q.loc - p.loc) / p.scale, q.scale / p.scale)
    return p.scale.log() + mean + 2 * mean_softplus(-mean, sd) - normal_entropy(q.scale)


@register_kl(td.Normal, td.Cauchy)
def _cauchy(q: Any, p: Any) -> Tensor:
    return _student(q, torch.ones_like(p.scale), p.loc, p.scale)


@register_kl(td.Normal, td.StudentT)
def _student_t(q: Any, p: Any) -> Tensor:
    return _student(q, p.df, p.loc, p.scale)


def _student_constant(df: Tensor, scale: Tensor) -> Tensor:
    """Log density of a Student t at its centre."""
    half = 0.5 * (df + 1)
    return torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * (math.pi * df).log() - scale.log()


def _student(q: Any, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    mean, sd, df, _ = torch.broadcast_tensors((q.loc - loc) / scale, q.scale / scale, df, scale)
    spread = normal_mean(lambda u: torch.log1p(u**2 / df), mean, sd, df.detach().sqrt())
    return 0.5 * (df + 1) * spread - _student_constant(df, scale) - normal_entropy(q.scale)


# On the positive half-line, through exp


@register_kl(td.LogNormal, td.Gamma)
def _gamma(q: Any, p: Any) -> Tensor:
    a, b = p.concentration, p.rate
    mean = (q.loc + q.scale**2 / 2).exp()
    return torch.lgamma(a) - a * b.log() - a * q.loc + b * mean - normal_entropy(q.scale)


@register_kl(td.LogNormal, td.Exponential)
def _exponential(q: Any, p: Any) -> Tensor:
    mean = (q.loc + q.scale**2 / 2).exp()
    return -p.rate.log() - q.loc + p.rate * mean - normal_entropy(q.scale)


@register_kl(td.LogNormal, dist.InverseGamma)
@register_kl(td.LogNormal, td.InverseGamma)
def _inverse_gamma(q: Any, p: Any) -> Tensor:
    a, b = p.concentration, p.rate
    mean_inverse = (-q.loc + q.scale**2 / 2).exp()
    return torch.lgamma(a) - a * b.log() + a * q.loc + b * mean_inverse - normal_entropy(q.scale)


@register_kl(td.LogNormal, td.HalfNormal)
def _half_normal(q: Any, p: Any) -> Tensor:
    second = (2 * q.loc + 2 * q.scale**2).exp()
    constant = p.scale.log() - 0.5 * math.log(2 / math.pi)
    return constant - q.loc + second / (2 * p.scale**2) - normal_entropy(q.scale)


@register_kl(td.LogNormal, td.Weibull)
def _weibull(q: Any, p: Any) -> Tensor:
    k, log_scale = p.concentration, p.scale.log()
    power = (k * (q.loc - log_scale) + 0.5 * (k * q.scale) ** 2).exp()
    return power - k.log() - k * (q.loc - log_scale) - normal_entropy(q.scale)


@register_kl(td.LogNormal, td.HalfCauchy)
def _half_cauchy(q: Any, p: Any) -> Tensor:
    return _half_student(q, torch.ones_like(p.scale), p.scale)


def _half_student(q: Any, df: Tensor, scale: Tensor) -> Tensor:
    mean, sd, df, _ = torch.broadcast_tensors(q.loc - scale.log(), q.scale, df, scale)
    # log(1 + z^2 / df) is a softplus of 2 u - log df, u the log of z in units of the prior's scale
    spread = mean_softplus(2 * mean - df.log(), 2 * sd)
    constant = math.log(2) + _student_constant(df, scale) + scale.log()
    return 0.5 * (df + 1) * spread - constant - mean - normal_entropy(q.scale)


def _is_half(_: Any, p: Any) -> bool:
    base = p.base_dist
    return type(base) in (dist.Normal, dist.Cauchy, dist.StudentT) and bool((base.loc == 0).all())


@register_kl(td.LogNormal, dist.FoldedDistribution, condition=_is_half)
def _folded(q: Any, p: Any) -> Tensor:
    """|x| for x Normal, Cauchy or Student t round zero."""
    base = p.base_dist
    if not _is_half(q, p):
        raise UnsupportedModelError(
            f"a fold of {type(base).__name__} has left zero: its KL is closed for loc=0 only; "
            'sample it with AnalyticKL_ELBO(analytic="never")'
        )
    if isinstance(base, td.Normal):
        return _half_normal(q, base)
    df = torch.ones_like(base.scale) if isinstance(base, td.Cauchy) else base.df
    return _half_student(q, df, base.scale)


# On an interval, through the sigmoid


def _is_unit(q: Any, _: Any) -> bool:
    """Numbers only: a tensor may move."""
    return not isinstance(q.low, Tensor) and not isinstance(q.width, Tensor) and (q.low, q.width) == (0, 1)


@register_kl(LogitNormal, td.Beta, condition=_is_unit)
def _beta(q: LogitNormal, p: Any) -> Tensor:
    return _logit_beta(q, p.concentration1, p.concentration0)


@register_kl(LogitNormal, td.Uniform)
def _uniform(q: LogitNormal, p: Any) -> Tensor:
    one = torch.ones_like(q.loc)
    return _logit_beta(q, one, one) + ((p.high - p.low) / q.width).log()


def _logit_beta(q: LogitNormal, a: Tensor, b: Tensor) -> Tensor:
    loc, scale = _moments(q)
    above = mean_softplus(loc, scale)
    log_norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return log_norm + (a + b) * above - a * loc - normal_entropy(scale)
