"""The log joint of one model run, element by element: the finest parts that sites come in."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ...errors import UnsupportedModelError
from ...model.density import lean_log_prob
from ...model.runtime import Execution, Site, is_summed_out
from ..kl import leaf_of
from ..weights import widened


@dataclass(frozen=True)
class Piece:
    """The log density of one site.

    Attributes:
        value: masked but not scaled; dimensions are those of `discrete`, then one for each plate
            dimension of the model, then `inner` ones inside the event.
        discrete: the enumerated sites that the leading dimensions run over, by identity.
        scale: of the site, broadcastable with the plate dimensions.
        inner: number of trailing dimensions that are no plates.
    """

    value: Tensor
    discrete: tuple[int, ...]
    scale: float | Tensor
    inner: int


def pieces(run: Execution, depth: int, only: Collection[str] | None = None) -> dict[str, Piece]:
    """The log density of every site of a run, by name.

    Args:
        run: the run.
        depth: dimensions that plates take.
        only: names of the sites that are wanted; None for all.
    """
    return {name: _piece(site, depth) for name, site in run.sites.items() if only is None or name in only}


def impossible(found: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Which values of discrete sites a site's log density (-inf) rules out: (values, *plates), by name."""
    ruled_out = {}
    for name, piece in found.items():
        if piece.discrete:
            where = piece.value == -torch.inf
            for _ in range(piece.inner):
                where = where.any(-1)
            if bool(where.any()):
                ruled_out[name] = where
    return ruled_out


def possible(found: Mapping[str, Piece], known: Mapping[str, Tensor]) -> dict[str, Piece]:
    """The same with densities that polynomials can be solved from: 0 where values are known to be impossible.

    Raises:
        UnsupportedModelError: where they are not the known ones.
    """
    here = impossible(found)
    for name in {*here} | ({*known} & {*found}):
        if name not in here or name not in known or not torch.equal(here[name], known[name]):
            raise UnsupportedModelError(
                f"site {name!r} depends on a discrete site, and which of its values are impossible (a log "
                "density of -inf) moves with latents or parameters: sum it out by a log density of your own "
                "in pyro.factor"
            )
    return {
        name: replace(piece, value=piece.value.masked_fill(piece.value == -torch.inf, 0.0))
        if name in here
        else piece
        for name, piece in found.items()
    }


def identities(run: Execution) -> dict[str, int]:
    """The identity of each enumerated site of a run."""
    return {
        name: site["infer"]["_dim_to_id"][site["infer"]["_enumerate_dim"]]
        for name, site in run.sites.items()
        if is_summed_out(site)
    }


def _piece(site: Site, depth: int) -> Piece:
    leaf = leaf_of(site["fn"])
    value, inner = _elements(leaf.dist, site["value"], leaf.inner)
    # A masked site that is summed out keeps its density: the sum over its values is one.
    masks = () if is_summed_out(site) else (site["mask"], leaf.mask())
    for mask in (widened(m, w) for m, w in zip(masks, (inner, inner - leaf.inner), strict=False)):
        if isinstance(mask, Tensor):
            value = torch.where(mask, value, torch.zeros_like(value))
        elif mask is False:
            value = torch.zeros_like(value)
    value, discrete = arranged(value, depth, inner, site)
    return Piece(value, discrete, site["scale"], inner)


def arranged(value: Tensor, depth: int, inner: int, site: Site) -> tuple[Tensor, tuple[int, ...]]:
    """A site's elements in the order of a `Piece`, and the discrete sites that lead.

    Args:
        value: one for each element.
        depth: dimensions that plates take.
        inner: number of trailing dimensions that are no plates.
        site: of the elements.
    """
    missing = depth - (value.dim() - inner)
    if missing > 0:
        value = value.reshape((1,) * missing + value.shape)
    return _by_identity(value, depth, inner, site)


def _elements(fn: Any, value: Tensor, inner: int) -> tuple[Tensor, int]:
    """Log p of a site, split where a distribution adds up over its components."""
    if isinstance(fn, td.Dirichlet):
        alpha = fn.concentration
        constant = torch.lgamma(alpha.sum(-1, keepdim=True)) - torch.lgamma(alpha).sum(-1, keepdim=True)
        return torch.xlogy(alpha - 1, value) + constant / alpha.shape[-1], inner + 1
    if isinstance(fn, td.Multinomial):
        total = torch.lgamma(value.sum(-1, keepdim=True) + 1) / value.shape[-1]
        return total - torch.lgamma(value + 1) + torch.xlogy(value, fn.probs), inner + 1
    return lean_log_prob(fn, value), inner


def _by_identity(value: Tensor, depth: int, inner: int, site: Site) -> tuple[Tensor, tuple[int, ...]]:
    """Enumeration dimensions moved into the order of their sites, idle ones dropped."""
    known: Mapping[int, int] = (site["infer"] or {}).get("_dim_to_id") or {}
    batch = value.dim() - inner
    if batch <= depth:
        return value, ()
    found, idle = [], []
    for position in range(batch - depth):
        dim = position - batch
        if value.shape[position] == 1:
            idle.append(position)
        elif dim in known:
            found.append((known[dim], position))
        else:
            raise UnsupportedModelError(
                f"site {site['name']!r}: its log density has shape {tuple(value.shape)}, which its plates "
                "do not declare"
            )
    found.sort()
    order = [position for _, position in found]
    value = value.permute(*order, *idle, *range(batch - depth, value.dim()))
    shape = value.shape[: len(order)] + value.shape[len(order) + len(idle) :]
    return value.reshape(shape), tuple(identity for identity, _ in found)
