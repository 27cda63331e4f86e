"""The terms of the bound, site by site: the same code under SVI and in a deterministic fit."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..errors import ModelError, UnsupportedModelError
from ..model.runtime import Site
from ..model.sites import plates_of
from .certificate import certify
from .kl import divergence, negative_entropy
from .tables import Plan, PlanRow

Sites = Mapping[str, Site]


def make_plan(
    guide: Callable[..., Any] | None,
    guide_sites: Sites,
    model_sites: Sites,
    map_sites: Collection[str] = (),
    analytic: str = "auto",
) -> Plan:
    """Choose a method for each site of the model and for each auxiliary site of the guide.

    Raises:
        ModelError: if guide and model do not have the same latent sites, or
            ``analytic="require"`` and a site cannot be exact.
        UnsupportedModelError: for a guide site that is not reparameterised.
    """
    _check_sites(guide_sites, model_sites, map_sites)
    rows = []
    for name, p in model_sites.items():
        plates = tuple(plate.name for plate in plates_of(p))
        if p["is_observed"]:
            rows.append(PlanRow(name, plates, "likelihood", "draws", "expectation over the guide"))
        elif name in map_sites:
            reason = "density at the M-step's point"
            rows.append(PlanRow(name, plates, "prior of a MAP site", "draws", reason))
        else:
            method, reason = _latent_method(guide, guide_sites[name], p, analytic)
            rows.append(PlanRow(name, plates, "KL", method, reason))
    for name, q in guide_sites.items():
        if name not in model_sites:
            plates = tuple(plate.name for plate in plates_of(q))
            rows.append(PlanRow(name, plates, "auxiliary", "draws", "auxiliary site of the guide"))
    return Plan(tuple(rows))


def _latent_method(guide: Any, q: Site, p: Site, analytic: str) -> tuple[str, str]:
    if not q["fn"].has_rsample:
        raise UnsupportedModelError(
            f"guide site {q['name']!r} ({type(q['fn']).__name__}) is not reparameterised: score-function "
            "gradients are not supported yet; use a reparameterised distribution, or pyro's Trace_ELBO"
        )
    if analytic == "never":
        return "draws", 'analytic="never"'
    certificate = certify(guide, q, p)
    if certificate and _differ(q, p) and negative_entropy(q["fn"]) is None:
        reason = "scale or mask differ between guide and model, and the entropy has no closed form"
        certificate = type(certificate)(False, reason)
    if not certificate and analytic == "require":
        raise ModelError(f'site {p["name"]!r} cannot be exact ({certificate.text}), and analytic="require"')
    return ("closed form" if certificate else "draws"), certificate.text


def _check_sites(guide_sites: Sites, model_sites: Sites, map_sites: Collection[str]) -> None:
    latents = {n for n, s in model_sites.items() if not s["is_observed"]} - set(map_sites)
    for name in sorted(latents - set(guide_sites)):
        raise ModelError(f"site {name!r} is latent in the model, but the guide does not sample it")
    for name, site in guide_sites.items():
        if name not in latents and not (site["infer"] or {}).get("is_auxiliary"):
            what = "is observed in the model" if name in model_sites else "does not exist in the model"
            if name in map_sites:
                what = "belongs to the M-step (map_sites)"
            raise ModelError(
                f"site {name!r} of the guide {what}: remove it from the guide, "
                'or mark it with infer={"is_auxiliary": True}'
            )


def _differ(q: Site, p: Site) -> bool:
    """True unless scale and mask of the two sites are known to be equal."""
    same_scale = q["scale"] is p["scale"] or _equal(q["scale"], p["scale"])
    same_mask = q["mask"] is p["mask"] or _equal(q["mask"], p["mask"])
    return not (same_scale and same_mask)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


def weighted(value: Tensor, site: Site) -> Tensor:
    """A site's log density (or KL), times its scale, zero where masked; not summed."""
    result: Tensor = scale_and_mask(value, site["scale"], site["mask"])
    return result


def site_terms(plan: Plan, guide_sites: Sites, model_sites: Sites) -> dict[str, Float[Tensor, ""]]:
    """One draw's contribution of every row of the plan to the ELBO, in nats."""
    terms = {}
    for row in plan.rows:
        if row.kind != "auxiliary" and row.site not in model_sites:
            raise UnsupportedModelError(f"site {row.site!r} appears in some runs of the model only")
        if row.kind == "auxiliary":
            terms[row.site] = -log_density(guide_sites[row.site]).sum()
        elif row.kind == "KL":
            terms[row.site] = -_divergence_term(row, guide_sites[row.site], model_sites[row.site])
        else:
            terms[row.site] = log_density(model_sites[row.site]).sum()
    return terms


def log_density(site: Site) -> Float[Tensor, "..."]:
    """A site's weighted log density at its value, shaped like its batch."""
    return weighted(site["fn"].log_prob(site["value"]), site)


def _divergence_term(row: PlanRow, q: Site, p: Site) -> Tensor:
    """w_q E[log q] - w_p E[log p] of one latent site; w is scale times mask, of each side."""
    if row.method == "draws":
        return log_density(q).sum() - log_density(p).sum()
    kl = divergence(q["fn"], p["fn"])
    term = weighted(kl, p).sum()
    is_same_scale = q["scale"] is p["scale"] or (isinstance(q["scale"], float) and q["scale"] == p["scale"])
    entropy = negative_entropy(q["fn"])
    # Without a closed entropy the plan has compared scales and masks: they are equal.
    if (is_same_scale and q["mask"] is p["mask"]) or entropy is None:
        return term
    return term + weighted(entropy, q).sum() - weighted(entropy.expand(kl.shape), p).sum()
