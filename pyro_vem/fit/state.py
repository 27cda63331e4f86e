"""Where a fit is, and the bound as a function of one block of parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .setup import Setup
from .smooth import Vector


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


def joint_loss(setup: Setup) -> Callable[[Tensor], Tensor]:
    """Minus the bound as a function of the joint vector."""
    size = setup.phi.size
    return lambda x: -setup.elbo(x[:size], x[size:])


def loss_of(setup: Setup, state: State, block: str) -> tuple[Callable[[Tensor], Tensor], Vector]:
    """Minus the bound as a function of one block, and where that block is now."""
    if block == "E":
        theta = torch.from_numpy(state.theta)
        return (lambda x: -setup.elbo(x, theta)), state.phi
    if block == "M":
        phi = torch.from_numpy(state.phi)
        return (lambda x: -setup.elbo(phi, x)), state.theta
    return joint_loss(setup), state.joint


def moved(setup: Setup, state: State, block: str, x: Vector, elbo: float) -> State:
    """The state with one block at `x`; the other block is the same object as before."""
    if block == "E":
        return State(x, state.theta, elbo)
    if block == "M":
        return State(state.phi, x, elbo)
    return State(x[: setup.phi.size], x[setup.phi.size :], elbo)
