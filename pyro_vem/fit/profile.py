"""The profile schedule: quasi-Newton steps in theta on the bound maximised over phi."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .setup import Setup
from .smooth import Flags, Smooth, Vector
from .state import State, elbo_at, loss_of
from .status import Step
from .stopping import LOST

SUFFICIENT = 1e-4  # share of the predicted rise that a step must make
SHORTEST = 1e-6  # of a quasi-Newton step
LONGEST = 3.0  # of a step in any parameter that has a constraint: a factor of 20 on a log scale

EStep = Callable[[State], State]


@dataclass
class Profile:
    """BFGS on theta -> max over phi of the bound; each point costs one E-step.

    At the E-step's optimum the gradient in theta is the bound's own at fixed phi (the envelope
    theorem). The first metric is the complete-data information, minus the Hessian in theta at
    fixed phi, of which EM is the fixed-metric method.

    Attributes:
        setup: the problem.
        e_step: the best factors at other parameters.
        held: numbers of theta that stay where they are.

    References:
        Jamshidian and Jennrich (1997), Acceleration of the EM algorithm by using quasi-Newton
        methods, JRSS B 59.
    """

    setup: Setup
    e_step: EStep
    held: Callable[[], Flags]
    inverse: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    last: tuple[Vector, Vector] | None = None

    def step(self, state: State, iteration: int) -> tuple[State, Step]:
        """One step in theta, with the E-step at each point tried; never down."""
        start = time.perf_counter()
        smooth = self._smooth(state)
        zero = np.zeros_like(state.theta)
        slope = -smooth.gradient(zero)
        is_learnt = self._learn(state.theta, slope, smooth)
        slope = np.where(self.held(), 0.0, slope)
        direction = np.where(self.held(), 0.0, self.inverse @ slope)
        longest = LONGEST / max(float(np.abs(direction[self._is_bounded]).max(initial=0.0)), 1e-300)
        direction *= min(1.0, longest)
        rise, length, tried, best = float(slope @ direction), 1.0, 0, state
        while length >= SHORTEST:
            theta = state.theta + length * direction
            trial = self._at(state, theta)
            tried += 1
            if trial is not None and trial.elbo >= state.elbo + SUFFICIENT * length * rise:
                best = trial
                break
            length *= 0.3
        while best is not state and not is_learnt and 1.0 <= length < longest:
            length *= 2  # the profile is convex here, and the metric says nothing of how far to go
            trial = self._at(state, state.theta + length * direction)
            tried += 1
            if trial is None or not trial.elbo > best.elbo:
                break
            best = trial
        note = "" if best is not state else LOST
        if best is state:
            self.last = None  # start again from the complete-data information
        seconds, norm = time.perf_counter() - start, float(np.linalg.norm(slope))
        row = Step(iteration, "profile", state.elbo, best.elbo, norm, tried, smooth.products, seconds, note)
        return best, row

    def _at(self, state: State, theta: Vector) -> State | None:
        """The E-step's optimum at other parameters; None where the bound is not finite."""
        elbo = elbo_at(self.setup, state.phi, theta)
        if not np.isfinite(elbo):
            return None
        trial = self.e_step(State(state.phi, theta, elbo))
        return trial if np.isfinite(trial.elbo) else None

    def _smooth(self, state: State) -> Smooth:
        loss, theta = loss_of(self.setup, state, "M")
        return Smooth(loss, theta, np.ones_like(theta))

    @functools.cached_property
    def _is_bounded(self) -> NDArray[np.bool_]:
        """Coordinates of theta that are logs or the like: a real parameter has the unit of the data."""
        return self.setup.theta.where(p.name for p in self.setup.theta.parameters if not p.is_real)

    def _learn(self, theta: Vector, slope: Vector, smooth: Smooth) -> bool:
        """The metric: the complete-data information at first, then BFGS updates; False if one had to wait."""
        is_learnt = True
        if self.last is None:
            information = smooth.hessian()
            if not np.isfinite(information).all():  # at the edge of a range; BFGS learns it from steps
                information = np.eye(theta.size)
            values, vectors = np.linalg.eigh((information + information.T) / 2)
            values = np.maximum(np.abs(values), 1e-8 * np.abs(values).max() + 1e-300)
            self.inverse = (vectors / values) @ vectors.T
        else:
            moved, change = theta - self.last[0], self.last[1] - slope
            curvature = float(moved @ change)
            is_learnt = curvature > 1e-10 * float(np.linalg.norm(moved) * np.linalg.norm(change))
            if is_learnt:
                left = np.eye(theta.size) - np.outer(moved, change) / curvature
                self.inverse = left @ self.inverse @ left.T + np.outer(moved, moved) / curvature
        self.last = theta, slope
        return is_learnt
