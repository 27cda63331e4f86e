"""What one run of guide and model tells, in groups: values, densities, terms."""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..model.runtime import Execution, Site
from .lifted.marginal import Marginal
from .tables import Plan
from .terms import site_terms

Groups: TypeAlias = dict[str, dict[str, Tensor]]


def groups_of(plan: Plan, guide_sites: Mapping[str, Site], model: Execution, keep: Collection[str]) -> Groups:
    """What one run tells, by the names of `pyro_vem.bound.objective.Objective.sample`."""
    groups: Groups = {}
    if "values" in keep:
        sites = {**model.latents, **model.deterministic}
        groups["values"] = {n: s["value"] for n, s in sites.items()}
    known: dict[int, Tensor] = {}  # by site: several groups need the same densities
    marginal = Marginal.of(model)

    def density(site: Site) -> Tensor:
        if id(site) not in known:
            known[id(site)] = marginal.density(site)
        return known[id(site)]

    if "densities" in keep:
        log_p = [density(site).sum() for site in model.sites.values()]
        log_q = [density(site).sum() for site in guide_sites.values()] or [torch.zeros(())]
        groups["densities"] = {"log_p": torch.stack(log_p).sum(), "log_q": torch.stack(log_q).sum()}
    if "log_likelihood" in keep:
        groups["log_likelihood"] = {n: density(model.sites[n]) for n in marginal.likelihood}
    if "model_rows" in keep:
        groups["model_rows"] = {n: density(s) for n, s in model.sites.items()}
    if "guide_rows" in keep:
        groups["guide_rows"] = {n: density(s) for n, s in guide_sites.items()}
    if "observed" in keep:
        groups["observed"] = {n: s["value"] for n, s in model.sites.items() if s["is_observed"]}
    if "terms" in keep:
        groups["terms"] = site_terms(plan, guide_sites, model.sites, density)
    return groups


def flattened(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Groups as one mapping, as `torch.func.vmap` takes it."""
    return {f"{group}\0{name}": v for group, members in groups.items() for name, v in members.items()}


def grouped(flat: Mapping[str, Tensor], names: Iterable[str]) -> Groups:
    """The way back, to groups of these names.

    Example:
        >>> grouped(flattened({"values": {"z": torch.zeros(1)}}), ["values", "terms"])
        {'values': {'z': tensor([0.])}, 'terms': {}}
    """
    found: Groups = {name: {} for name in names}
    for key, value in flat.items():
        group, name = key.split("\0")
        found[group][name] = value
    return found
