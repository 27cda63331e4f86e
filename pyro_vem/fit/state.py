"""Where a fit is, and the bound as a function of one block of parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..model.checks import SingularMatrix
from .capture import function_of
from .processes import Spread
from .setup import Setup
from .smooth import Loss, Vector


@dataclass(frozen=True)
class State:
    """Where the fit is: the flat unconstrained parameters of both blocks, and the bound there."""

    phi: Vector
    theta: Vector
    elbo: float

    @property
    def joint(self) -> Vector:
        """Both blocks as one vector, phi first."""
        return np.concatenate([self.phi, self.theta])


def state_at(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], elbo: float) -> State:
    """The state at constrained parameters by name."""
    return State(setup.phi.flat(phi).cpu().numpy(), setup.theta.flat(theta).cpu().numpy(), elbo)


def elbo_at(setup: Setup, phi: Vector, theta: Vector) -> float:
    """The bound at flat vectors, in nats; of all processes' rows. -inf where a matrix is singular."""
    with torch.no_grad():
        try:
            own = setup.elbo(torch.as_tensor(phi), torch.as_tensor(theta))
        except SingularMatrix:
            own = torch.tensor(-torch.inf)
        return float(setup.processes.total(own))


def own_elbo(setup: Setup, state: State) -> float:
    """The part of a state's bound that is of this process's rows."""
    if setup.processes.count == 1:
        return state.elbo
    with torch.no_grad():
        return float(setup.elbo(torch.as_tensor(state.phi), torch.as_tensor(state.theta)))


def joint_loss(setup: Setup) -> Loss:
    """Minus the bound as a function of the joint vector."""
    function, nothing = function_of(setup, "joint"), torch.zeros(0)
    spread = setup.processes.spread("joint")
    return _loss(setup, lambda x: function(x, nothing), spread)


def _loss(setup: Setup, function: Callable[[Tensor], Tensor], spread: Spread) -> Loss:
    objective = setup.objective
    is_twice = objective.is_twice and not objective.has_kinks
    is_even = not setup.theta.size
    return Loss(function, is_twice, objective.has_kinks, setup.is_small, is_even, spread=spread)


def eager_loss(setup: Setup, state: State, block: str) -> tuple[Loss, Vector, Tensor]:
    """Minus the bound as a function of one block, without graphs; where that block is, and the other one."""
    x, other = {
        "E": (state.phi, state.theta),
        "M": (state.theta, state.phi),
        "joint": (state.joint, np.zeros(0)),
    }[block]
    rest = torch.as_tensor(other)
    function = function_of(setup, block)
    return _loss(setup, lambda a: function(a, rest), setup.processes.spread(block)), x, rest


def loss_of(setup: Setup, state: State, block: str) -> tuple[Loss, Vector]:
    """Minus the bound as a function of one block, as a known graph if there is one; where that block is."""
    loss, x, rest = eager_loss(setup, state, block)
    captured = None if setup.is_our_code else setup.captures.of(setup, block, torch.as_tensor(x), rest)
    if captured is None:
        return loss, x
    product = (lambda a, v: captured.product(a, rest, v)[0]) if loss.is_twice else None
    return replace(loss, both=lambda a: captured.both(a, rest), product=product), x


def moved(setup: Setup, state: State, block: str, x: Vector, elbo: float) -> State:
    """The state with one block at `x`; the other block is the same object as before."""
    if block == "E":
        return State(x, state.theta, elbo)
    if block == "M":
        return State(state.phi, x, elbo)
    return State(x[: setup.phi.size], x[setup.phi.size :], elbo)
