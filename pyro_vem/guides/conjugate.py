"""`MeanFieldConjugate`: one independent factor a site, of the family of the site's own prior."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..model.sites import Latent
from .factorised import INITIAL_SCALE, Factorised, normal_through

START = 10.0  # concentration with which positive factors start: a third of the mean as sd
Shaped = Callable[[Tensor], dict[str, tuple[Tensor, Any]]]
_POSITIVE = dist.constraints.positive


def _gamma(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    concentration = torch.full_like(start, START)
    return {"concentration": (concentration, _POSITIVE), "rate": (concentration / start, _POSITIVE)}


def _inverse_gamma(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    concentration = torch.full_like(start, START)
    return {"concentration": (concentration, _POSITIVE), "rate": (concentration * start, _POSITIVE)}


def _beta(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    first, second = START * start, START * (1 - start)
    return {"concentration1": (first, _POSITIVE), "concentration0": (second, _POSITIVE)}


def _dirichlet(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    return {"concentration": (1 + start * start.shape[-1], _POSITIVE)}


def _normal(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    scale = torch.full_like(start, INITIAL_SCALE)
    return {"loc": (start, dist.constraints.real), "scale": (scale, _POSITIVE)}


def _block(start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    scale = INITIAL_SCALE * torch.eye(start.shape[-1], dtype=start.dtype)
    tril = scale.expand(*start.shape, start.shape[-1]).clone()
    return {"loc": (start, dist.constraints.real), "scale_tril": (tril, dist.constraints.lower_cholesky)}


FAMILIES: dict[str, tuple[Any, Shaped]] = {
    "Normal": (dist.Normal, _normal),
    "MultivariateNormal": (dist.MultivariateNormal, _block),
    "Gamma": (dist.Gamma, _gamma),
    "Exponential": (dist.Gamma, _gamma),
    "Chi2": (dist.Gamma, _gamma),
    "InverseGamma": (dist.InverseGamma, _inverse_gamma),
    "Beta": (dist.Beta, _beta),
    "Dirichlet": (dist.Dirichlet, _dirichlet),
}
"""Of each prior: the class of its factor, and the parameters that this starts with."""


class MeanFieldConjugate(Factorised):
    """Independent factors of the priors' own families: Normal, Gamma, InverseGamma, Beta, Dirichlet.

    Where the log joint is affine in a site's sufficient statistics this is the best factor there
    is, and `fit_vem` updates it in closed form. Exponential and Chi2 priors get Gamma factors, a
    vector under a MultivariateNormal prior (or one that `fit_vem` finds to be tied together) a
    full covariance, unless `fit_vem` has closed forms for independent elements only; other sites
    get a Normal on the unconstrained scale. Discrete sites marked
    ``infer={"enumerate": "parallel"}`` are summed out in the model and have no factor here.

    Args:
        model: the Pyro model.
        init: start of the factors' means, as in `MeanFieldNormal`.
        name: prefix of the parameters, for example ``<name>.concentration.<site>``.

    References:
        Winn and Bishop (2005), Variational message passing, JMLR 6.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> guide = MeanFieldConjugate(model)
        >>> guide(torch.tensor([1.0, 4.0]))["rate"] > 0
        tensor(True)
        >>> sorted(pyro.get_param_store())
        ['guide.concentration.rate', 'guide.rate.rate']
        >>> pyro.clear_param_store()
    """

    def __init__(self, model: Callable[..., Any], *, init: Any = None, name: str = "guide") -> None:
        super().__init__(model, init=init, name=name)
        self.blocks: frozenset[str] = frozenset()
        self.singles: frozenset[str] = frozenset()

    def kind(self, site: Latent) -> str:
        """Family of a site's factor; "" for a Normal on the unconstrained scale."""
        if site.name in self.blocks:
            return "MultivariateNormal"
        if site.name in self.singles:
            return "Normal"
        return site.prior if site.prior in FAMILIES and site.idle is None else ""

    def parameter_name(self, parameter: str, site: str) -> str:
        """Name of a parameter of a site's factor."""
        return f"{self.name}.{parameter}.{site}"

    def factor_values(self, site: str, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A factor's parameters by their own names."""
        known = next(latent for latent in self._latents or () if latent.name == site)
        return {name: phi[self.parameter_name(name, site)] for name in self._starts(known)}

    def _starts(self, site: Latent) -> dict[str, tuple[Tensor, Any]]:
        kind = self.kind(site)
        return FAMILIES[kind or "Normal"][1](site.init.double() if kind else site.unconstrained)

    def factor(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The site's factor."""
        kind = self.kind(site)
        values = {
            name: pyro.param(
                self.parameter_name(name, site.name),
                lambda start=start: start.to(torch.get_default_dtype()).clone(),
                constraint=constraint,
            )
            for name, (start, constraint) in self._starts(site).items()
        }
        if not kind:
            return normal_through(site.transform, values["loc"], values["scale"], site.event_dim)
        fn = FAMILIES[kind][0](**values)
        return fn.to_event(site.event_dim - len(fn.event_shape))
