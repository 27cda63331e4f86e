"""Sites that are summed out in parallel, with exact KL terms as costs.

Pyro's `TraceEnum_ELBO` runs and packs the traces, and says what depends on what; log sums are our own. A site
with an exact KL gets it in place of log p, and nothing in place of log q. The KL carries the enumeration
dimensions of its parents, so it is weighted like any other cost. This is the only module that touches them.
"""

from collections.abc import Mapping
from typing import Any

from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor

from ..errors import UnsupportedModelError
from ..model.runtime import Site
from .lifted.contraction import LogSums
from .tables import Plan, PlanRow
from .terms import site_divergence

Sites = Mapping[str, Site]


def is_enumerated(guide_sites: Sites, model_sites: Sites) -> bool:
    """True if some latent site of guide or model asks to be summed out.

    Raises:
        UnsupportedModelError: for sequential enumeration.
    """
    found = False
    for site in (*guide_sites.values(), *model_sites.values()):
        how = (site["infer"] or {}).get("enumerate")
        if how == "sequential" and not site["is_observed"]:
            raise UnsupportedModelError(
                f"site {site['name']!r}: sequential enumeration is not supported; "
                'use infer={"enumerate": "parallel"}'
            )
        found = found or (how == "parallel" and not site["is_observed"])
    return found


def enumerating(num_particles: int, settings: Mapping[str, Any]) -> TraceEnum_ELBO:
    """Pyro's own bound, for its enumerated and packed traces."""
    return TraceEnum_ELBO(num_particles=num_particles, **{**settings, "strict_enumeration_warning": False})


def enumerated_elbo(plan: Plan, guide_trace: Trace, model_trace: Trace) -> Tensor:
    """One particle's ELBO, differentiable without bias."""
    for row in plan.rows:
        if row.is_divergence:
            _use_divergence(plan, row, guide_trace, model_trace)
    return _expected(model_trace, guide_trace)


def _expected(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """Costs of both traces at their weights under the guide; the model's enumerated sites are summed out."""
    costs, factors, ordinals, summed, scale = _compute_model_factors(model_trace, guide_trace)
    sizes = {
        dim: n
        for terms in factors.values()
        for x in terms
        for dim, n in zip(x._pyro_dims, x.shape, strict=True)
    }
    if factors:
        for ordinal, terms in contract_tensor_tree(factors, summed, ring=LogSums(dim_to_size=sizes)).items():
            costs.setdefault(ordinal, []).extend(packed.scale_and_mask(term, scale=scale) for term in terms)
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            costs.setdefault(ordinals[name], []).append(packed.neg(site["packed"]["log_prob"]))
    value: Tensor = Dice(guide_trace, ordinals).compute_expectation(costs)
    return value


def enumerated_terms(plan: Plan, guide_trace: Trace, model_trace: Trace) -> dict[str, Tensor]:
    """One particle's ELBO by row; what is summed out together is one term, at the summed-out site."""
    total = enumerated_elbo(plan, guide_trace, model_trace)
    summed = {
        site["infer"]["_enumerate_symbol"]: name
        for name, site in model_trace.nodes.items()
        if name not in guide_trace.nodes and site["type"] == "sample" and "_enumerate_symbol" in site["infer"]
    }
    terms = {row.site: 0.0 * total for row in plan.rows}
    for row in plan.rows:
        nodes = [trace.nodes[row.site] for trace in (model_trace, guide_trace) if row.site in trace.nodes]
        if not summed.keys() & {dim for node in nodes for dim in node["packed"]["log_prob"]._pyro_dims}:
            # The ELBO is linear in the costs outside the contraction.
            terms[row.site] = total - _without(nodes, guide_trace, model_trace)
    block = total - sum(terms.values())
    for name in list(summed.values())[:1]:
        terms[name] = block
    return terms


def _without(nodes: list[dict[str, Any]], guide_trace: Trace, model_trace: Trace) -> Tensor:
    """The ELBO with the costs of some nodes left out."""
    kept = [node["packed"]["log_prob"] for node in nodes]
    for node in nodes:
        node["packed"]["log_prob"] = _nothing(node["packed"]["log_prob"])
    value = _expected(model_trace, guide_trace)
    for node, log_prob in zip(nodes, kept, strict=True):
        node["packed"]["log_prob"] = log_prob
    return value


def _use_divergence(plan: Plan, row: PlanRow, guide_trace: Trace, model_trace: Trace) -> None:
    name = row.site
    guide_sites, p = guide_trace.nodes, model_trace.nodes[name]
    q = plan.views[name].site(guide_sites, p) if name in plan.views else guide_sites[name]
    symbols = {**guide_sites[name]["infer"]["_dim_to_symbol"], **p["infer"]["_dim_to_symbol"]}
    p["packed"]["log_prob"] = packed.pack(-site_divergence(q, p), symbols)
    hidden = [name, plan.views[name].auxiliary] if name in plan.views else [name]
    for each in hidden:
        node = guide_sites[each]
        node["packed"]["log_prob"] = _nothing(node["packed"]["log_prob"])


def _nothing(cost: Any) -> Any:
    """A packed zero with the dimensions of another cost."""
    zero = 0.0 * cost.detach()
    zero._pyro_dims = cost._pyro_dims
    return zero
