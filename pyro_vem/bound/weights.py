"""Scale and mask of a site: what its log density is multiplied by, element by element."""

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..model.runtime import Site
from .kl import leaf_of


def weighted(value: Tensor, site: Site) -> Tensor:
    """A site's log density, times its scale, zero where masked; not summed."""
    result: Tensor = scale_and_mask(value, site["scale"], site["mask"])
    return result


def is_same(a: Any, b: Any) -> bool:
    """True for the same object or equal numbers; tensors are not compared by value."""
    return a is b or (isinstance(a, float | int) and isinstance(b, float | int) and a == b)


def same_weights(q: Site, p: Site) -> bool:
    """True if scale and mask of the two sites, and masks inside their distributions, are equal."""
    if not (equal(q["scale"], p["scale"]) and equal(_mask(q), _mask(p))):
        return False
    return equal(leaf_of(q["fn"]).mask(), leaf_of(p["fn"]).mask())


def _mask(site: Site) -> Any:
    return True if site["mask"] is None else site["mask"]


def equal(a: Any, b: Any) -> bool:
    """True for equal scales or masks, by value."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        first, second = torch.as_tensor(a), torch.as_tensor(b)
        return first.shape == second.shape and torch.equal(first, second.to(first))
    return bool(a == b)


def element_weight(site: Site, inner: int) -> Tensor | float:
    """Scale times all masks, broadcastable with elements that have `inner` event dimensions left."""
    weight = widened(site["scale"], inner)
    for mask in (widened(_mask(site), inner), leaf_of(site["fn"]).mask()):
        if mask is not True:
            weight = weight * (
                mask.to(torch.get_default_dtype()) if isinstance(mask, Tensor) else float(mask)
            )
    return weight


def widened(value: Any, inner: int) -> Any:
    """A scale or mask, broadcastable with elements that have `inner` event dimensions left."""
    if isinstance(value, Tensor) and inner:
        return value.reshape(value.shape + (1,) * inner)
    return value
