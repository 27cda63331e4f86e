"""KL between distributions of one dimension that are not Gaussian: conjugate blocks, torch's good pairs."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from ...model.density import sum_last
from .entropy import EULER, HALF_LOG_2_PI, negative_entropy
from .forms import LogitNormal
from .quadrature import exponential_mean
from .table import register_kl

# Factors, and the priors for which torch has a formula that agrees with quadrature in value and in both
# gradients. Left out: pairs that are infinite by support, Wishart (no gradient), folded and Bregman
# fallbacks, in-place ones.
for _q, *_priors in (
    (td.Gamma, td.Gamma, td.Exponential, td.Normal),
    (td.Exponential, td.Gamma, td.Exponential, td.Normal),
    (td.Beta, td.Beta, td.Normal),
    (td.Laplace, td.Laplace, td.Normal),
    (td.Gumbel, td.Gumbel, td.Normal),
    (td.Uniform, td.Normal),
    (td.HalfNormal, td.HalfNormal),
    (td.Cauchy, td.Cauchy),
    (td.Dirichlet, td.Dirichlet),
    (td.MultivariateNormal, td.MultivariateNormal, td.LowRankMultivariateNormal),
    (td.LowRankMultivariateNormal, td.MultivariateNormal, td.LowRankMultivariateNormal),
):
    for _p in _priors:
        register_kl(_q, _p)(td.kl_divergence)


def _neg_entropy(q: Any) -> Tensor:
    value = negative_entropy(q)
    assert value is not None
    return value


def _log_moments(q: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of log z for z ~ Gamma."""
    a = q.concentration
    return torch.digamma(a) - q.rate.log(), torch.polygamma(1, a)


def _against_gamma(p: Any, mean: Tensor, mean_log: Tensor) -> Tensor:
    """-E log p for p Gamma, from E z and E log z."""
    a, b = p.concentration, p.rate
    return torch.lgamma(a) - a * b.log() - (a - 1) * mean_log + b * mean


def _against_log_normal(p: Any, mean_log: Tensor, var_log: Tensor) -> Tensor:
    square = (var_log + (mean_log - p.loc) ** 2) / p.scale**2
    return p.scale.log() + HALF_LOG_2_PI + mean_log + 0.5 * square


@register_kl(td.Gamma, td.LogNormal)
def _gamma_log_normal(q: Any, p: Any) -> Tensor:
    return _neg_entropy(q) + _against_log_normal(p, *_log_moments(q))


@register_kl(td.Gamma, td.HalfNormal)
def _gamma_half_normal(q: Any, p: Any) -> Tensor:
    a = q.concentration
    second = a * (a + 1) / q.rate**2
    return _neg_entropy(q) + p.scale.log() - 0.5 * math.log(2 / math.pi) + second / (2 * p.scale**2)


@register_kl(td.Gamma, td.Weibull)
def _gamma_weibull(q: Any, p: Any) -> Tensor:
    a, k = q.concentration, p.concentration
    power = (torch.lgamma(a + k) - torch.lgamma(a) - k * (q.rate.log() + p.scale.log())).exp()
    log_mean, _ = _log_moments(q)
    return _neg_entropy(q) - k.log() + k * p.scale.log() - (k - 1) * log_mean + power


@register_kl(td.Gamma, dist.InverseGamma)
@register_kl(td.Gamma, td.InverseGamma)
def _gamma_inverse_gamma(q: Any, p: Any) -> Tensor:
    a, alpha, beta = q.concentration, p.concentration, p.rate
    log_mean, _ = _log_moments(q)
    inverse = torch.where(a > 1, q.rate / torch.where(a > 1, a - 1, torch.ones_like(a)), torch.inf)
    return (
        _neg_entropy(q) - alpha * beta.log() + torch.lgamma(alpha) + (alpha + 1) * log_mean + beta * inverse
    )


def _reciprocal(q: Any) -> td.Gamma:
    """The Gamma of 1 / z for z InverseGamma."""
    return td.Gamma(q.concentration, q.rate, validate_args=False)


def _inverse_gammas(q: Any, p: Any) -> Tensor:
    return td.kl_divergence(_reciprocal(q), _reciprocal(p))


def _inverse_gamma_gamma(q: Any, p: Any) -> Tensor:
    a = q.concentration
    mean = torch.where(a > 1, q.rate / torch.where(a > 1, a - 1, torch.ones_like(a)), torch.inf)
    mean_log = q.rate.log() - torch.digamma(a)
    return _neg_entropy(q) + _against_gamma(p, mean, mean_log)


def _inverse_gamma_log_normal(q: Any, p: Any) -> Tensor:
    a = q.concentration
    return _neg_entropy(q) + _against_log_normal(p, q.rate.log() - torch.digamma(a), torch.polygamma(1, a))


for _inverse in (td.InverseGamma, dist.InverseGamma):
    register_kl(_inverse, td.Gamma)(_inverse_gamma_gamma)
    register_kl(_inverse, td.LogNormal)(_inverse_gamma_log_normal)
    for _other in (td.InverseGamma, dist.InverseGamma):
        register_kl(_inverse, _other)(_inverse_gammas)


# Weibull


