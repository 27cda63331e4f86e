"""Where a distribution's values are: intervals that transforms move, and bijectors onto supports."""

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

Interval = tuple[Tensor, Tensor]
CLOSE = 1e-9  # of ends that are the same but for rounding: torch's sigmoid ends just inside


def bijector(support: Any) -> Transform:
    """The bijector from the unconstrained scale onto a support, without idle affine parts.

    Example:
        >>> bijector(constraints.nonnegative)  # torch adds AffineTransform(0, 1)
        ExpTransform()
    """
    transform = biject_to(support)
    if isinstance(transform, IndependentTransform):
        base = bijector(support.base_constraint)
        return IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        parts = [part for part in transform.parts if not _is_idle(part)]
        return parts[0] if len(parts) == 1 else ComposeTransform(parts)
    return transform


def _is_idle(transform: Transform) -> bool:
    if not isinstance(transform, AffineTransform):
        return False
    if isinstance(transform.loc, Tensor) or isinstance(transform.scale, Tensor):
        return False  # its value is not looked at: it may be part of a graph or a batch
    return bool(transform.loc == 0 and transform.scale == 1)


def plain_parts(transforms: Iterable[Transform]) -> list[Transform]:
    """The transforms one after another, without compositions, reinterpreted dimensions and idle parts.

    Example:
        >>> plain_parts([biject_to(constraints.independent(constraints.nonnegative, 1))])
        [ExpTransform()]
    """
    parts: list[Transform] = []
    for part in transforms:
        if isinstance(part, IndependentTransform):
            parts += plain_parts([part.base_transform])
        elif isinstance(part, ComposeTransform):
            parts += plain_parts(part.parts)
        elif not _is_idle(part):
            parts.append(part)
    return parts


def first_part(constraint: Any) -> Transform | None:
    """What takes the unconstrained numbers: of a covariance the bijector of its Cholesky factor.

    Example:
        >>> first_part(constraints.simplex)
        SoftmaxTransform()
    """
    return next(iter(plain_parts([transform_to(constraint)])), None)


def unwrapped(fn: Any) -> Any:
    """A distribution without what leaves its family as it is.

    Example:
        >>> import pyro.distributions as dist
        >>> type(unwrapped(dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(True))).__name__
        'Normal'
    """
    while isinstance(fn, td.Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def support_of(fn: Any) -> Any:
    """The constraint of a distribution's values.

    torch gives the codomain of the last transform, whatever the base is: the real line after any shift.

    Raises:
        NotImplementedError: where it is another set than torch says, which is not known.

    Example:
        >>> shift = AffineTransform(2.0, -1.0)
        >>> support_of(td.TransformedDistribution(td.Exponential(torch.ones(())), [shift]))
        LessThan(upper_bound=2.0)
    """
    if not _is_told_by_transforms(unwrapped(fn)):
        return fn.support
    ends, told = image_of(fn), interval_of(element_of(fn.support))
    if ends is None or (told is not None and all(map(_is_close, ends, told))):
        return fn.support
    inner, event_dim = _between(*ends), len(fn.event_shape)
    return constraints.independent(inner, event_dim) if event_dim else inner


def image_of(fn: Any) -> Interval | None:
    """The interval that a distribution's values fill, element by element; None for a curved set.

    Raises:
        NotImplementedError: where transforms move a set of which no more is known.
    """
    leaf = unwrapped(fn)
    if not _is_told_by_transforms(leaf):
        return interval_of(element_of(leaf.support))
    ends, inside = image_of(leaf.base_dist), element_of(leaf.base_dist.support)
    with torch.no_grad():
        for part in plain_parts(leaf.transforms):
            ends, inside = _moved(part, ends, inside), element_of(part.codomain)
    return ends


def _is_told_by_transforms(leaf: Any) -> bool:
    return getattr(type(leaf), "support", None) is td.TransformedDistribution.support


def _moved(part: Transform, ends: Interval | None, inside: Any) -> Interval | None:
    """The image of an interval, or (None) of a curved set that the constraint `inside` names."""
    codomain = element_of(part.codomain)
    is_whole = ends is not None and bool(torch.isinf(torch.stack(torch.broadcast_tensors(*ends))).all())
    if isinstance(part, AffineTransform) or part.domain.event_dim == part.codomain.event_dim == 0:
        if ends is None:
            raise NotImplementedError(f"{part} of a set that is no interval")
        domain = interval_of(element_of(part.domain))
        is_whole = is_whole or (domain is not None and all(map(_is_close, ends, domain)))
        if is_whole or not part.bijective:  # torch clamps the inverse of a sigmoid at its ends
            return interval_of(codomain)
        moved = [torch.as_tensor(part(end)) for end in ends]
        return torch.minimum(*moved), torch.maximum(*moved)
    is_onto = is_whole if ends is not None else type(element_of(part.domain)) is type(inside)
    if not is_onto:
        raise NotImplementedError(f"{part} of a part of its domain")
    return interval_of(codomain)


def _between(low: Tensor, high: Tensor) -> Any:
    """The constraint of an interval, of one kind in all elements."""
    kinds = [torch.isfinite(end) for end in (low, high)]
    if any(bool(kind.any()) and not bool(kind.all()) for kind in kinds):
        raise NotImplementedError("elements are bounded on different sides")
    ends = [
        float(end.reshape(-1)[0]) if bool((end == end.reshape(-1)[0]).all()) else end for end in (low, high)
    ]
    is_above, is_below = (bool(kind.all()) for kind in kinds)
    if is_above and is_below:
        return constraints.interval(*ends)
    if is_above:
        return constraints.greater_than(ends[0])
    return constraints.less_than(ends[1]) if is_below else constraints.real


def element_of(support: Any) -> Any:
    """The constraint of one element; None if it is not known."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return None if support is None or support is constraints.dependent else support


def interval_of(support: Any) -> Interval | None:
    """Ends of an elementwise constraint, or None for a curved set."""
    infinity = torch.tensor(torch.inf)
    if support is constraints.boolean:
        return torch.tensor(0.0), torch.tensor(1.0)
    if isinstance(support, type(constraints.real)):
        return -infinity, infinity
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None and high is None:
        return None
    return (
        torch.as_tensor(low).double() if low is not None else -infinity.double(),
        torch.as_tensor(high).double() if high is not None else infinity.double(),
    )


def _is_close(first: Tensor, second: Tensor) -> bool:
    near = (first - second).abs() <= CLOSE * (1 + torch.minimum(first.abs(), second.abs()))
    return bool((near | (first == second)).all())
