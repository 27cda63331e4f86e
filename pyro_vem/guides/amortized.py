"""`AmortizedNormal`: a diagonal Gaussian whose moments come from an encoder of the data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..errors import ModelError, check_names
from ..model.data import signature_of
from ..model.sites import Latent
from .factorised import FactorisedNormal


class AmortizedNormal(FactorisedNormal):
    """Diagonal Gaussian inside a plate, with moments read off the data by an encoder.

    ``encoder(*inputs)`` returns ``(loc, scale)`` on the unconstrained scale, scale > 0, each
    shaped plate + unconstrained event of the site. Latents without an encoder get a mean-field
    factor, as in `MeanFieldNormal`.

    Args:
        model: the Pyro model.
        encoders: the encoder of each amortized site.
        inputs: names of the model's arguments that are passed to the encoders, in order; a
            mapping from site to names where the encoders differ.
        init: start of the factors without an encoder, as in `MeanFieldNormal`.
        name: prefix of the parameters; the weights are ``<name>.encoder.<site>$$$<weight>``.

    Raises:
        ModelError: if a site or input is unknown, or an encoder returns the wrong thing.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, ICLR.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> class Encoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.tensor(0.5))
        ...     def forward(self, y):
        ...         return self.slope * y, torch.full_like(y, 0.7)
        >>> guide = AmortizedNormal(model, {"z": Encoder()}, inputs="y")
        >>> guide(torch.zeros(3))["z"].shape
        torch.Size([3])
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoders: Mapping[str, nn.Module],
        *,
        inputs: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        init: Any = None,
        name: str = "guide",
    ) -> None:
        super().__init__(model, init=init, name=name)
        self.encoders = dict(encoders)
        per_site = inputs if isinstance(inputs, Mapping) else dict.fromkeys(self.encoders, inputs)
        self.inputs = {
            site: (names,) if isinstance(names, str) else tuple(names) for site, names in per_site.items()
        }
        self._signature = signature_of(model)
        for site in self.encoders:
            if site not in self.inputs:
                raise ModelError(f"inputs: no entry for the encoder of site {site!r}")
            check_names(f"inputs of site {site!r}", self.inputs[site], self._signature.parameters)

    @property
    def encoded(self) -> tuple[str, ...]:
        """Sites whose factor comes from an encoder."""
        return tuple(self.encoders)

    def _check(self) -> None:
        check_names("encoders", self.encoded, [site.name for site in self._latents or ()])

    def moments(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The encoder's mean and sd, or those of the site's own factor."""
        if site.name not in self.encoders:
            return self.free_moments(site)
        encoder = pyro.module(f"{self.name}.encoder.{site.name}", self.encoders[site.name])
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        moments = encoder(*(given.arguments[name] for name in self.inputs[site.name]))
        return self._checked(site, moments)

    def _checked(self, site: Latent, moments: Any) -> tuple[Tensor, Tensor]:
        where = f"encoder of site {site.name!r}"
        if not (isinstance(moments, tuple) and len(moments) == 2):
            raise ModelError(f"{where} returned {type(moments).__name__}: return a tuple (loc, scale)")
        loc, scale = moments
        shape = site.unconstrained.shape
        for part, value in (("loc", loc), ("scale", scale)):
            if not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ModelError(f"{where} returned {part} of shape {got}, expected {tuple(shape)}")
        if torch.distributions.Distribution._validate_args and not bool((scale > 0).all()):
            raise ModelError(f"{where} returned a scale that is not positive: return log_scale.exp()")
        return loc, scale
