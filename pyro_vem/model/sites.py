"""Sites of a model: latents with their bijectors, plates, initial values."""

import contextlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro.distributions import Delta, Uniform
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from ..errors import ModelError, UnsupportedModelError
from .dtypes import dtype_advice
from .parameters import off_boundary
from .runtime import Site
from .support import bijector, plain_parts, support_of, unwrapped

Strategy: TypeAlias = Callable[[Site], Tensor]

QUANTILES = {"globals": 0.03, "rows": 0.1}  # sds of the quantiles that fits start from
MEDIAN_DRAWS, MOST_MANY = 301, 1000  # of a prior without quantiles; elements of a site that get so many


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: its name, its dimension (negative, from the right) and its size.

    Example:
        >>> Plate("pump", -1, 10).name
        'pump'
    """

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Latent:
    """A latent site of the model.

    Attributes:
        init: initial value, shaped batch + event, on the constrained scale.
        transform: bijector from the unconstrained scale to the site's support.
        plates: the vectorised plates round it, outermost first.
        event_dim: number of event dimensions of the value.
        idle: elements (batch shape) that the model masks out and never uses; None if none.
        prior: name of the prior's family without wrappers; a Uniform on (0, 1) is a Beta.
        follows_data: its mask, or the bounds of its support, are tensors that may be others on other data.
    """

    name: str
    init: Tensor
    transform: Transform
    support: Any
    plates: tuple[Plate, ...]
    event_dim: int
    idle: Tensor | None = None
    prior: str = ""
    follows_data: bool = False

    @property
    def unconstrained(self) -> Tensor:
        """The initial value on the unconstrained scale."""
        return self.transform.inv(self.init)

    def is_in(self, plates: Container[str]) -> bool:
        """True inside one of these plates."""
        return any(plate.name in plates for plate in self.plates)

    def idle_in(self, value: Tensor) -> Tensor:
        """Which numbers of a value, on either scale, belong to idle elements; flat."""
        idle = torch.tensor(False) if self.idle is None else self.idle
        return idle.reshape(idle.shape + (1,) * (value.dim() - idle.dim())).expand(value.shape).reshape(-1)


def support_and_bijector(site: Site) -> tuple[Any, Transform]:
    """Where a latent's values are, and the bijector there.

    Raises:
        UnsupportedModelError: where none is known.
    """
    try:
        support = support_of(site["fn"])
        return support, bijector(support)
    except NotImplementedError as error:
        kind = type(unwrapped(site["fn"])).__name__
        raise UnsupportedModelError(
            f"site {site['name']!r}: no bijector onto the support of its {kind} is known; sample what it is "
            "made of, and compute its value with pyro.deterministic"
        ) from error


def plates_of(site: Site) -> tuple[Plate, ...]:
    """The vectorised plates round a site, outermost (leftmost dimension) first."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    return tuple(Plate(f.name, f.dim, f.size) for f in sorted(frames, key=lambda f: f.dim))


def has_bounds(transform: Transform) -> bool:
    """True for a bijector with bounds that differ from element to element, as data's may.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> has_bounds(biject_to(constraints.interval(0.0, 1.0)))
        False
        >>> has_bounds(biject_to(constraints.interval(torch.zeros(3), torch.ones(3))))
        True
    """
    held = [value for part in plain_parts([transform]) for value in vars(part).values()]
    return any(isinstance(value, Tensor) and value.dim() > 0 for value in held)


def near_median(site: Site, spread: float = 1.0) -> Tensor:
    """About a prior's median, where a loading of zero would hide what it loads on.

    A quantile near one half where there is a formula; else the median of draws, of few where there are many
    elements. Rows of a plate lie farther apart: all alike they would say that their own scale is zero.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = dist.LogNormal(torch.full((9,), 5.0), 1.0)
        >>> near = near_median({"name": "z", "fn": prior, "cond_indep_stack": ()})
        >>> bool((near.log() - 5).abs().max() < 0.5)
        True
    """
    fn, shape = unwrapped(site["fn"]), site["fn"].shape()
    if not fn.event_shape:
        sd = QUANTILES["rows" if any(plate.size > 1 for plate in plates_of(site)) else "globals"]
        with contextlib.suppress(Exception):  # a distribution of the caller's may have anything there
            value = fn.icdf((0.5 + spread * sd * torch.randn(shape)).clamp(0.02, 0.98))
            if value.shape == shape and bool(support_of(site["fn"]).check(value).all()):
                return value
    return init_to_median(site, num_samples=MEDIAN_DRAWS if shape.numel() <= MOST_MANY else 15)


