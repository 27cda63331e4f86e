"""Expectations of smooth functions under a Normal, by the trapezoid rule in a stretched variable."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NODES = 129
REACH = 9.0  # sds on either side; the Normal weight is below 1e-17 beyond
REACH_EXPONENTIAL = (-37.0, 4.0)  # of log y for y ~ Exponential(1), likewise


def normal_mean(function: Callable[[Tensor], Tensor], loc: Tensor, scale: Tensor, width: Any) -> Tensor:
    """E f(u) for u ~ Normal(loc, scale), f analytic but for singularities near +- i width.

    The trapezoid rule converges exponentially in the distance of the nearest singularity. In the
    variable t with u = width sinh(t) that distance stays of order one whatever the ratio
    of scale and width, so that a fixed number of nodes gives close to machine precision. f may
    grow at most like a polynomial.

    Args:
        function: elementwise; called with nodes on a new leading dimension.
        loc: mean.
        scale: standard deviation, shaped as loc.
        width: distance of the nearest singularities from zero; broadcastable with loc.

    References:
        Trefethen and Weideman (2014), The exponentially convergent trapezoidal rule, SIAM Review 56.

    Example:
        >>> one, width = torch.ones((), dtype=torch.float64), 1e-3
        >>> float(normal_mean(lambda u: u**2, 0 * one, 2 * one, width))
        4.0...
    """
    with torch.no_grad():  # nodes are constants: the sum is differentiated under the integral sign
        low = torch.asinh((loc - REACH * scale) / width)
        high = torch.asinh((loc + REACH * scale) / width)
        steps = _unit_nodes(loc.dtype, loc.device).reshape(-1, *(1,) * low.dim())
        t = low + (high - low) * steps
        nodes = width * torch.sinh(t)
        lengths = width * torch.cosh(t) * (high - low) / (NODES - 1)
    z = (nodes - loc) / scale
    weights = torch.exp(-0.5 * z * z) * lengths / (scale * math.sqrt(2 * math.pi))
    return (weights * function(nodes)).sum(0)


@functools.cache
def _unit_nodes(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(0.0, 1.0, NODES, dtype=dtype, device=device)


def exponential_mean(function: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """E f(y) for y ~ Exponential(1), by the trapezoid rule in log y; f grows at most logarithmically at 0.

    Example:
        >>> float(exponential_mean(lambda y: y**2, torch.zeros((), dtype=torch.float64)))
        2.0...
    """
    low, high = REACH_EXPONENTIAL
    steps = torch.linspace(low, high, 2 * NODES - 1, dtype=like.dtype, device=like.device)
    y = steps.exp().reshape(-1, *(1,) * like.dim())
    weights = y * torch.exp(-y) * (high - low) / (2 * NODES - 2)
    return (weights * function(y)).sum(0)


def softplus(u: Tensor) -> Tensor:
    """log(1 + e^u) to rounding; torch's default is linear above 20, and 2e-9 too low there.

    Example:
        >>> float(softplus(torch.tensor(20.5, dtype=torch.float64)) - 20.5)
        1.25...e-09
    """
    return torch.nn.functional.softplus(u, threshold=40.0)


def mean_softplus(loc: Tensor, scale: Tensor) -> Tensor:
    """E log(1 + e^u) for u ~ Normal(loc, scale).

    Example:
        >>> zero = torch.zeros((), dtype=torch.float64)
        >>> round(float(mean_softplus(zero, zero + 1e-8)), 6)
        0.693147
    """
    return normal_mean(softplus, loc, scale, math.pi)
