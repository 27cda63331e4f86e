"""The terms of the bound, site by site: the same code under SVI and in a deterministic fit."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UnsupportedModelError
from ..model.density import lean_log_prob, sum_last
from ..model.runtime import Site
from .kl import leaf_of, negative_entropy
from .kl.table import elements
from .tables import Plan, PlanRow
from .weights import element_weight, is_same, same_weights, weighted

Sites = Mapping[str, Site]
Density = Callable[[Site], Tensor]


class Part(NamedTuple):
    """A weighted piece of a term, batch-shaped, with the plates that it lives in."""

    row: PlanRow
    value: Tensor
    frames: Any


def site_terms(
    plan: Plan, guide_sites: Sites, model_sites: Sites, density: Density | None = None
) -> dict[str, Float[Tensor, ""]]:
    """One draw's contribution of every row of the plan to the ELBO, in nats."""
    return summed(term_parts(plan, guide_sites, model_sites, density))


def summed(parts: Iterable[Part]) -> dict[str, Float[Tensor, ""]]:
    """Pieces of terms added up by site."""
    terms: dict[str, Tensor] = {}
    for row, value, _ in parts:
        total = value.sum()
        terms[row.site] = terms[row.site] + total if row.site in terms else total
    return terms


def term_parts(
    plan: Plan, guide_sites: Sites, model_sites: Sites, density: Density | None = None
) -> list[Part]:
    """One draw's contribution of every row, in pieces that are not summed yet."""
    density, parts = density or log_density, []
    for row in plan.rows:
        name = row.site
        if row.is_divergence:
            p = model_sites[name]
            q = guide_sites[name] if name not in plan.views else plan.views[name].site(guide_sites, p)
            parts.append(Part(row, -site_divergence(q, p), p["cond_indep_stack"]))
            continue
        if row.kind != "auxiliary":
            p = model_sites[name]
            parts.append(Part(row, density(p), p["cond_indep_stack"]))
        if row.kind in ("KL", "auxiliary"):
            q = guide_sites[name]
            log_q = density(q)
            # Without a pathwise value the gradient of E[log q] at fixed values is zero on average.
            log_q = log_q if q["fn"].has_rsample else log_q.detach()
            parts.append(Part(row, -log_q, q["cond_indep_stack"]))
    return parts


def log_density(site: Site) -> Float[Tensor, "..."]:
    """A site's weighted log density at its value, shaped like its batch."""
    known = site.get("unscaled_log_prob")  # of a value made from noise
    return weighted(lean_log_prob(site["fn"], site["value"]) if known is None else known, site)


def site_divergence(q: Site, p: Site) -> Float[Tensor, "..."]:
    """w_q E[log q] - w_p E[log p] of one latent site, shaped like its batch.

    w is scale times mask, of each side and each element. With kappa the KL and h = E[log q] this
    is w_p kappa + (w_q - w_p) h.
    """
    kappa, inner, is_masked = elements(q["fn"], p["fn"])
    if not is_masked and is_same(q["scale"], p["scale"]) and q["mask"] is p["mask"]:
        return weighted(sum_last(kappa, inner), p)
    weight = element_weight(p, inner)
    result = _product(weight, kappa)
    entropy = _element_entropy(q, inner)
    if entropy is not None:
        result = result + _product(element_weight(q, inner) - weight, entropy)
    elif not same_weights(q, p):
        raise UnsupportedModelError(
            f"site {p['name']!r}: scale or mask of guide and model have come to differ, and the entropy of "
            f"{type(leaf_of(q['fn']).dist).__name__} has no closed form"
        )
    return sum_last(result, inner)


def _product(weight: Tensor | float, value: Tensor) -> Tensor:
    """Zero where the weight is, whatever the value: nan may stand for what is masked out."""
    if not isinstance(weight, Tensor):
        return weight * value if weight else torch.zeros_like(value)
    return torch.where(weight == 0, 0.0, weight * value)


def _element_entropy(q: Site, inner: int) -> Tensor | None:
    """E[log q] of each element of the divergence; None if it is not closed."""
    leaf = leaf_of(q["fn"])
    value = negative_entropy(leaf.dist)
    return None if value is None else sum_last(value, leaf.inner - inner)
