"""The plan of a bound: a method for each site, from what is proved of guide and model."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from ..guides.factorised import Factorised
from ..model.runtime import Site, is_summed_out
from ..model.sites import plates_of
from .certificate import Certificate, View, certify, find_views
from .dependence import Dependence, Pair, dependence
from .kl import negative_entropy
from .support import check_support
from .tables import Plan, PlanRow
from .weights import same_weights

Sites = Mapping[str, Site]


def make_plan(
    guide: Any,
    guide_sites: Sites,
    model_sites: Sites,
    pair: Pair,
    *,
    map_sites: Collection[str] = (),
    analytic: str = "auto",
    bounds: bool = False,
    is_replayed: bool = True,
    is_lifted: bool = False,
) -> Plan:
    """Choose a method for each site of the model and for each auxiliary site of the guide.

    Args:
        guide: the guide.
        guide_sites: records of one run of the guide.
        model_sites: records of the model at the guide's values.
        pair: both programs, to be run again for the proof.
        map_sites: latents that the M-step owns.
        analytic: "auto", "require" or "never".
        bounds: whether an upper bound of a KL may stand for it.
        is_replayed: whether the proof may run at the values of these records (not where particles
            are vectorised or sites enumerated: their values have other shapes).
        is_lifted: whether every term has a closed form already that was found by value.

    Raises:
        ModelError: if guide and model do not have the same latent sites, a factor leaves the
            support of its prior, or ``analytic="require"`` and a site cannot be exact.
    """
    check_sites(guide_sites, model_sites, map_sites)
    known = None if is_lifted else _dependence(guide, guide_sites, model_sites, pair, is_replayed)
    views = find_views(known.guide, guide_sites, model_sites) if known is not None else {}
    seen = {**guide_sites, **{name: v.site(guide_sites, model_sites[name]) for name, v in views.items()}}
    model_only = frozenset(
        n for n, s in model_sites.items() if not s["is_observed"] and n not in seen and n not in map_sites
    )
    rows, exact_views = [], {}
    for name, p in model_sites.items():
        plates = _plates(p)
        if p["is_observed"]:
            rows.append(PlanRow(name, plates, "likelihood", "draws", "expectation over the guide"))
        elif name in map_sites:
            rows.append(
                PlanRow(name, plates, "prior of a MAP site", "draws", "density at the M-step's point")
            )
        elif name in model_only:
            rows.append(PlanRow(name, plates, "likelihood", "enumeration", "summed out in the model"))
        else:
            check_support(name, seen[name]["fn"], p["fn"])
            method, proof = "closed form", "found by value"
            if not is_lifted:
                method, proof = _method(guide, seen[name], p, known, model_only, analytic, bounds)
            row = PlanRow(name, plates, "KL", method, proof)
            if name in views and row.is_divergence:
                exact_views[name] = views[name]
                row = replace(row, proof=f"{proof}; Normal and Delta seen as one")
            rows.append(row)
    rows += _auxiliary_rows(guide_sites, model_sites, exact_views)
    return Plan(tuple(rows), views=exact_views, downstream=_downstream(guide_sites, known, rows))


def _plates(site: Site) -> tuple[str, ...]:
    """Names of the user's plates; Pyro's own, over particles, is none of them."""
    return tuple(plate.name for plate in plates_of(site) if plate.name != "num_particles_vectorized")


def _auxiliary_rows(guide_sites: Sites, model_sites: Sites, views: Mapping[str, View]) -> list[PlanRow]:
    hidden = {view.auxiliary for view in views.values()}
    return [
        PlanRow(name, _plates(q), "auxiliary", "draws", "auxiliary site of the guide")
        for name, q in guide_sites.items()
        if name not in model_sites and name not in hidden
    ]


def _dependence(
    guide: Any, guide_sites: Sites, model_sites: Sites, pair: Pair, is_replayed: bool
) -> Dependence | None:
    """None where nothing has to be found out: our own guide, numbers as scales, constant masks."""
    is_weighted = any(
        not isinstance(site[key], int | float | bool | None)
        for site in model_sites.values()
        for key in ("scale", "mask")
    )
    if isinstance(guide, Factorised) and not is_weighted:
        return None
    if not guide_sites:
        return None
    latents = {n: s["value"].detach() for n, s in model_sites.items() if not s["is_observed"]}
    values = {**latents, **{n: s["value"].detach() for n, s in guide_sites.items()}}
    return dependence(pair, values if is_replayed else None)


def _method(
    guide: Any,
    q: Site,
    p: Site,
    known: Dependence | None,
    model_only: frozenset[str],
    analytic: str,
    bounds: bool,
) -> tuple[str, str]:
    sampled = "draws" if q["fn"].has_rsample else "score function"
    if is_summed_out(q):
        return "enumeration", "every value, weighted by the guide"
    if analytic == "never":
        return sampled, 'analytic="never"'
    certificate = certify(guide, q, p, known, model_only)
    if certificate and not same_weights(q, p) and negative_entropy(q["fn"]) is None:
        certificate = Certificate(
            False, "scale or mask differ between guide and model, and the entropy has no closed form"
        )
    if certificate.is_bound and not bounds:
        certificate = Certificate(False, "only an upper bound is closed, and bounds=False")
    if not certificate and analytic == "require":
        raise ModelError(f'site {p["name"]!r} cannot be exact ({certificate.text}), and analytic="require"')
    if not certificate:
        return sampled, certificate.text
    return ("upper bound" if certificate.is_bound else "closed form"), certificate.text


def check_sites(guide_sites: Sites, model_sites: Sites, map_sites: Collection[str]) -> None:
    """Raise `ModelError` unless the guide samples the model's latents, and nothing else unmarked."""
    latents = {n for n, s in model_sites.items() if not s["is_observed"]} - set(map_sites)
    for name in sorted(latents - set(guide_sites)):
        if not is_summed_out(model_sites[name]):
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


def _downstream(
    guide_sites: Sites, known: Dependence | None, rows: list[PlanRow]
) -> dict[str, frozenset[str]]:
    """For each site that needs a score function: the terms that depend on its value."""
    found = {}
    for name, q in guide_sites.items():
        if q["fn"].has_rsample or known is None:
            continue
        moved = known.guide.descendants(name)
        found[name] = frozenset(row.site for row in rows if _depends(row, known, moved))
    return found


def _depends(row: PlanRow, known: Dependence, moved: frozenset[str]) -> bool:
    if row.is_divergence:  # a function of the parents only
        parents = known.guide.parents[row.site] | known.model.parents[row.site]
    else:
        parents = frozenset({row.site})
        for graph in (known.guide, known.model):
            if row.site in graph.parents:
                parents |= graph.parents[row.site] | graph.weights[row.site]
    return bool(parents & moved)
