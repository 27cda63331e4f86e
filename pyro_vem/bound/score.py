"""Score-function gradients for guide sites that have no pathwise one."""

from collections.abc import Mapping, Sequence

import torch
from pyro.infer.util import MultiFrameTensor
from torch import Tensor

from ..model.runtime import Site
from .tables import Plan
from .terms import Part


def score_surrogate(plan: Plan, guide_sites: Mapping[str, Site], parts: Sequence[Part]) -> Tensor | float:
    """A scalar whose gradient is the sum over sites of grad log q(z) times the cost downstream of z.

    Only terms that depend on the site's value enter its cost, and of those only the plate
    elements that the site's own element can reach (Rao-Blackwellisation over plates). An exact KL
    of the site itself is no cost: it is differentiated as it stands.

    References:
        Ranganath, Gerrish and Blei (2014), Black box variational inference, AISTATS. Schulman,
        Heess, Weber and Abbeel (2015), Gradient estimation using stochastic computation graphs.
    """
    total: Tensor | float = 0.0
    for name, q in guide_sites.items():
        if q["fn"].has_rsample:
            continue
        reached = plan.downstream.get(name)
        costs = [part for part in parts if reached is None or part.row.site in reached]
        if not costs:
            continue
        cost = MultiFrameTensor(*((part.frames, part.value.detach()) for part in costs))
        log_q = q["fn"].log_prob(q["value"])
        if isinstance(q["mask"], Tensor):
            log_q = torch.where(q["mask"], log_q, 0.0)
        elif q["mask"] is False:
            continue
        total = total + (cost.sum_to(q["cond_indep_stack"]) * log_q).sum()
    return total
