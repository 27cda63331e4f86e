"""What the two guides share: one independent Gaussian factor a latent site, sampled at the site."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from ..model.data import Arguments
from ..model.parameters import Parameter, is_identity
from ..model.prototype import discover_modules, on_other_data, prototype
from ..model.roles import roles_of
from ..model.runtime import Program, isolated
from ..model.sites import Latent

INITIAL_SCALE = 0.1  # unconstrained sd: small, so that the first draws stay where the prior median is

Guide = TypeVar("Guide", bound="Factorised")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def normal_through(transform: Transform, loc: Tensor, scale: Tensor, event_dim: int = 0) -> Any:
    """Normal(loc, scale) on the unconstrained scale, pushed through a bijector.

    The bijector caches its last pair, so that log q is computed from the unconstrained value
    and never by inverting: inversion loses digits at simplex, ordered and correlation sites.

    Args:
        transform: bijector from the unconstrained scale to the support.
        loc: mean, shaped batch + unconstrained event.
        scale: standard deviation, shaped as `loc`.
        event_dim: event dimensions of the value, where they are more than the bijector's own
            (an ``ImproperUniform`` declares a vector with a scalar support).

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> normal_through(biject_to(constraints.simplex), torch.zeros(2), torch.ones(2)).event_shape
        torch.Size([3])
    """
    base = dist.Normal(loc, scale).to_event(transform.domain.event_dim)
    factor = base if is_identity(transform) else dist.TransformedDistribution(base, [transform.with_cache(1)])
    return factor.to_event(max(0, event_dim - factor.event_dim))


class Factorised(ABC):
    """An independent factor for each latent site; the base class of our guides.

    Because no factor depends on another latent, the exact KL of any site is valid by
    construction (see `pyro_vem.bound.certificate`).
    """

    def __init__(self, model: Callable[..., Any], *, init: Any = None, name: str = "guide") -> None:
        self.model = model
        self.init = init
        self.name = name
        self._latents: tuple[Latent, ...] | None = None
        self._bound_to: Shapes | None = None  # of the data that the latents are known from
        self._relearnt: dict[Shapes, tuple[Latent, ...]] = {}  # latents on data of other shapes
        self._seen: list[tuple[tuple[Any, ...], tuple[Latent, ...]]] = []  # on the first data, and the latest

    def bind(self: Guide, latents: tuple[Latent, ...], call: Arguments | None = None) -> Guide:
        """A copy whose factors are those of `latents`, on data as in `call`; the guide stays as it is."""
        bound = copy.copy(self)
        left_out = roles_of(self.model).map_sites
        bound._latents = tuple(site for site in latents if site.name not in left_out)
        bound._bound_to, bound._relearnt, bound._seen = None, {}, []
        if call is not None:
            bound._know_from(call.args, call.kwargs)
        bound._check()
        return bound

    def _check(self) -> None:  # noqa: B027 (only some guides have arguments that name sites)
        """Hook for guides whose arguments name sites."""

    def latents(self, *args: Any, **kwargs: Any) -> tuple[Latent, ...]:
        """The latent sites with a factor, learnt from the model at the first call.

        A guide with encoders learns them anew on data of other shapes: its rows are those of the data.
        Masks and bounds of supports, where they are tensors, are those of the data at hand.
        """
        if self._latents is None:
            self._latents = self._learnt(args, kwargs)
            self._know_from(args, kwargs)
        latents = self._latents
        if self._bound_to is None or not (args or kwargs):
            return latents
        if self.encoded:
            shapes = _shapes(args, kwargs)
            if shapes != self._bound_to:
                if shapes not in self._relearnt:
                    self._relearnt[shapes] = self._learnt(args, kwargs)
                latents = self._relearnt[shapes]
        return self._on(latents, args, kwargs) if any(s.follows_data for s in latents) else latents

    def _know_from(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._latents is not None
        self._bound_to = _shapes(args, kwargs)
        self._seen = [((*args, *kwargs.values()), self._latents)]

    def _on(self, latents: tuple[Latent, ...], args: Any, kwargs: Any) -> tuple[Latent, ...]:
        """Latents with the masks and bounds of some data; those of the first and the latest data are kept."""
        values = (*args, *kwargs.values())
        for others, known in self._seen:
            if len(others) == len(values) and all(a is b for a, b in zip(others, values, strict=True)):
                return known
        with self._ready(args, kwargs) as (program, call):
            program.own_weights({}, torch.get_default_dtype() if program.modules else None)
            found = on_other_data(program, call, latents)
        self._seen = [*self._seen[:1], (values, found)]
        return found

    def _learnt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Latent, ...]:
        with self._ready(args, kwargs) as (program, call):
            found = prototype(program, call, self.init)
        latents = self.bind(found.latents)._latents
        assert latents is not None
        return latents

    @contextmanager
    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Program, Arguments]]:
        """The model and its call, to be run without a trace in global state."""
        with isolated(torch.get_default_dtype()):
            call = Arguments(args, kwargs).cast(torch.get_default_dtype())
            yield discover_modules(Program(self.model), call), call

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; an ordinary Pyro guide with the model's signature."""
        sites = self.latents(*args, **kwargs)
        needed = dict.fromkeys(plate for site in sites for plate in site.plates)
        plates = {plate: pyro.plate(plate.name, plate.size, dim=plate.dim) for plate in needed}
        values = {}
        for site in sites:
            factor = self.factor(site, args, kwargs)
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate])
                if site.idle is not None:  # elements that the model never uses have no factor
                    stack.enter_context(pyro.poutine.mask(mask=~site.idle))
                values[site.name] = pyro.sample(site.name, factor)
        return values

    def is_of(self, parameter: str, site: str) -> bool:
        """True for a free parameter, named by what it is, of a site's factor."""
        kind, _, rest = parameter.removeprefix(f"{self.name}.").partition(".")
        return rest == site and "$$$" not in kind

    @abstractmethod
    def factor(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The distribution of a site."""

    @property
    def encoded(self) -> tuple[str, ...]:
        """Sites whose factor comes from an encoder."""
        return ()


class FactorisedNormal(Factorised):
    """Gaussian factors on the unconstrained scale."""

    def factor(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Normal, pushed through the site's bijector."""
        loc, scale = self.moments(site, args, kwargs)
        return normal_through(site.transform, loc, scale, site.event_dim)

    @abstractmethod
    def moments(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a site's factor, shaped batch + unconstrained event."""

    def loc_name(self, site: str) -> str:
        """Name of the free mean of a site's factor."""
        return f"{self.name}.loc.{site}"

    def scale_name(self, site: str) -> str:
        """Name of the free standard deviation of a site's factor."""
        return f"{self.name}.scale.{site}"

    def free_parameters(self, site: Latent) -> tuple[Parameter, Parameter]:
        """Parameters of a factor of its own: mean at the initial value, sd `INITIAL_SCALE`."""
        loc, scale = (Parameter(name, to, init()) for name, init, to in self._starts(site))
        return loc, scale

    def free_moments(self, site: Latent) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a factor of its own."""
        loc, scale = (pyro.param(name, init, constraint=to) for name, init, to in self._starts(site))
        return loc, scale

    def _starts(self, site: Latent) -> list[tuple[str, Callable[[], Tensor], Any]]:
        """Name, initial value (made where it is asked for: runs are many) and constraint of both."""
        start = site.unconstrained
        return [
            (self.loc_name(site.name), lambda: start.detach().clone(), dist.constraints.real),
            (
                self.scale_name(site.name),
                lambda: torch.full_like(start, INITIAL_SCALE),
                dist.constraints.positive,
            ),
        ]


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Of the tensors among some arguments."""
    named = Arguments(args, kwargs).named.items()
    return tuple((name, tuple(value.shape)) for name, value in named if isinstance(value, Tensor))
