"""A fit whose parameters creep towards the edge of their constraint: taken there, held, and let go again."""

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from .edges import DRIFTED, Edges
from .profile import Profile
from .scales import Scales
from .schedule import is_slow
from .smooth import Flags
from .state import State
from .status import Step
from .steps import step

if TYPE_CHECKING:
    from .run import Run

MOST_FOLLOWED = 20  # iterations in which the rest follows a parameter to its edge


class Border:
    """What a run does with parameters at their edges.

    Args:
        run: at its start.
        left: parameters that an earlier fit has left at their edge.
    """

    def __init__(self, run: "Run", left: Collection[str] = ()) -> None:
        self.run, self._left = run, left
        self.edges = Edges(run.setup, self.followed, run.hooks)
        self.edges.watch(run.setup.theta.initial().numpy())
        self._failed = 0  # checks of convergence that had failed at the last try

    def go(self) -> None:
        """Where rounds have become slow: go to the edges that parameters creep towards."""
        run, edges = self.run, self.edges
        edges.watch(run.state.theta)
        is_last, is_asked_for = run.is_still(), is_slow(run) or run.failed > self._failed
        is_due = is_last or (is_asked_for and run.iterations >= edges.next_try)
        if not is_due or run.setup.processes.count > 1:
            return
        start, old, self._failed = time.perf_counter(), run.state, run.failed
        found = edges.gone_to(old, DRIFTED, run.tolerance(), run.iterations)
        if found is not None:
            run.state, names = found
            self._hold(old, start, f"went to the boundary: {names}")

    def look_inside(self) -> None:
        """Where an earlier fit was left at an edge: begin as the model does, if the bound is higher there."""
        run, edges = self.run, self.edges
        if not self._left or run.setup.processes.count > 1:
            return
        start, old = time.perf_counter(), run.state
        found = edges.inside(old, self._left, run.tolerance())
        if found is not None:
            run.state, names = found
            self._hold(old, start, f"began inside the boundary: {names}")

    def has_released(self) -> bool:
        """True if what is held at an edge is drawn inside again, now that the rest has moved."""
        run, start = self.run, time.perf_counter()
        old, found = run.state, self.edges.released(run.state, run.tolerance())
        if found is not None:
            run.state, names = found
            self._hold(old, start, f"came back from the boundary: {names}")
        return found is not None

    def mark(self) -> None:
        """Know what is at its edge where the fit has converged on its way there; the state stays as it is."""
        if self.run.setup.processes.count == 1:
            self.edges.mark(self.run.state, self.run.tolerance())

    def _hold(self, old: State, start: float, note: str) -> None:
        """Only what is at its edge stands still from here on."""
        run = self.run
        run.scales = Scales(run.setup, run.hooks)
        run.scales.held = run.scales.held | (self.edges.held != 0)
        run.first = run.state  # what is at its edge has gone far, and has not run away
        run.is_expected, run.next_check = False, run.iterations + 1
        run.forget_rounds()
        seconds = time.perf_counter() - start
        run.record(Step(run.iterations, "check", old.elbo, run.state.elbo, 0.0, 0, 0, seconds, note))

    def followed(self, state: State, still: Flags, gtol: float, blocks: tuple[str, ...]) -> State | None:
        """The best of all else where some numbers of theta stand still; None where the bound is not finite.

        Args:
            state: with the bound at it, which may be far below the best.
            still: numbers of theta.
            gtol: gradient norm.
            blocks: "E", and "joint" for the other parameters too.
        """
        if not np.isfinite(state.elbo):
            return None
        run = self.run
        closed, held = run.closed, run.scales.held
        run.scales.held = held | still
        try:
            for block in blocks:
                if closed is not None and block == "E":
                    state, _ = closed.step(state, "E", run.iterations)
                if closed is not None and closed.is_exact:  # factors cost little, their products much
                    state = self._profiled(state, gtol) if block == "joint" else state
                elif run.setup.phi.size or block == "joint":
                    state = step(
                        run.setup, state, block, run.scales, iteration=run.iterations,
                        gtol=gtol, method=run.method(block), max_iter=MOST_FOLLOWED,
                    )[0]  # fmt: skip
        finally:
            run.scales.held = held
        return state

    def _profiled(self, state: State, gtol: float) -> State:
        """Profile steps until the slope is small, or they gain nothing that is seen in it."""
        run = self.run
        profile = Profile(run.setup, run.best_phi, lambda: run.scales.held)
        for _ in range(MOST_FOLLOWED):
            state, row = profile.step(state, run.iterations)
            if row.gradient <= gtol or row.gain <= gtol**2 or row.note:
                break
        return state
