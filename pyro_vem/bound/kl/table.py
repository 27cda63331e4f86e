"""The table of divergences: registration, lookup through wrappers, and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from ...model.density import sum_last
from ...model.support import plain_parts
from .forms import gaussian_form

Divergence: TypeAlias = Callable[[Any, Any], Tensor]
Condition: TypeAlias = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Entry:
    """One pair of the table.

    Attributes:
        function: KL(q || p) of two distributions without wrappers.
        is_bound: True if the function is an upper bound of the KL and not the KL itself.
        condition: what must hold of the pair's values for the function to be right, if anything.
    """

    function: Divergence
    is_bound: bool = False
    condition: Condition | None = None


_TABLE: dict[tuple[type, type], Entry] = {}


def register_kl(
    q: type, p: type, *, is_bound: bool = False, condition: Condition | None = None
) -> Callable[[Divergence], Divergence]:
    """Add a pair to pyro_vem's table; never to torch's.

    The decorated function takes the two distributions, without any ``Independent``, ``mask`` or
    ``expand`` round them, and returns KL(q || p) shaped like the broadcast batch shape, in nats,
    differentiable in both.

    Args:
        q: class of the guide's distribution. A Normal pushed through exp is a ``LogNormal``;
            through the sigmoid, stick breaking and tanh see ``pyro_vem.bound.kl.forms``.
        p: class of the prior.
        is_bound: the function is an upper bound of the KL, to be used only on request.
        condition: a test of the two distributions; where it fails the pair counts as missing.

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
        _TABLE[q, p] = Entry(function, is_bound, condition)
        return function

    return add


def registered() -> dict[tuple[type, type], Entry]:
    """A copy of the table."""
    return dict(_TABLE)


@dataclass(frozen=True)
class Leaf:
    """A distribution without its wrappers.

    Attributes:
        dist: the innermost distribution; a Normal pushed through a known bijector as its form.
        inner: event dimensions of the wrapped value that are batch dimensions of `dist`.
        masks: masks of the wrappers, each with the number of event dimensions inside it.
    """

    dist: Any
    inner: int
    masks: tuple[tuple[Any, int], ...]

    def mask(self) -> Tensor | bool:
        """All masks together, broadcastable with the batch shape of `dist`; True if there is none."""
        result: Tensor | bool = True
        for mask, event_dim in self.masks:
            missing = event_dim - len(self.dist.event_shape)
            if isinstance(mask, Tensor):
                mask = mask.reshape(mask.shape + (1,) * missing)
            result = mask if result is True else torch.as_tensor(result) & torch.as_tensor(mask)
        return result


def leaf_of(distribution: Any) -> Leaf:
    """Look through Independent, Masked and Expanded, and name a Normal pushed through a bijector.

    Example:
        >>> leaf_of(td.Independent(td.Normal(torch.zeros(3), 1.0), 1)).inner
        1
    """
    fn, masks = distribution, []
    while True:
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        elif not isinstance(fn, td.Independent | dist.ExpandedDistribution):
            break
        fn = fn.base_dist
    named = _named(fn)
    return Leaf(named, len(distribution.event_shape) - len(named.event_shape), tuple(masks))


def canonical(distribution: Any) -> Any:
    """The distribution that the table is asked for.

    Example:
        >>> pushed = td.TransformedDistribution(td.Normal(torch.zeros(()), 1.0), [td.ExpTransform()])
        >>> isinstance(canonical(pushed), td.LogNormal)
        True
    """
    return leaf_of(distribution).dist


def kind_of(distribution: Any) -> str:
    """Name of a distribution without its wrappers.

    Example:
        >>> kind_of(td.Independent(td.Gamma(torch.ones(2), 1.0), 1))
        'Gamma'
    """
    return type(canonical(distribution)).__name__.removesuffix("Form")


def _named(fn: Any) -> Any:
    """A plain transformed Normal as its form; anything else as it is."""
    if type(fn).__name__ != "TransformedDistribution":
        return fn
    base = fn.base_dist
    while isinstance(base, td.Independent | dist.ExpandedDistribution):
        base = base.base_dist
    if not isinstance(base, td.Normal) or not is_same_density(type(base), td.Normal):
        return fn
    form = gaussian_form(base, plain_parts(fn.transforms))
    return fn if form is None else form


# Pyro writes log_prob of these anew for speed or sparse data; the density is torch's.
_REWRITTEN = {
    dist.Categorical: td.Categorical,
    dist.Binomial: td.Binomial,
    dist.Poisson: td.Poisson,
    dist.Geometric: td.Geometric,
}