def _weibull_moments(q: Any) -> tuple[Tensor, Tensor]:
    """E z and E log z."""
    k = q.concentration
    return q.scale * torch.lgamma(1 + 1 / k).exp(), q.scale.log() - EULER / k


@register_kl(td.Weibull, td.Weibull)
def _weibulls(q: Any, p: Any) -> Tensor:
    k1, k2 = q.concentration, p.concentration
    _, log_mean = _weibull_moments(q)
    power = (k2 * (q.scale.log() - p.scale.log()) + torch.lgamma(k2 / k1 + 1)).exp()
    return _neg_entropy(q) - k2.log() + k2 * p.scale.log() - (k2 - 1) * log_mean + power


@register_kl(td.Weibull, td.Gamma)
def _weibull_gamma(q: Any, p: Any) -> Tensor:
    return _neg_entropy(q) + _against_gamma(p, *_weibull_moments(q))


@register_kl(td.Weibull, td.Exponential)
def _weibull_exponential(q: Any, p: Any) -> Tensor:
    return _neg_entropy(q) - p.rate.log() + p.rate * _weibull_moments(q)[0]


@register_kl(td.Weibull, td.LogNormal)
def _weibull_log_normal(q: Any, p: Any) -> Tensor:
    spread = math.pi**2 / 6 / q.concentration**2
    return _neg_entropy(q) + _against_log_normal(p, _weibull_moments(q)[1], spread)


# Against a flat density (of an improper prior) the divergence is E[log q]


@register_kl(td.Normal, dist.ImproperUniform)
@register_kl(td.LogNormal, dist.ImproperUniform)
@register_kl(LogitNormal, dist.ImproperUniform)
def _flat(q: Any, p: Any) -> Tensor:
    return sum_last(_neg_entropy(q).expand(q.batch_shape), len(p.event_shape))


# On an interval, and on the circle


@register_kl(td.Beta, td.Uniform)
@register_kl(td.Kumaraswamy, td.Uniform)
def _against_uniform(q: Any, p: Any) -> Tensor:
    return _neg_entropy(q) + (p.high - p.low).log()


@register_kl(td.Uniform, td.Uniform)
def _uniforms(q: Any, p: Any) -> Tensor:
    return ((p.high - p.low) / (q.high - q.low)).log()


@register_kl(td.Uniform, td.Beta)
def _uniform_beta(q: Any, p: Any) -> Tensor:
    a, b = p.concentration1, p.concentration0
    log_norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    width = q.high - q.low

    def integral_of_log(low: Tensor, high: Tensor) -> Tensor:
        return (torch.xlogy(high, high) - torch.xlogy(low, low)) / width - 1

    mean_log = integral_of_log(q.low, q.high)
    mean_log_rest = integral_of_log(1 - q.high, 1 - q.low)
    return log_norm - (a - 1) * mean_log - (b - 1) * mean_log_rest - width.log()


@register_kl(td.Kumaraswamy, td.Beta)
def _kumaraswamy_beta(q: Any, p: Any) -> Tensor:
    """The published series needs thousands of terms; E log(1 - z) is a one-dimensional quadrature."""
    a, b = torch.broadcast_tensors(q.concentration1, q.concentration0)
    alpha, beta = p.concentration1, p.concentration0
    mean_log = -(torch.digamma(b + 1) + EULER) / a
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return _neg_entropy(q) + log_norm - (alpha - 1) * mean_log - (beta - 1) * _mean_log_rest(a, b)


def _mean_log_rest(a: Tensor, b: Tensor) -> Tensor:
    """E log(1 - z) for z Kumaraswamy: 1 - z^a = exp(-y / b) with y ~ Exponential(1)."""

    def log_rest(y: Tensor) -> Tensor:
        x = y / b
        # Far out z^a = 1 - exp(-x) rounds to one; there log(1 - z) is -x - log a.
        near = log_one_minus_exp(-log_one_minus_exp(x.clamp(max=30.0)) / a)
        return torch.where(x > 30.0, -x - a.log(), near)

    return exponential_mean(log_rest, a + b)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0, without cancellation at either end."""
    small = torch.log(-torch.expm1(-x.clamp(max=1.0)))
    large = torch.log1p(-torch.exp(-x.clamp(min=0.5)))
    return torch.where(x < 0.7, small, large)


@register_kl(td.Kumaraswamy, td.Kumaraswamy)
def _kumaraswamys(q: Any, p: Any) -> Tensor:
    a, b = torch.broadcast_tensors(q.concentration1, q.concentration0)
    a2, b2 = p.concentration1, p.concentration0
    mean_log = -(torch.digamma(b + 1) + EULER) / a
    rest = _mean_log_rest(a / a2, b)  # E log(1 - z^a2): z^a2 is Kumaraswamy(a / a2, b)
    return _neg_entropy(q) - (a2 * b2).log() - (a2 - 1) * mean_log - (b2 - 1) * rest


@register_kl(td.VonMises, td.VonMises)
def _von_mises(q: Any, p: Any) -> Tensor:
    k1, k2 = q.concentration, p.concentration
    log_ratio = torch.special.i0e(k2).log() + k2 - torch.special.i0e(k1).log() - k1
    resultant = torch.special.i1e(k1) / torch.special.i0e(k1)
    return log_ratio + resultant * (k1 - k2 * torch.cos(q.loc - p.loc))
