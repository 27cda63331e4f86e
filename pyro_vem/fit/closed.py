"""E- and M-steps in closed form: coordinate ascent in expected statistics."""

import time
from collections.abc import Collection

import torch

from ..bound.lifted.terms import LiftedTerms
from .exactness import values_of
from .setup import Setup
from .state import State
from .status import Step
from .sweep import Sweep

START_NOISE = 0.2  # of the logits of random responsibilities: sharp ones end in worse optima
RESTARTED = 8  # updates of mixture weights that start anew
NOISE = 1e-12  # of the bound, relative, that a step may lose
INNER = 3  # updates of mixture weights before those of what is mixed


class ClosedForm:
    """The closed-form part of both steps of a lifted problem; parameters in `still` stay where they are.

    Attributes:
        latents: sites that the E-step updates in closed form.
        parameters: what the M-step maximises in closed form; moments by the first name of a covariance.
        moments: vectors whose mean and covariance are moments.
    """

    def __init__(self, setup: Setup, terms: LiftedTerms, still: Collection[str] = ()) -> None:
        self.setup, self.terms, lifted = setup, terms, terms.lifted
        latents = lifted.closed(lifted.latents)
        weights = [name for name in latents if name in lifted.inner]
        others = [name for name in latents if name not in lifted.inner]
        # Where weights of discrete sites come in rows of their own, one round of them is far from
        # their optimum: the rest would follow responsibilities that are still those of the last round.
        self.weights, self.others = lifted.batches(weights), lifted.batches(others)
        self.latents = self.weights * (INNER if weights and others else 1) + self.others
        codings = lifted.found.codings
        simplexes = all(codings[name].variable.support == "simplex" for name in weights)
        self.is_restarting = bool(weights and others) and simplexes
        moving = [name for name in setup.theta.names if name not in still]
        self.parameters = lifted.batches(lifted.closed(moving))
        found = lifted.matching.found
        self.moments = tuple(found[n] for b in self.parameters for n in b if n in found)
        self._last: tuple[State, Sweep] | None = None  # where the last step has led
        matched = [m.names for m in self.moments]
        closed = {name for batch in (*self.latents, *self.parameters, *matched) for name in batch}
        self.is_all_of = {"E": closed >= set(lifted.latents), "M": closed >= set(moving)}

    @property
    def is_exact(self) -> bool:
        """True if one E-step is the optimum in phi, wherever it starts."""
        return self.is_all_of["E"] and len(self.latents) <= 1 and not self.is_searching

    @property
    def is_led_by_theta(self) -> bool:
        """True if phi follows from theta in one E-step, so that rounds are a path of theta alone."""
        return self.setup.theta.size > 0 and (self.is_exact or not self.setup.phi.size)

    @property
    def is_searching(self) -> bool:
        """True if a part of the E-step is a Newton step."""
        return any(self.is_searched(name) for name in sum(self.latents, ()))

    def is_searched(self, name: str) -> bool:
        """True if a latent's best factor has no formula: its update is a Newton step."""
        lifted = self.terms.lifted
        family = lifted.found.codings[name].family
        return (family.num > 2 and not family.has_unit) or name in lifted.singles

    @property
    def is_complete(self) -> bool:
        """True if nothing is left to an optimiser."""
        return all(self.is_all_of.values())

    def step(self, state: State, block: str, iteration: int) -> tuple[State, Step | None]:
        """Each factor (or each parameter) in turn at its best given the others; None if there is none."""
        batches = self.batches_of(block)
        if not batches:
            return state, None
        start = time.perf_counter()
        moved, note, evaluations = state, "closed form", len(batches) + 1
        if block == "E" and self.is_restarting:
            moved = self._restarted(state)
            note += ", weights from equal ones"
            self.is_restarting = moved.elbo > state.elbo
            evaluations = RESTARTED * len(self.weights) + len(self.others) + 1
        if not moved.elbo > state.elbo:
            sweep, note = self._sweep(state), "closed form"
            for batch in batches:
                sweep.update(batch)
            if sweep.singular:
                note = f"closed form; {', '.join(sweep.singular)} stayed where moments are singular"
                sweep.singular = {}
            moved = sweep.state()
            self._last = moved, sweep
        elbo = moved.elbo
        if not elbo >= state.elbo - NOISE * (1 + abs(state.elbo)):  # only rounding makes an exact update fall
            moved, elbo, note = state, state.elbo, "closed form rolled back: the bound would have fallen"
        seconds = time.perf_counter() - start
        return moved, Step(iteration, block, state.elbo, elbo, 0.0, evaluations, 0, seconds, note)

    def singular_at(self, state: State) -> str | None:
        """A covariance of vectors that cannot move, as its moments are singular, or None."""
        sweep = self._sweep(state)
        for batch in self.batches_of("M") if self.moments else ():
            sweep.update(batch)
        return next(iter(sweep.singular), None)

    def batches_of(self, block: str) -> list[tuple[str, ...]]:
        """What a step updates, in order: "E", "M", or "restart" (an E-step from equal weights)."""
        restart = self.weights * RESTARTED + self.others
        return {"E": self.latents, "M": self.parameters, "restart": restart}.get(block, [])

    def _sweep(self, state: State) -> Sweep:
        last, self._last = self._last, None
        if last is not None and last[0] is state:
            return last[1]
        return Sweep.at(self.setup, self.terms, torch.as_tensor(state.phi), torch.as_tensor(state.theta))

    def _restarted(self, state: State) -> State:
        """The E-step with mixture weights from equal ones.

        A row's weights that have once gone to the wrong components come back slowly, so the first
        rounds forget them: on 395 documents the bound ends thousands of nats higher.
        """
        sweep = self._sweep(state)
        for batch in self.weights:
            sweep.level(batch)
        for batch in self.batches_of("restart"):
            sweep.update(batch)
        return sweep.state()

    def begun(self, state: State, number: int) -> State:
        """Where a start of this number begins: at random responsibilities, and parameters if they need it."""
        is_level = state.theta.size > 0 and not state.phi.size and self.is_level(state)
        if is_level:
            self.setup.objective.add_note("equal components are a saddle: started from random ones")
        is_random = is_level or (number > 0 and state.theta.size > 0)
        return self.scattered(state, self.setup.objective.seed + number, is_random)

    def scattered(self, state: State, seed: int, also_parameters: bool) -> State:
        """The state after one update from random responsibilities: equal components are a saddle."""
        lifted = self.terms.lifted
        if not lifted.discrete:
            return state
        generator = torch.Generator().manual_seed(seed)
        sweep = self._sweep(state)
        with lifted.noisy(START_NOISE, generator, is_alone=also_parameters):
            for batch in [*self.latents, *(self.parameters if also_parameters else ())]:
                sweep.update(batch)
        return sweep.state()

    def is_level(self, state: State) -> bool:
        """True if components start equal: a saddle, where no step tells them apart."""
        setup = self.setup
        with torch.no_grad():
            phi, theta = values_of(setup, state.phi, state.theta)
            is_level = self.terms.lifted.are_level(self.terms.statistics(phi, theta), theta)
        return not setup.processes.any(not is_level)