def is_same_density(kind: type, parent: type) -> bool:
    """True if a library class has its parent's density (Chi2 is a Gamma, NanMaskedNormal no Normal)."""
    if kind is parent or _REWRITTEN.get(kind) is parent:
        return True
    if not issubclass(kind, parent):
        return False
    is_library = kind.__module__.split(".")[0] in ("torch", "pyro", "pyro_vem")
    return is_library and getattr(kind, "log_prob", None) is getattr(parent, "log_prob", None)


def lookup(q: Any, p: Any) -> Entry | None:
    """The table's entry for a pair of distributions, or None.

    A user's subclass may have changed the density, so it is found only under its own name.

    Example:
        >>> lookup(td.Poisson(1.0), td.Cauchy(0.0, 1.0)) is None
        True
    """
    left, right = leaf_of(q), leaf_of(p)
    entry = _entry(left.dist, right.dist)
    if entry is None or (entry.condition is not None and not entry.condition(left.dist, right.dist)):
        return None
    # A mask inside the event of the other side would split a joint density.
    widest = max(len(left.dist.event_shape), len(right.dist.event_shape))
    if any(event_dim < widest for leaf in (left, right) for _, event_dim in leaf.masks):
        return None
    return entry


def _entry(q: Any, p: Any) -> Entry | None:
    for q_class in type(q).__mro__:
        if not is_same_density(type(q), q_class):
            continue
        for p_class in type(p).__mro__:
            if (q_class, p_class) in _TABLE and is_same_density(type(p), p_class):
                return _TABLE[q_class, p_class]
    return _pushed_alike(q, p)


def _pushed_alike(q: Any, p: Any) -> Entry | None:
    """Two distributions pushed through the same bijectors diverge as what is pushed does."""
    kinds = {type(q).__name__, type(p).__name__}
    if kinds != {"TransformedDistribution"} or not _same_transforms(q.transforms, p.transforms):
        return None
    base = lookup(q.base_dist, p.base_dist)
    if base is None or leaf_of(q.base_dist).masks or leaf_of(p.base_dist).masks:
        return None

    def pushed(q: Any, p: Any) -> Tensor:
        dims = len(q.event_shape) - len(q.base_dist.event_shape)
        return sum_last(divergence(q.base_dist, p.base_dist), dims)

    return Entry(pushed, base.is_bound)


def _same_transforms(first: Any, second: Any) -> bool:
    ours, theirs = plain_parts(first), plain_parts(second)
    if [type(t) for t in ours] != [type(t) for t in theirs]:
        return False
    return all(_same_transform(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_transform(a: Any, b: Any) -> bool:
    if not a.bijective or type(a).__module__.split(".")[0] not in ("torch", "pyro"):
        return False
    ours, theirs = _settings(a), _settings(b)
    if ours.keys() != theirs.keys():
        return False
    for name, value in ours.items():
        other = theirs[name]
        if value is other:
            continue
        if isinstance(value, Tensor | torch.nn.Module) or isinstance(other, Tensor | torch.nn.Module):
            return False  # equal only if shared: values may move apart
        if value != other:
            return False
    return True


def _settings(transform: Any) -> dict[str, Any]:
    """What a transform is made of, apart from its caches."""
    return {k: v for k, v in vars(transform).items() if "cache" not in k and k not in ("_inv", "training")}


def divergence(q: Any, p: Any) -> Float[Tensor, "..."]:
    """KL(q || p) in nats, shaped like the broadcast batch shape of the two; masks are not looked at.

    Raises:
        NotImplementedError: if the pair is not in the table.

    Example:
        >>> q = td.Normal(torch.tensor(0.3), torch.tensor(0.5))
        >>> round(float(divergence(q, td.Normal(0.0, 1.0))), 6)
        0.363147
    """
    value, inner, _ = elements(q, p)
    return sum_last(value, inner)


class Elements(NamedTuple):
    """KL of each element; `inner` trailing event dimensions are still to be summed."""

    value: Tensor
    inner: int
    is_masked: bool


def elements(q: Any, p: Any) -> Elements:
    """The divergence before it is summed over an event that the pair's function does not see."""
    left, right = leaf_of(q), leaf_of(p)
    entry = _entry(left.dist, right.dist)
    if entry is None:
        raise NotImplementedError(
            f"no closed-form KL from {type(left.dist).__name__} to {type(right.dist).__name__}"
        )
    inner = min(left.inner, right.inner)
    event = tuple(p.event_shape)[
        : len(p.event_shape) - max(len(left.dist.event_shape), len(right.dist.event_shape))
    ]
    shape = np.broadcast_shapes(q.batch_shape, p.batch_shape) + event[:inner]  # torch's own loads sympy
    value = entry.function(left.dist, right.dist).expand(shape)
    return Elements(value, inner, bool(left.masks or right.masks))
