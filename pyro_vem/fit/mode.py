"""Where many rows tell of few latents: the mode of their density first, at the price of one draw."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..guides.factorised import FactorisedNormal
from .few import is_costly
from .minimise import minimise
from .scales import free_sites
from .setup import Setup
from .smooth import Flags, Loss, Smooth, curvature_scale
from .state import State, elbo_at

MOST_LATENTS = 200  # numbers whose curvatures are formed one by one
MODE_ITERATIONS = 50
AT_MODE = 0.1  # gradient norm there, in sds a coordinate


def from_mode(setup: Setup, state: State) -> tuple[State, int, int]:
    """Means at the mode of what the draws see and sds by its curvatures, if the bound is higher there.

    Beside many rows the factors are narrow, and the best ones are almost these (the precision of a factor is
    the curvature that it sees: Laplace's approximation, each coordinate by itself). One run of the model
    takes what the draws would: the way from a far start costs next to nothing.

    Args:
        setup: the problem.
        state: its start.

    Returns:
        The new state, evaluations and Hessian products at one point each.

    References:
        Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal densities, JASA
        81.
    """
    guide, objective = setup.guide, setup.objective
    names = free_sites(guide)
    is_global = len(names) == len(objective.specs) and not any(spec.plates for spec in objective.specs)
    is_plain = not setup.theta.size and not objective.has_kinks and objective.is_twice
    if not isinstance(guide, FactorisedNormal) or not is_global or not is_plain or not is_costly(setup):
        return state, 0, 0
    is_loc, is_scale = (setup.phi.where(map(of, names)) for of in (guide.loc_name, guide.scale_name))
    if is_loc.sum() > MOST_LATENTS:
        return state, 0, 0
    loss, start = _at_means(setup, state, is_loc), state.phi[is_loc]
    scale = curvature_scale(loss, start, MOST_LATENTS)
    gtol = AT_MODE * scale.size**0.5
    found = minimise(loss, start, scale, gtol=gtol, max_iter=MODE_ITERATIONS, method="newton")
    end = Smooth(loss, found.x, np.ones(scale.size))
    curvatures = end.hessian().diagonal()
    work = 1 + found.evaluations + end.evaluations, scale.size + found.products + end.products
    is_mode = found.is_solved and np.isfinite(curvatures).all() and (curvatures > 0).all()
    if not is_mode:  # as where the density of effects and their sd grows without end
        return state, *work
    phi = state.phi.copy()
    phi[is_loc], phi[is_scale] = found.x, -0.5 * np.log(curvatures)
    new = State(phi, state.theta, elbo_at(setup, phi, state.theta))
    return new if new.elbo > state.elbo else state, *work


def _at_means(setup: Setup, state: State, is_loc: Flags) -> Loss:
    """Minus the bound as a function of means alone, what is drawn at the means themselves."""
    objective = setup.objective
    nothing = {spec.name: torch.zeros(1, *spec.shape, dtype=torch.float64) for spec in objective.specs}
    one = replace(setup, objective=objective.on(objective.problem.call, nothing))
    phi, theta = torch.as_tensor(state.phi), torch.as_tensor(state.theta)
    where = torch.as_tensor(np.flatnonzero(is_loc))

    def loss(means: Tensor) -> Tensor:
        return -one.elbo(phi.index_copy(0, where, means), theta)

    return Loss(loss)
