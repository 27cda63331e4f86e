"""Closed-form Kullback-Leibler divergences: pyro_vem's own table, apart from torch's.

torch's registry is neither read nor written: several of its entries are wrong at the edges, and
an entry added there would change other people's numbers.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td
from torch.distributions.transforms import ExpTransform

Divergence: TypeAlias = Callable[[Any, Any], Tensor]
_TABLE: dict[tuple[type, type], Divergence] = {}


def register_kl(q: type, p: type) -> Callable[[Divergence], Divergence]:
    """Add a pair to pyro_vem's table; never to torch's.

    The decorated function takes the two distributions, without any ``Independent`` round them,
    and returns KL(q || p) shaped like the broadcast batch shape, in nats, differentiable in both.

    Args:
        q: class of the guide's distribution. A Normal pushed through exp is a ``LogNormal``.
        p: class of the prior.

    Example:
        >>> class Flat(td.Normal):
        ...     '''A prior with density 1 everywhere.'''
        >>> @register_kl(td.Normal, Flat)
        ... def _(q, p):
        ...     return -q.entropy()
        >>> float(divergence(td.Normal(0.0, 1.0), Flat(0.0, 1.0)))
        -1.418938...
    """

    def add(function: Divergence) -> Divergence:
        _TABLE[q, p] = function
        return function

    return add


def canonical(distribution: Any) -> Any:
    """The distribution under Independent and Masked wrappers; a Normal through exp as LogNormal."""
    from pyro.distributions.torch_distribution import MaskedDistribution

    while isinstance(distribution, td.Independent | MaskedDistribution):
        distribution = distribution.base_dist
    if type(distribution).__name__ == "TransformedDistribution":
        base, transforms = canonical(distribution.base_dist), distribution.transforms
        parts = [t.base_transform if isinstance(t, td.IndependentTransform) else t for t in transforms]
        if isinstance(base, td.Normal) and len(parts) == 1 and isinstance(parts[0], ExpTransform):
            return td.LogNormal(base.loc, base.scale, validate_args=False)
    return distribution


def _classes(distribution: Any) -> tuple[type, ...]:
    """Classes to look a distribution up by: its own, and its parents if the library made it.

    A user's subclass may have changed the density, so it is found only under its own name.
    """
    own = type(distribution)
    is_library = own.__module__.split(".")[0] in ("torch", "pyro")
    return own.__mro__ if is_library else (own,)


def lookup(q: Any, p: Any) -> Divergence | None:
    """The table's function for a pair of distributions, or None.

    Example:
        >>> lookup(td.Normal(0.0, 1.0), td.Cauchy(0.0, 1.0)) is None
        True
    """
    for q_class in _classes(canonical(q)):
        for p_class in _classes(canonical(p)):
            if (q_class, p_class) in _TABLE:
                return _TABLE[q_class, p_class]
    return None


def divergence(q: Any, p: Any) -> Float[Tensor, "..."]:
    """KL(q || p) in nats, shaped like the broadcast batch shape of the two.

    Raises:
        NotImplementedError: if the pair is not in the table.

    Example:
        >>> q = td.Normal(torch.tensor(0.3), torch.tensor(0.5))
        >>> round(float(divergence(q, td.Normal(0.0, 1.0))), 6)
        0.363147
    """
    function = lookup(q, p)
    if function is None:
        raise NotImplementedError(f"no closed-form KL from {type(q).__name__} to {type(p).__name__}")
    value = function(canonical(q), canonical(p))
    shape = np.broadcast_shapes(q.batch_shape, p.batch_shape)  # torch's own loads sympy
    base = canonical(p)
    # Elementwise pairs leave the event dimensions of an Independent to be summed here.
    reduced = len(p.event_shape) - len(base.event_shape)
    event = p.event_shape[:reduced]
    value = value.expand(shape + event)
    return value.sum(list(range(-reduced, 0))) if reduced else value


def negative_entropy(q: Any) -> Float[Tensor, "..."] | None:
    """E_q[log q] in nats, shaped like q's batch shape, where it is closed; None elsewhere.

    Example:
        >>> float(negative_entropy(td.Normal(0.0, 1.0)))
        -1.418938...
    """
    base = canonical(q)
    is_normal = isinstance(base, td.Normal | td.LogNormal)
    if is_normal and type(base).__module__.split(".")[0] in ("torch", "pyro"):
        value = -_entropy(base.scale) - (base.loc if isinstance(base, td.LogNormal) else 0.0)
        value = value.expand(q.batch_shape + q.event_shape)
        dims = list(range(-len(q.event_shape), 0))
        return value.sum(dims) if dims else value
    return None


def _entropy(scale: Tensor) -> Tensor:
    return scale.log() + 0.5 * math.log(2 * math.pi * math.e)


@register_kl(td.LogNormal, td.LogNormal)
@register_kl(td.Normal, td.Normal)
def _gaussians(q: td.Normal | td.LogNormal, p: td.Normal | td.LogNormal) -> Tensor:
    ratio = (q.scale / p.scale) ** 2
    return 0.5 * (ratio + ((q.loc - p.loc) / p.scale) ** 2 - 1 - ratio.log())


@register_kl(td.Normal, td.MultivariateNormal)
def _normal_mvn(q: td.Normal, p: td.MultivariateNormal) -> Tensor:
    # trace(P diag(s^2)) = sum of squares of L^-1 diag(s), with P = (L L^T)^-1
    factor = p.scale_tril
    scale, loc = torch.broadcast_tensors(q.scale, q.loc)
    whitened = torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False)
    shift = torch.linalg.solve_triangular(factor, (loc - p.loc).unsqueeze(-1), upper=False)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = p.event_shape[0]
    quadratic = whitened.square().sum((-2, -1)) + shift.square().sum((-2, -1))
    return 0.5 * (quadratic - size + log_det) - scale.log().sum(-1)


@register_kl(td.LogNormal, td.Gamma)
def _lognormal_gamma(q: td.LogNormal, p: td.Gamma) -> Tensor:
    a, b = p.concentration, p.rate
    mean = (q.loc + q.scale**2 / 2).exp()
    return torch.lgamma(a) - a * b.log() - a * q.loc + b * mean - _entropy(q.scale)


@register_kl(td.LogNormal, td.Exponential)
def _lognormal_exponential(q: td.LogNormal, p: td.Exponential) -> Tensor:
    mean = (q.loc + q.scale**2 / 2).exp()
    return -p.rate.log() - q.loc + p.rate * mean - _entropy(q.scale)


@register_kl(td.LogNormal, td.InverseGamma)
def _lognormal_inverse_gamma(q: td.LogNormal, p: td.InverseGamma) -> Tensor:
    a, b = p.concentration, p.rate
    mean_inverse = (-q.loc + q.scale**2 / 2).exp()
    return torch.lgamma(a) - a * b.log() + a * q.loc + b * mean_inverse - _entropy(q.scale)


@register_kl(td.LogNormal, td.HalfNormal)
def _lognormal_half_normal(q: td.LogNormal, p: td.HalfNormal) -> Tensor:
    second = (2 * q.loc + 2 * q.scale**2).exp()
    constant = p.scale.log() - 0.5 * math.log(2 / math.pi)
    return constant - q.loc + second / (2 * p.scale**2) - _entropy(q.scale)
