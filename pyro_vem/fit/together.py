"""Several starts at once: rounds of closed forms for all of them in one batch.

A small model's round costs Python and dispatch, which ten starts share under `torch.func.vmap`. Each
start is extrapolated as alone, and goes on by itself, with all checks, from where it stands still.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from ..bound.lifted.table import Table
from ..errors import ModelError, warn
from .acceleration import Extrapolation
from .closed import NOISE
from .result import VEMResult
from .run import ROUNDING, Run
from .schedule import PROFILE_FROM, Schedule, schedule_of
from .smooth import Vector
from .state import State
from .status import Status, Step
from .sweep import Sweep

MOST_TOGETHER = 2_000_000  # numbers of all starts beyond which batches only cost memory
DRAWN_AGAIN, FARTHEST = 10, 1e15  # times, and nats, from which Newton takes a step for each e-fold
STILL = 2  # rounds that gain less than the tolerance, after which a start stands still

Flags: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = dict[str, Tensor]
Parts: TypeAlias = tuple[Values, Values, Values]  # phi, theta, statistics


def from_starts(
    begun: Callable[[int], Run],
    finished: Callable[[Run], VEMResult],
    num_starts: int,
    schedule: Schedule,
    max_iter: int,
) -> dict[int, VEMResult]:
    """A result for each start by its number; fewer after an interrupt.

    Args:
        begun: gives the run of a start, at its first point.
        finished: takes a run to its end.
        num_starts: how many.
        schedule: of the rounds.
        max_iter: most rounds.
    """
    first = begun(0)
    if num_starts == 1 or not can_go_together(first, schedule, num_starts):
        found = {0: finished(first)}
        for start in range(1, num_starts):
            if any(fit.status is Status.interrupted for fit in found.values()):
                break
            run = drawn_again(begun, start)
            if run is not None:
                found[start] = finished(run)
        return found
    runs = [first, *(begun(start) for start in range(1, num_starts))]
    if not Together(runs, schedule != "alternate").climb(max_iter):
        for run in runs:
            run.close()
        return {number: run.result(Status.interrupted) for number, run in enumerate(runs)}
    found = {}
    for number, run in enumerate(runs):
        found[number] = finished(run)
        if found[number].status is Status.interrupted:
            break
    for run in runs[len(found) :]:
        run.close()
    return found


def drawn_again(begun: Callable[[int], Run], start: int) -> Run | None:
    """The run of a start from the prior, drawn again where the bound is not finite; None if it never is."""
    for _ in range(DRAWN_AGAIN):
        try:
            run = begun(start)
        except ModelError as error:
            reason = str(error)
            continue
        if abs(run.state.elbo) < FARTHEST:
            return run
        run.close()  # or its progress bar would stay
        reason = f"{run.state.elbo:.1g} nats, of which rounding hides whole ones"
    warn(
        f"start {start} is left out: at {DRAWN_AGAIN} draws from the prior the model has no bound ({reason})"
    )
    return None


def can_go_together(run: Run, schedule: Schedule, num_starts: int) -> bool:
    """True if every round is of pure closed forms, and numbers are few enough for batches to pay."""
    closed, setup = run.closed, run.setup
    is_asked_for = schedule in ("auto", "accelerated", "alternate") and run.methods == ("auto", "auto")
    if closed is None or not closed.is_complete or not is_asked_for or setup.processes.count > 1:
        return False
    if schedule_of(run, PROFILE_FROM, schedule) == "profile":  # which leaves a saddle where EM creeps
        return False
    lifted = closed.terms.lifted
    if not lifted.discrete:  # each start has draws, and a problem, of its own
        return False
    tables = lifted.found.tables.values()  # messages between discrete sites are Pyro's, not for torch.func
    has_messages = any(isinstance(table, Table) and len(table.discrete) > 1 for table in tables)
    if closed.moments or lifted.found.live or closed.is_searching or has_messages:
        return False
    return num_starts * (closed.terms.num_elements + setup.phi.size) <= MOST_TOGETHER


@dataclass
class Together:
    """Rounds of several runs of one problem.

    Attributes:
        runs: each at its start.
        is_accelerated: whether rounds are extrapolated.
    """

    runs: Sequence[Run]
    is_accelerated: bool

    def __post_init__(self) -> None:
        states = [run.state for run in self.runs]
        self.phi, self.theta = np.stack([s.phi for s in states]), np.stack([s.theta for s in states])
        self.elbo = np.array([state.elbo for state in states])
        self.is_expected = np.zeros(len(states), dtype=bool)  # whether phi has followed extrapolated theta
        closed = self.runs[0].closed
        assert closed is not None
        self.is_restarting = np.full(len(states), closed.is_restarting)
        self.by_theta = closed.is_led_by_theta
        self.extrapolations = [Extrapolation(run.setup, run.scales, self.by_theta) for run in self.runs]

    def climb(self, max_iter: int) -> bool:
        """Rounds until every start stands still; leaves each run there. False if interrupted."""
        begin, first, runs = time.perf_counter(), self.elbo.copy(), self.runs
        still, rounds = np.zeros(len(runs), dtype=int), np.zeros(len(runs), dtype=int)
        is_interrupted = False
        try:
            for iteration in range(1, max_iter + 1):
                last, is_moving = self.elbo.copy(), still < STILL
                self._round(is_moving, iteration)
                rounds[is_moving] = iteration
                limit = np.maximum(runs[0].tol, ROUNDING * np.abs(self.elbo))
                still = np.where(self.elbo - last < limit, still + 1, 0)
                if not (still < STILL).any():
                    break
        except KeyboardInterrupt:
            is_interrupted = True
        for i, run in enumerate(runs):
            run.state, run.iterations = self._state(i), int(rounds[i])
        seconds = (time.perf_counter() - begin) / len(runs)
        for run, before in zip(runs, first, strict=True):
            note = f"{run.iterations} rounds of {len(runs)} starts at once"
            gained = float(before), run.state.elbo
            try:
                run.record(Step(run.iterations, "start", *gained, 0.0, run.iterations, 0, seconds, note))
            except KeyboardInterrupt:  # a callback's
                is_interrupted = True
        return not is_interrupted

    def _state(self, i: int) -> State:
        """Where a start is."""
        return State(self.phi[i], self.theta[i], float(self.elbo[i]))

    def _round(self, is_moving: Flags, iteration: int) -> None:
        waiting = is_moving & ~self.is_expected
        if self.is_restarting.any():
            waiting &= ~self._restarted(waiting)
        self._take("E", waiting)
        self.is_expected[:] = False
        if self.theta.shape[1] > 0:
            self._take("M", is_moving)
        if self.is_accelerated:
            self._extrapolate(is_moving, iteration)

    def _take(self, block: str, chosen: Flags) -> None:
        """A step of the chosen starts, where their bounds do not fall."""
        if chosen.any():
            phi, theta, elbo = self._moved(block, self.phi, self.theta)
            self._keep(phi, theta, elbo, chosen & (elbo >= self.elbo - NOISE * (1 + np.abs(self.elbo))))

    def _restarted(self, chosen: Flags) -> Flags:
        """E-steps with mixture weights from equal ones, as long as they are the better ones; which are."""
        phi, theta, elbo = self._moved("restart", self.phi, self.theta)
        self.is_restarting &= ~chosen | (elbo > self.elbo)
        taken = chosen & self.is_restarting
        self._keep(phi, theta, elbo, taken)
        return taken

    def _extrapolate(self, is_moving: Flags, iteration: int) -> None:
        """See `Run._extrapolate`."""
        phi, theta, is_tried = self.phi.copy(), self.theta.copy(), np.zeros_like(is_moving)
        for i in np.flatnonzero(is_moving).tolist():
            trial = self.extrapolations[i].proposed(self._state(i), iteration)
            if trial is not None:
                phi[i], theta[i], is_tried[i] = trial.phi, trial.theta, True
        if not is_tried.any():
            return
        phi, theta, elbo = self._moved("E" if self.by_theta else "M", phi, theta)
        is_higher = is_tried & (elbo > self.elbo)
        self._keep(phi, theta, elbo, is_higher)
        self.is_expected = is_higher & self.by_theta
        for i in np.flatnonzero(is_tried).tolist():
            if is_higher[i]:
                self.extrapolations[i].taken(self._state(i))
            else:
                self.extrapolations[i].rule.restart()

    def _keep(self, phi: Vector, theta: Vector, elbo: Vector, chosen: Flags) -> None:
        rows = chosen[:, None]
        phi, theta = np.where(rows, phi, self.phi), np.where(rows, theta, self.theta)
        self.phi, self.theta, self.elbo = phi, theta, np.where(chosen, elbo, self.elbo)

    def _moved(self, block: str, phi: Vector, theta: Vector) -> tuple[Vector, Vector, Vector]:
        """One step of all starts from some points, and the bounds there."""
        setup, closed = self.runs[0].setup, self.runs[0].closed
        assert closed is not None
        terms = closed.terms

        def begun(phi: Tensor, theta: Tensor) -> Parts:
            sweep = Sweep.at(setup, terms, phi, theta)
            for batch in closed.weights if block == "restart" else ():
                sweep.level(batch)
            return sweep.phi, sweep.theta, sweep.statistics

        def ended(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
            phi, theta = Sweep(setup, terms, *parts).flat()
            return phi, theta, setup.elbo(phi, theta)

        with torch.no_grad():
            parts = vmap(begun)(torch.as_tensor(phi), torch.as_tensor(theta))
            for batch in closed.batches_of(block):
                parts = self._updated(batch, parts)
            phi, theta, elbo = (part.numpy() for part in vmap(ended)(parts))
        return phi, theta, elbo

    def _updated(self, batch: tuple[str, ...], parts: Parts) -> Parts:
        """`Sweep.update` of all starts: derivatives are taken outside vmap, of the sum over starts."""
        setup, closed = self.runs[0].setup, self.runs[0].closed
        assert closed is not None
        lifted, (_, theta, statistics) = closed.terms.lifted, parts
        if all(table.scope.isdisjoint(batch) for table in lifted.found.tables.values()):
            return parts  # what enters no term stays

        def total(leaves: Values, statistics: Values, theta: Values) -> Tensor:
            return lifted.total(batch, {**statistics, **leaves}, theta)

        def moved(parts: Parts, natural: list[Tensor]) -> Parts:
            sweep = Sweep(setup, closed.terms, *parts)
            sweep.take(batch, natural)
            return sweep.phi, sweep.theta, sweep.statistics

        leaves = {name: statistics[name].detach().requires_grad_() for name in batch}
        with torch.enable_grad():
            value = vmap(total)(leaves, statistics, theta).sum()
            natural = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        made: Parts = vmap(moved)(parts, list(natural))
        return made
