"""`vem_model`: the roles of a model's sites and parameters, attached without a wrapper."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

_ATTRIBUTE = "_vem_roles"
Fn = TypeVar("Fn", bound=Callable[..., Any])


@dataclass(frozen=True)
class Roles:
    """What the M-step owns beyond the parameters met in the model, and what it must hold.

    Example:
        >>> Roles(fixed=("tau",))
        Roles(map_sites=(), fixed=('tau',))
    """

    map_sites: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"vem_model({argument}={names!r}): give a tuple of names, ({names!r},)")
    return tuple(names)


@overload
def vem_model(fn: Fn) -> Fn: ...
@overload
def vem_model(
    fn: None = None, *, map_sites: Iterable[str] = (), fixed: Iterable[str] = ()
) -> Callable[[Fn], Fn]: ...
def vem_model(
    fn: Fn | None = None, *, map_sites: Iterable[str] = (), fixed: Iterable[str] = ()
) -> Fn | Callable[[Fn], Fn]:
    """Say which parts of a Pyro model the M-step owns; the model stays a plain Pyro callable.

    Without arguments: parameters met in the model (``pyro.param``, ``pyro.module``,
    ``PyroModule``) are fitted by the M-step, latent sites by the E-step. The same object comes
    back with its roles attached, so NUTS, Predictive and SVI take it unchanged. Names are
    checked against a run of the model when it is fitted.

    Args:
        fn: the model, a function or a ``PyroModule`` instance.
        map_sites: latent sites that the M-step point-estimates together with their prior
            density on the constrained scale (MAP-EM; no Jacobian, as in ``AutoDelta``).
        fixed: parameters held at their initial value; a module's name holds all its weights.

    Returns:
        ``fn`` itself, or a decorator when called without it.

    Raises:
        TypeError: for a bare string instead of a tuple of names, or an object that cannot
            carry an attribute (a bound method: decorate the function instead).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> @vem_model(map_sites=("scale",))
        ... def model(y=None):
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> model.__name__
        'model'
    """
    roles = Roles(_names("map_sites", map_sites), _names("fixed", fixed))

    def attach(target: Fn) -> Fn:
        if not callable(target):
            raise TypeError(f"vem_model: expected a model function or module, got {target!r}")
        try:
            setattr(target, _ATTRIBUTE, roles)
        except AttributeError as error:
            raise TypeError(
                f"vem_model: {target!r} cannot carry attributes; decorate the function itself"
            ) from error
        return target

    return attach if fn is None else attach(fn)


def roles_of(model: Callable[..., Any] | None) -> Roles:
    """The roles attached by `vem_model`, also under handlers and partials; else the default ones.

    Example:
        >>> roles_of(print)
        Roles(map_sites=(), fixed=())
    """
    while model is not None:
        roles = getattr(model, _ATTRIBUTE, None)
        if isinstance(roles, Roles):
            return roles
        # Pyro's handlers (condition, scale) set __wrapped__, functools.partial has func.
        model = getattr(model, "__wrapped__", None) or getattr(model, "func", None)
    return Roles()