def at_median(site: Site) -> Tensor:
    """A prior's median itself, for models that have no finite density beside it."""
    return near_median(site, 0.0)


def init_strategy(init: Any, others: Strategy | None = None, rest: Strategy = near_median) -> Strategy:
    """A Pyro init strategy from None, a dict of values, or a strategy itself.

    With `others` it gives all values that are in no dict, whatever strategy there is; else `rest` does.
    """
    if others is not None and not isinstance(init, Mapping):
        return others
    if init is None:
        return rest
    if isinstance(init, Mapping):
        values = {name: torch.as_tensor(value) for name, value in init.items()}
        dtype = torch.get_default_dtype()
        floats = {k: v.to(dtype) if v.dtype != torch.bool else v for k, v in values.items()}
        return init_to_value(values=floats, fallback=others or rest)
    if callable(init):
        return init
    raise ModelError(f"init={init!r}: give a dict of values, or a Pyro strategy like init_to_median")


def initial_values(strategy: Strategy, is_enumerated: bool = False) -> Callable[[Site], Tensor]:
    """A strategy's values, each checked against its site and detached."""

    def choose(site: Site) -> Tensor:
        if site["fn"].support is constraints.dependent or _is_discrete(site):
            raise UnsupportedModelError(
                f"site {site['name']!r} is discrete ({type(site['fn']).__name__}): sum it out with "
                'infer={"enumerate": "parallel"} at the site, or pyro.infer.config_enumerate(model)'
            )
        if isinstance(unwrapped(site["fn"]), Delta):
            raise UnsupportedModelError(
                f"site {site['name']!r} is a Delta, which has no density: write pyro.deterministic"
            )
        support, transform = support_and_bijector(site)
        try:
            with torch.no_grad():
                value = strategy(site)
        except Exception as error:
            raise ModelError(
                f"site {site['name']!r} has no initial value ({error}){dtype_advice(error)}: "
                f"give one with init={{{site['name']!r}: ...}}"
            ) from error
        shape = site["fn"].batch_shape + site["fn"].event_shape
        inside = max([-plate.dim for plate in plates_of(site)], default=0) + len(site["fn"].event_shape)
        if is_enumerated and len(shape) > inside:
            # Under enumeration: one value, whatever the discrete sites that its prior depends on are.
            one = shape[len(shape) - inside :]
            value = value.reshape(-1, *one)[0] if value.shape == shape else value
            shape = one
        try:
            value = value.expand(shape)
        except RuntimeError as error:
            raise ModelError(
                f"init[{site['name']!r}] has shape {tuple(value.shape)}, the site {tuple(shape)}"
            ) from error
        if not bool(support.check(value).all()):
            raise ModelError(f"init[{site['name']!r}] lies outside the site's support {support}")
        off_boundary(site["name"], transform, value)
        return value.detach().clone()

    return choose


def _is_discrete(site: Site) -> bool:
    fn = site["fn"]
    return bool(fn.support.is_discrete) or bool(getattr(fn, "has_enumerate_support", False))


def _family(fn: Any) -> str:
    is_unit = isinstance(fn, Uniform) and bool((fn.low == 0).all() and (fn.high == 1).all())
    return "Beta" if is_unit else type(fn).__name__


def latent_of(site: Site) -> Latent:
    """The latent site of a record."""
    fn = site["fn"]
    support, transform = support_and_bijector(site)
    return Latent(
        site["name"], site["value"], transform, support, plates_of(site), fn.event_dim,
        prior=_family(unwrapped(fn)),
        follows_data=isinstance(site["mask"], Tensor) or has_bounds(transform),
    )  # fmt: skip
