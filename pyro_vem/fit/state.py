"""Where a fit is, and the bound as a function of one block of parameters."""

from dataclasses import dataclass

import numpy as np
import torch

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


def joint_loss(setup: Setup) -> Loss:
    """Minus the bound as a function of the joint vector."""
    size = setup.phi.size
    return Loss(lambda x: -setup.elbo(x[:size], x[size:]), setup.objective.is_twice)


def loss_of(setup: Setup, state: State, block: str) -> tuple[Loss, Vector]:
    """Minus the bound as a function of one block, and where that block is now."""
    if block == "E":
        theta = torch.from_numpy(state.theta)
        return Loss(lambda x: -setup.elbo(x, theta), setup.objective.is_twice), state.phi
    if block == "M":
        phi = torch.from_numpy(state.phi)
        return Loss(lambda x: -setup.elbo(phi, x), setup.objective.is_twice), state.theta
    return joint_loss(setup), state.joint


def moved(setup: Setup, state: State, block: str, x: Vector, elbo: float) -> State:
    """The state with one block at `x`; the other block is the same object as before."""
    if block == "E":
        return State(x, state.theta, elbo)
    if block == "M":
        return State(state.phi, x, elbo)
    return State(x[: setup.phi.size], x[setup.phi.size :], elbo)
