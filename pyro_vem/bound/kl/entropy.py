"""E_q[log q] in closed form, for sites whose guide and model differ in scale or mask."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td

from ...model.density import sum_last
from .forms import CorrCholeskyNormal, LogitNormal, StickBreakingNormal
from .quadrature import mean_softplus
from .table import is_same_density, leaf_of

EULER = 0.5772156649015329
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)

# torch's entropies that have been compared with quadrature.
TRUSTED = (
    td.Normal, td.Gamma, td.Exponential, td.Beta, td.Dirichlet, td.Laplace, td.HalfNormal, td.Gumbel,
    td.Uniform, td.Cauchy, td.MultivariateNormal, td.LowRankMultivariateNormal, td.Bernoulli,
    td.Categorical, td.OneHotCategorical, td.Geometric, td.InverseGamma,
)  # fmt: skip


def negative_entropy(q: Any) -> Float[Tensor, "..."] | None:
    """E_q[log q] in nats, shaped like q's batch shape, where it is closed; None elsewhere.

    Example:
        >>> float(negative_entropy(td.Normal(0.0, 1.0)))
        -1.418938...
    """
    leaf = leaf_of(q)
    value = _of_leaf(leaf.dist)
    if value is None:
        return None
    return sum_last(value.expand(q.batch_shape + q.event_shape[: leaf.inner]), leaf.inner)


def _of_leaf(q: Any) -> Tensor | None:
    if isinstance(q, td.LogNormal):
        return -normal_entropy(q.scale) - q.loc
    if isinstance(q, LogitNormal):
        loc, scale = torch.broadcast_tensors(q.loc, q.scale)
        slope = loc - 2 * mean_softplus(loc, scale) + torch.as_tensor(q.width, dtype=loc.dtype).log()
        return -normal_entropy(scale) - slope
    if isinstance(q, StickBreakingNormal | CorrCholeskyNormal):
        return None
    if isinstance(q, td.Weibull):
        k = q.concentration
        return k.log() - q.scale.log() - EULER * (1 - 1 / k) - 1
    if isinstance(q, td.Kumaraswamy):
        a, b = q.concentration1, q.concentration0
        harmonic = torch.digamma(b + 1) + EULER
        return (a * b).log() - (1 - 1 / a) * harmonic - (1 - 1 / b)
    if type(q).__name__ == "InverseGamma":
        a = q.concentration
        return -(a + q.rate.log() + torch.lgamma(a) - (1 + a) * torch.digamma(a))
    for kind in TRUSTED:
        if isinstance(q, kind) and is_same_density(type(q), kind):
            entropy: Tensor = -q.entropy()  # type: ignore[no-untyped-call]
            return entropy
    return None


def normal_entropy(scale: Tensor) -> Tensor:
    """Entropy of a Normal, in nats.

    Example:
        >>> float(normal_entropy(torch.tensor(1.0)))
        1.418938...
    """
    return scale.log() + 0.5 + HALF_LOG_2_PI
