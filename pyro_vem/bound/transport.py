"""Fixed noise to values: reparameterised distributions as smooth maps of standard normal noise."""

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from scipy import special
from torch import Tensor
from torch import distributions as td

from ..errors import UnsupportedModelError
from ..model.density import sum_last
from ..model.runtime import Site
from ..model.support import unwrapped


class _GammaQuantile(torch.autograd.Function):
    """Quantile x of Gamma(a, 1) at a standard normal score, with dx/da by implicit differentiation.

    Torch's own Gamma sampler rejects, so its draw jumps when the shape moves; this one does not.
    """

    @staticmethod
    def forward(shape: Tensor, noise: Tensor) -> Tensor:
        a, score = _host(shape), _host(noise)
        lower = special.gammaincinv(a, special.ndtr(score))
        upper = special.gammainccinv(a, special.ndtr(-score))  # keeps digits in the right tail
        made = np.maximum(np.where(score < 0, lower, upper), np.finfo(float).tiny)
        return torch.as_tensor(made, device=shape.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape, value = ctx.saved_tensors
        return grad * _GammaSlope.apply(shape, value), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], shape: Tensor, noise: Tensor) -> Any:
        moved = [
            tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((shape, noise), in_dims, strict=True)
        ]
        return _gamma(moved[0], moved[1]), 0


class _GammaSlope(torch.autograd.Function):
    """dx/da of the Gamma quantile, -(dP(a, x)/da) / p(x | a); differentiable once more."""

    @staticmethod
    def forward(shape: Tensor, value: Tensor) -> Tensor:
        return torch.as_tensor(_slope(_host(shape), _host(value)), device=shape.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, value, slope = (tensor.detach() for tensor in ctx.saved_tensors)
        a, x = _host(shape), _host(value)
        step = 1e-3 * np.maximum(a, 1e-3)
        found = (_slope(a + step, x) - _slope(a - step, x)) / (2 * step)
        by_shape = torch.as_tensor(found, device=shape.device)
        by_value = torch.digamma(shape) - value.log() - slope * ((shape - 1) / value - 1)
        return grad * by_shape, grad * by_value


def _host(value: Tensor) -> Any:
    """The numbers of a tensor, wherever it is: autograd runs backward outside `on_device`."""
    return value.detach().cpu().numpy()


def _slope(a: Any, x: Any) -> Any:
    step = 1e-5 * np.maximum(a, 1e-3)
    change = (special.gammainc(a + step, x) - special.gammainc(a - step, x)) / (2 * step)
    log_density = special.xlogy(a - 1, x) - x - special.gammaln(a)
    return -change * np.exp(-log_density)


def noise_event(site: Site) -> tuple[int, ...] | None:
    """Trailing shape of the noise that a guide site takes for each batch element; None for Delta.

    Raises:
        UnsupportedModelError: if the site's distribution is no smooth map of fixed noise.
    """
    fn = site["fn"]
    base = fn
    while isinstance(unwrapped(base), td.TransformedDistribution):
        base = unwrapped(base).base_dist
    base = unwrapped(base)
    if isinstance(base, dist.Delta):
        return None
    inner = tuple(base.batch_shape)[len(fn.batch_shape) :]  # batch dimensions that are event ones by now
    if isinstance(base, td.LowRankMultivariateNormal):
        return (*inner, base.event_shape[0] + base.cov_factor.shape[-1])
    if isinstance(base, td.Beta | td.StudentT):
        return (*inner, 2)
    if isinstance(base, td.Normal | td.Gamma | td.MultivariateNormal | td.Dirichlet) or _has_quantile(base):
        return (*inner, *tuple(base.event_shape))
    raise UnsupportedModelError(
        f"guide site {site['name']!r}: {type(base).__name__} cannot be written as a smooth map of fixed "
        "noise, and the stochastic path is not there yet; use Normal, MultivariateNormal, Gamma, Beta, "
        "Dirichlet or StudentT factors, or fit_vem's own guide"
    )


def _has_quantile(base: Any) -> bool:
    return type(base).icdf is not td.Distribution.icdf and base.has_rsample


def transport(fn: Any, noise: Tensor) -> Tensor:
    """The value of a distribution at fixed standard normal noise; differentiable in both.

    Example:
        >>> float(transport(dist.Normal(1.0, 2.0), torch.tensor(0.5)))
        2.0
        >>> gamma = dist.Gamma(torch.tensor(1.0).double(), 2.0)
        >>> float(transport(gamma, torch.zeros(()).double()))  # the median, log(2) / 2
        0.3465...
    """
    fn = unwrapped(fn)
    if isinstance(fn, td.TransformedDistribution):
        value = transport(fn.base_dist, noise)
        for part in fn.transforms:
            value = part(value)
        return value
    if isinstance(fn, dist.Delta):
        return fn.v
    if isinstance(fn, td.Normal):
        return fn.loc + fn.scale * noise
    if isinstance(fn, td.LowRankMultivariateNormal):
        rank = fn.cov_factor.shape[-1]
        common = (fn.cov_factor @ noise[..., :rank].unsqueeze(-1)).squeeze(-1)
        return fn.loc + common + fn.cov_diag.sqrt() * noise[..., rank:]
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    if isinstance(fn, td.Gamma):
        return _gamma(fn.concentration, noise) / fn.rate
    if isinstance(fn, td.Dirichlet):
        parts = _gamma(fn.concentration, noise)
        return parts / parts.sum(-1, keepdim=True)
    if isinstance(fn, td.Beta):
        first = _gamma(fn.concentration1, noise[..., 0])
        return first / (first + _gamma(fn.concentration0, noise[..., 1]))
    if isinstance(fn, td.StudentT):
        chi2 = 2 * _gamma(fn.df / 2, noise[..., 1])
        return fn.loc + fn.scale * noise[..., 0] * (fn.df / chi2).sqrt()
    return fn.icdf(torch.special.ndtr(noise))


def log_density_at(fn: Any, noise: Tensor) -> Tensor | None:
    """The log density of ``transport(fn, noise)``, from the noise; None where the value tells it as well.

    ``log_prob`` of a MultivariateNormal solves for the noise. A triangular factor of some dozens of rows may
    have any condition number, and rounding grows with it: a bound that an optimiser is after reaches 1e100
    nats there.

    Example:
        >>> fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag(torch.tensor([1.0, 0.5])))
        >>> noise = torch.tensor([0.5, -1.0])
        >>> torch.isclose(log_density_at(fn, noise), fn.log_prob(transport(fn, noise)))
        tensor(True)
    """
    if isinstance(fn, td.Independent):
        value = log_density_at(fn.base_dist, noise)
        return None if value is None else sum_last(value, fn.reinterpreted_batch_ndims)
    if not isinstance(fn, td.MultivariateNormal):
        return None
    log_volume = fn.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_volume


def _gamma(shape: Tensor, noise: Tensor) -> Tensor:
    shape, noise = torch.broadcast_tensors(shape, noise)
    value: Tensor = _GammaQuantile.apply(shape, noise)  # type: ignore[no-untyped-call]
    return value
