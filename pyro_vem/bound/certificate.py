"""When the exact KL of a site may stand for E_q[log q - log p], and on what proof.

The replacement is exact if no model parent of the site is a guide descendant of it, guide and
model put the site in the same plates, and scale and mask depend on no latent. Our own guides have
no arrows between latents; for any other guide the dependence is found out (see `dependence`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributions.transforms import Transform

from ..guides.factorised import Factorised, normal_through
from ..model.runtime import Site
from ..model.sites import plates_of
from ..model.support import bijector
from .dependence import Dependence, Graph, is_point, leaves_of, point_of
from .kl import canonical, divergence, kind_of, leaf_of, lookup
from .weights import equal

CHECK_DRAWS = 256
MOST_CHECKED = 2_000_000  # scalars drawn for the check of one site
CHECK_LIMIT = 5.0  # standard errors
Sites = Mapping[str, Site]


@dataclass(frozen=True)
class Certificate:
    """Whether a site's KL is exact here; `text` is the proof, or the reason why it is not.

    Attributes:
        is_bound: the formula is an upper bound of the KL.

    Example:
        >>> bool(Certificate(False, "no closed form for Normal against Cauchy"))
        False
    """

    holds: bool
    text: str
    is_bound: bool = False

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True)
class View:
    """A Delta at a transformed auxiliary Normal, seen as the transformed Normal that it is.

    Attributes:
        auxiliary: the guide's site of the Normal. The bijection is that of the prior's support.
        is_alone: nothing else in the guide depends on the site.
    """

    auxiliary: str
    is_alone: bool = True

    def site(self, guide_sites: Sites, p: Site) -> Site:
        """The guide's record of the model's site, a transformed Normal in place of the Delta."""
        q = guide_sites[p["name"]]
        base = leaf_of(guide_sites[self.auxiliary]["fn"]).dist
        event_dim = len(q["fn"].event_shape)
        fn = normal_through(bijector(p["fn"].support), base.loc, base.scale, event_dim)
        return {**q, "fn": fn}

    def holds(self, guide_sites: Sites, p: Site) -> bool:
        """True if the Delta of this run is where the bijection says, under equal scale and mask."""
        auxiliary, q = guide_sites[self.auxiliary], guide_sites[p["name"]]
        is_alike = equal(auxiliary["scale"], q["scale"]) and equal(auxiliary["mask"], q["mask"])
        transform = bijector(p["fn"].support)
        return is_alike and _same_plates(auxiliary, q) and _is_transport(auxiliary, q, transform)


def find_views(graph: Graph, guide_sites: Sites, model_sites: Sites) -> dict[str, View]:
    """Guide sites that are a Delta at the model's own bijection of one auxiliary Normal.

    Pyro's AutoNormal makes them; its Delta carries the Jacobian, which TraceMeanField_ELBO drops.
    """
    views = {}
    for name, q in guide_sites.items():
        parents = graph.parents.get(name, frozenset())
        if name not in model_sites or not is_point(q["fn"]) or len(parents) != 1:
            continue
        (auxiliary,) = parents
        others = [child for child in graph.order if auxiliary in graph.parents[child] and child != name]
        if others or not guide_sites[auxiliary]["infer"].get("is_auxiliary"):
            continue
        view = View(auxiliary, graph.descendants(name) == {name})
        if view.holds(guide_sites, model_sites[name]) and _only_through(guide_sites[auxiliary], q):
            views[name] = view
    return views


def _only_through(auxiliary: Site, q: Site) -> bool:
    """True if the Delta depends on parameters through the auxiliary value only.

    A learnt shift or flow that starts as the identity looks like the bijection at first.
    """
    point = point_of(q["fn"])
    parts = [torch.as_tensor(part) for part in (point.v, point.log_density)]
    return not leaves_of(parts, stop=auxiliary["value"].grad_fn)


def _is_transport(auxiliary: Site, q: Site, transform: Transform) -> bool:
    """True if the Delta sits at the transform of the auxiliary value and carries its Jacobian."""
    base, point = leaf_of(auxiliary["fn"]), point_of(q["fn"])
    if type(canonical(auxiliary["fn"])).__name__ != "Normal" or base.masks:
        return False
    with torch.no_grad():
        u = auxiliary["value"]
        try:
            value = transform(u)
            slope = transform.log_abs_det_jacobian(u, value)
        except (RuntimeError, ValueError):
            return False
        if value.shape != point.v.shape or not torch.allclose(value, point.v, rtol=1e-5, atol=1e-7):
            return False
        density = torch.as_tensor(point.log_density)
        slope = (
            slope.sum(list(range(density.dim() - slope.dim(), 0))) if slope.dim() > density.dim() else slope
        )
        return bool(torch.allclose(-slope, density, rtol=1e-4, atol=1e-5))


def certify(
    guide: Any, q: Site, p: Site, known: Dependence | None, model_only: frozenset[str]
) -> Certificate:
    """Decide on one latent site, from its guide and model records.

    Args:
        guide: the guide itself: one of ours is independent by construction.
        q: the guide's record.
        p: the model's record.
        known: dependence of both programs; None where it was not needed.
        model_only: latent sites of the model that the guide does not sample (summed out).
    """
    name = p["name"]
    if is_point(q["fn"]):
        return Certificate(False, "a point: nothing to integrate")
    entry = lookup(q["fn"], p["fn"])
    if entry is None:
        return Certificate(False, f"no closed form for {kind_of(q['fn'])} against {kind_of(p['fn'])}")
    if not _same_plates(q, p):
        return Certificate(False, "guide and model put the site in different plates")
    if model_only and _is_enumerated(p):
        return Certificate(False, f"depends on what is summed out (of {_names(model_only)})")
    independence = _independence(guide, name, known, model_only)
    if not independence:
        return independence
    gap = _self_check(q, p) if not entry.is_bound else None
    if gap is not None:
        return Certificate(False, f"the formula is {gap:.1f} standard errors off the average of draws")
    return Certificate(True, independence.text, entry.is_bound)


def _is_enumerated(site: Site) -> bool:
    """True if there is a prior (or a mask, or a scale) for each value of a discrete site."""
    own = site["value"].dim() - site["fn"].event_dim
    weights = [w for w in (site["mask"], site["scale"]) if isinstance(w, torch.Tensor)]
    return max([len(site["fn"].batch_shape), *(w.dim() for w in weights)]) > own


def _same_plates(q: Site, p: Site) -> bool:
    def dims(site: Site) -> list[tuple[int, int]]:
        return [(plate.dim, plate.size) for plate in plates_of(site)]

    return dims(q) == dims(p)


def _independence(
    guide: Callable[..., Any], name: str, known: Dependence | None, model_only: frozenset[str]
) -> Certificate:
    if known is None:
        assert isinstance(guide, Factorised)
        return Certificate(True, "independent factors by construction")
    if name not in known.model.parents or name not in known.guide.parents:
        return Certificate(False, "it appears in some runs only")
    weights = known.model.weights[name] | (known.guide.weights.get(name, frozenset()))
    if weights:
        return Certificate(False, f"scale or mask depends on {_names(weights)}")
    parents = known.model.parents[name]
    if parents & model_only:
        return Certificate(False, f"depends on {_names(parents & model_only)}, which is summed out")
    if isinstance(guide, Factorised):
        return Certificate(True, "independent factors by construction")
    descendants = known.guide.descendants(name)
    if parents & descendants:
        because = known.model.notes.get(name, "")
        text = f"its model parent {_names(parents & descendants)} depends on it in the guide"
        return Certificate(False, f"{text} ({because})" if because else text)
    alone = len(descendants) == 1
    return Certificate(
        True, "nothing in the guide depends on it" if alone else "no model parent depends on it in the guide"
    )


def _names(sites: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(sites)))


def _gaps(q: Any, p: Any) -> torch.Tensor:
    """Sums over the site of log q - log p at draws of q; fewer draws of a large site."""
    shape = np.broadcast_shapes(q.batch_shape, p.batch_shape)
    q = q.expand(shape)
    size = int(np.prod(shape + tuple(q.event_shape), dtype=int))
    draws = max(32, min(CHECK_DRAWS, MOST_CHECKED // max(1, size)))
    z = q.sample((draws,))
    return (q.log_prob(z) - p.log_prob(z)).reshape(draws, -1).sum(-1)


def _self_check(q: Site, p: Site) -> float | None:
    """How far the formula is from the average of draws, in standard errors, if too far.

    Where one draw makes most of the variance the average says nothing: no verdict.
    """
    if leaf_of(q["fn"]).masks or leaf_of(p["fn"]).masks:
        return None
    with torch.no_grad():
        exact = divergence(q["fn"], p["fn"]).sum()
        if not bool(torch.isfinite(exact)):
            return float("inf")
        try:
            gap = _gaps(q["fn"], p["fn"])
        except (RuntimeError, ValueError, NotImplementedError):
            return None  # nothing to hold it against
        square = (gap - gap.mean()).square()
        if float(square.max()) > 0.2 * float(square.sum()):
            return None
        se = float(gap.std()) / len(gap) ** 0.5
        off = abs(float(gap.mean() - exact))
    return off / max(se, 1e-30) if off > CHECK_LIMIT * se + 1e-4 * (1 + abs(float(exact))) else None
