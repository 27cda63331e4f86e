"""E- and M-steps in closed form: coordinate ascent in expected statistics, and its acceleration."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..bound.lifted.terms import LiftedTerms
from .setup import Setup
from .smooth import Vector
from .state import State
from .status import Step

START_NOISE = 2.0  # of the logits of random responsibilities
INNER = 3  # updates of mixture weights before those of what is mixed
EDGE = 1e-12  # smallest probability that an M-step gives to a component


class ClosedForm:
    """The closed-form part of both steps of a lifted problem.

    Attributes:
        latents: sites that the E-step updates in closed form.
        parameters: what the M-step maximises in closed form.
    """

    def __init__(self, setup: Setup, terms: LiftedTerms) -> None:
        self.setup, self.terms, lifted = setup, terms, terms.lifted
        latents = lifted.closed(lifted.latents)
        weights = [name for name in latents if name in lifted.inner]
        others = [name for name in latents if name not in lifted.inner]
        # Where weights of discrete sites come in rows of their own, one round of them is far from
        # their optimum: the rest would follow responsibilities that are still those of the last round.
        repeats = INNER if weights and others else 1
        self.latents = lifted.batches(weights) * repeats + lifted.batches(others)
        self.parameters = lifted.batches(lifted.closed(setup.theta.names))
        closed = {name for batch in (*self.latents, *self.parameters) for name in batch}
        self.is_all_of = {
            "E": closed >= set(lifted.latents),
            "M": closed >= set(setup.theta.names),
        }

    @property
    def is_exact(self) -> bool:
        """True if one E-step is the optimum in phi, wherever it starts."""
        families = self.terms.lifted.found.codings
        exps = any(
            families[n].family.num > 2 and not families[n].family.has_unit for n in sum(self.latents, ())
        )
        return self.is_all_of["E"] and len(self.latents) <= 1 and not exps

    @property
    def is_complete(self) -> bool:
        """True if nothing is left to an optimiser."""
        return all(self.is_all_of.values())

    def step(self, state: State, block: str, iteration: int) -> tuple[State, Step | None]:
        """Each factor (or each parameter) in turn at its best given the others; None if there is none."""
        batches = self.latents if block == "E" else self.parameters
        if not batches:
            return state, None
        start = time.perf_counter()
        moved = state
        for batch in batches:
            moved = self._updated(moved, batch, block == "E")
        elbo = self.elbo(moved)
        refused = ""
        if not elbo >= state.elbo - 1e-9 * (1 + abs(state.elbo)):  # the exact update of a block cannot
            moved, elbo, refused = state, state.elbo, "closed form rolled back: the bound would have fallen"
        moved = replace(moved, elbo=elbo)
        seconds = time.perf_counter() - start
        note = refused or "closed form"
        return moved, Step(iteration, block, state.elbo, elbo, 0.0, len(batches) + 1, 0, seconds, note)

    def scattered(self, state: State, seed: int, also_parameters: bool) -> State:
        """The state after one update from random responsibilities: equal components are a saddle."""
        lifted = self.terms.lifted
        if not lifted.discrete:
            return state
        generator = torch.Generator().manual_seed(seed)
        with lifted.noisy(START_NOISE, generator):
            for batch in self.latents:
                state = self._updated(state, batch, True)
            for batch in self.parameters if also_parameters else ():
                state = self._updated(state, batch, False)
        return replace(state, elbo=self.elbo(state))

    def elbo(self, state: State) -> float:
        """The bound at a state."""
        with torch.no_grad():
            return float(self.setup.elbo(torch.from_numpy(state.phi), torch.from_numpy(state.theta)))

    def _updated(self, state: State, batch: Sequence[str], is_latent: bool) -> State:
        setup, lifted, guide = self.setup, self.terms.lifted, self.terms.guide
        with torch.no_grad():
            phi = setup.phi.constrained(torch.from_numpy(state.phi))
            theta = setup.theta_values(torch.from_numpy(state.theta))
            statistics = self.terms.statistics(phi, theta)
            for name, eta in zip(batch, lifted.natural(batch, statistics, theta), strict=True):
                coding = lifted.found.codings[name]
                if is_latent:
                    assert guide is not None
                    assert coding.family.updated is not None
                    now = lifted.factor(coding, guide.factor_values(name, phi))
                    made = lifted.outside(coding, coding.family.updated(eta, now))
                    new = {guide.parameter_name(key, name): value for key, value in made.items()}
                    phi |= _inside(new, phi)
                else:
                    theta |= _inside({name: self._best(name, eta)}, theta)
            if is_latent:
                return replace(state, phi=setup.phi.flat(phi).numpy())
            return replace(state, theta=setup.theta.flat(theta).numpy())

    def _best(self, name: str, eta: Tensor) -> Tensor:
        coding = self.terms.lifted.found.codings[name]
        assert coding.family.best is not None
        u = coding.family.best(eta)
        u = coding.flat(u) if u.dim() == 2 else u
        if coding.variable.support == "simplex":
            u = u.reshape(-1, coding.variable.shape[-1]).clamp(min=EDGE)
            u = (u / u.sum(-1, keepdim=True)).reshape(-1)
        return coding.variable.placed(u)


def _inside(new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """New values where all of them are finite, and positive where the old ones are by constraint."""
    fine = all(bool(torch.isfinite(value).all()) for value in new.values())
    for name, value in new.items():
        kind = name.split(".")[1] if name.count(".") > 1 else ""
        if kind in ("scale", "rate", "concentration", "concentration1", "concentration0"):
            fine = fine and bool((value > 0).all())
    return new if fine else {name: old[name] for name in new}


@dataclass
class Anderson:
    """Anderson's extrapolation of a fixed-point map, from its last few rounds.

    References:
        Walker and Ni (2011), Anderson acceleration for fixed-point iterations, SIAM J. Numer.
        Anal. 49. Henderson and Varadhan (2019), Damped Anderson acceleration with restarts and
        monotonicity control for accelerating EM and EM-like algorithms, JCGS 28.

    Example:
        >>> rule, x = Anderson(), np.array([1.0, 0.0])
        >>> for _ in range(4):  # x -> A x + 1 with eigenvalues near one
        ...     image = np.array([0.9 * x[0] + 1, 0.99 * x[1] + 0.1 * x[0] + 1])
        ...     x = rule.proposal(x, image)
        >>> x.round(6)
        array([ 10., 200.])
    """

    depth: int = 6
    points: list[Vector] = field(default_factory=list)
    images: list[Vector] = field(default_factory=list)

    def proposal(self, point: Vector, image: Vector) -> Vector:
        """Where the map's fixed point seems to be, after one more application of it."""
        self.points = [*self.points, point][-self.depth - 1 :]
        self.images = [*self.images, image][-self.depth - 1 :]
        residuals = np.stack([g - x for x, g in zip(self.points, self.images, strict=True)])
        if len(residuals) < 2:
            return image
        steps = np.diff(residuals, axis=0).T
        weights, *_ = np.linalg.lstsq(steps, residuals[-1], rcond=1e-10)
        return np.asarray(image - np.diff(np.stack(self.images), axis=0).T @ weights)

    def restart(self) -> None:
        """Forget the rounds so far."""
        self.points, self.images = [], []
