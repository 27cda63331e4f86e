"""Starts where factors are narrow: where many rows tell of few latents, the mode of their density."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..bound.deterministic import Deterministic
from ..guides.factorised import FactorisedNormal
from .costly import is_costly, is_costly_at_nodes
from .exactness import prepare, settle_nodes, values_of
from .minimise import minimise
from .scales import free_sites
from .setup import Setup
from .smooth import Flags, Loss, Smooth, curvature_scale
from .state import State, elbo_at
from .status import Step
from .steps import start_factors

MOST_LATENTS = 200  # numbers whose curvatures are formed one by one
MODE_ITERATIONS = 50
AT_MODE = 0.1  # gradient norm there, in sds a coordinate


def nearer(setup: Setup, state: State) -> tuple[State, Step | None] | None:
    """A start where factors are narrow, with the nodes that these need and a row of history; None if none."""
    found = _from_mode(setup, state)
    if found is not None or not is_costly_at_nodes(setup):
        return found
    state, row, _ = start_factors(setup, state)
    return _with_fewer_nodes(setup, state), row


def _from_mode(setup: Setup, state: State) -> tuple[State, Step] | None:
    """Means at the mode of the density and sds by its curvatures, if the bound is higher there.

    Beside many rows the factors are narrow, and the best ones are almost these (the precision of a factor is
    the curvature that it sees: Laplace's approximation, each coordinate by itself). One run of the model
    takes what the draws would: the way from a far start costs next to nothing. Nor do narrow factors need
    the nodes that wide ones do, so their numbers begin anew.

    Args:
        setup: the problem.
        state: its start.

    Returns:
        The new state with a row of history, or None.

    References:
        Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal densities, JASA
        81.
    """
    begin, guide, objective = time.perf_counter(), setup.guide, setup.objective
    names = free_sites(guide)
    is_global = len(names) == len(objective.specs) and not any(spec.plates for spec in objective.specs)
    if not isinstance(guide, FactorisedNormal) or not is_global or setup.theta.size:
        return None
    if not (is_costly(setup) or is_costly_at_nodes(setup)):
        return None
    is_loc, is_scale = (setup.phi.where(map(of, names)) for of in (guide.loc_name, guide.scale_name))
    if is_loc.sum() > MOST_LATENTS:
        return None
    loss, start = _at_means(setup, state, is_loc), state.phi[is_loc]
    scale = curvature_scale(loss, start)
    gtol = AT_MODE * scale.size**0.5
    found = minimise(loss, start, scale, gtol=gtol, max_iter=MODE_ITERATIONS, method="newton")
    end = Smooth(loss, found.x, np.ones(scale.size))
    curvatures = end.hessian().diagonal()
    is_mode = found.is_solved and np.isfinite(curvatures).all() and (curvatures > 0).all()
    if not is_mode:  # as where the density of effects and their sd grows without end
        return None
    phi = state.phi.copy()
    phi[is_loc], phi[is_scale] = found.x, -0.5 * np.log(curvatures)
    new = State(phi, state.theta, elbo_at(setup, phi, state.theta))
    if not new.elbo > state.elbo:
        return None
    new = _with_fewer_nodes(setup, new)
    evaluations = 2 + found.evaluations + end.evaluations
    products, seconds = scale.size + found.products + end.products, time.perf_counter() - begin
    return new, Step(0, "start", state.elbo, new.elbo, 0.0, evaluations, products, seconds, "from the mode")


def _with_fewer_nodes(setup: Setup, state: State) -> State:
    """As few quadrature nodes as are enough where factors have become narrower."""
    if not isinstance(setup.objective.exact, Deterministic):
        return state
    setup.objective.exact.begin_again()
    prepare(setup, state.phi, state.theta)
    settle_nodes(setup, state.phi, state.theta)
    return replace(state, elbo=elbo_at(setup, state.phi, state.theta))


def _at_means(setup: Setup, state: State, is_loc: Flags) -> Loss:
    """Minus the bound as a function of means alone, every term that is not in closed form at the means."""
    objective = setup.objective
    nothing = {spec.name: torch.zeros(1, *spec.shape, dtype=torch.float64) for spec in objective.specs}
    one = objective.on(objective.problem.call, nothing)
    one.exact, one.is_gridded = None, False
    one.prepare(*values_of(setup, state.phi, state.theta))
    at_means = replace(setup, objective=one)
    phi, theta = torch.as_tensor(state.phi), torch.as_tensor(state.theta)
    where = torch.as_tensor(np.flatnonzero(is_loc))

    def loss(means: Tensor) -> Tensor:
        return -at_means.elbo(phi.index_copy(0, where, means), theta)

    return Loss(loss)
