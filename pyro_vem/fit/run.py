"""One fit on its way: its state, its history, what moves it and what watches it."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import warn
from ..model.checks import regular
from .acceleration import Extrapolation
from .border import Border
from .checkpoint import Checkpoint, snapshot
from .closed import ClosedForm
from .costly import on_fewer
from .exactness import more_draws, settle, settle_nodes
from .few import FewDraws
from .kinks import Kinks
from .minimise import Method
from .mode import nearer
from .options import FitOptions
from .profile import Profile
from .result import VEMResult
from .saddle import has_left_saddle
from .scales import Scales
from .setup import Setup
from .smooth import Smooth
from .starts import first_state, initial_values, scattered
from .state import State, elbo_at, joint_loss
from .status import Status, Step, progress_bar
from .steps import check_second_derivatives, hooked, note_idle, start_factors, step
from .stopping import remaining, runaway, stalled, standing_still

StepMethod = Literal["auto", "newton", "lbfgs"]
Hook = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
MStep: TypeAlias = StepMethod | Mapping[str, Hook]
Callback = Callable[[Step, Mapping[str, Tensor]], None]
ROUNDING = 1e3 * float(np.finfo(np.float64).eps)  # of the bound, relative
MOST_KEPT = 100_000  # parameters of which the points after each step are kept, for plots
NEWTON_LIMIT = 5_000_000  # parameters in a block beyond which its Krylov vectors outgrow memory
MOST_POLISHED = 30  # rounds of closed forms after convergence
FIRST_GTOL = 1e-2  # scaled gradient norm, of first steps
FIXED = 1e-13  # movement in a round at which closed forms stand still


@dataclass
class Run:
    """The moving parts of one fit: the state, its history, and what watches it."""

    setup: Setup
    options: FitOptions
    tol: float
    methods: tuple[StepMethod, MStep]
    begin: float
    callbacks: tuple[Callback, ...]
    progress: bool | None
    history: list[Step] = field(default_factory=list)
    points: list[State] = field(default_factory=list)
    gtol: float = FIRST_GTOL
    failed: int = 0
    next_check: int = 0
    closed: ClosedForm | None = None
    saddles: int = 0  # that the fit has left
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    is_warm: bool = False  # whether an earlier fit has left both blocks where they are
    evaluated: tuple[State, Smooth] | None = None  # where the last step of all that moves has ended
    is_expected: bool = False  # whether phi has followed the extrapolated theta

    @regular("the start")
    def start(self, warm: VEMResult | None, number: int = 0) -> None:
        """Put both blocks at their initial values.

        Args:
            warm: an earlier result to go on from.
            number: of the start; the first one leaves the caller's parameters where they are.
        """
        setup, self.is_warm = self.setup, warm is not None
        if self.checkpoint.path is not None:
            self.checkpoint.check(setup.shapes, setup.problem.call)
        if self.checkpoint.left is not None:
            setup.objective.add_note(f"went on from a checkpoint after {self.checkpoint.left.n_iter} rounds")
        self.bar = progress_bar(self.progress if setup.processes.rank == 0 else False)
        self.few = FewDraws(self)
        with self.few.looking():
            self._look_at_start(warm, number)
        self.first = self.state
        self.kinks = Kinks(self)
        self.border = Border(self, {edge.name for edge in warm.boundary} if warm is not None else ())

    def _look_at_start(self, warm: VEMResult | None, number: int) -> None:
        """Compile the terms where both blocks begin, and see that the bound can be climbed from there."""
        setup = self.setup
        phi, theta = initial_values(setup, setup.phi, warm), initial_values(setup, setup.theta, warm)
        phi, theta = scattered(setup, phi, theta) if number else (phi, theta)
        self.state = first_state(setup, self.options, phi, theta, can_narrow=warm is None)
        if setup.lifted is not None:
            self.closed = ClosedForm(setup, setup.lifted, self.hooks)
            if warm is None:
                self.state = self.closed.begun(self.state, number)
        self.reset_gtol()
        self.iterations = 0
        self.scales = Scales(setup, self.hooks)
        if warm is None:
            note_idle(setup, self.state)
            found = nearer(setup, self.state)
            if found is not None:
                self.state, row = found
                self.record(row)
        if not setup.is_our_code:
            check_second_derivatives(setup, self.state, self.scales.of(self.state, "joint", 0))

    def reset_gtol(self, first: float | None = None) -> None:
        """How small gradients have to be at first; as at last where no other block waits."""
        is_alone = not (self.setup.phi.size and self.setup.theta.size)
        self.gtol = self._final_gtol() if is_alone else first or FIRST_GTOL

    def start_factors(self) -> None:
        """The variances near their optimum, unless an earlier fit has left them somewhere."""
        has_begun = any(row.block == "start" for row in self.history)  # nearer, with its factors
        if self.is_warm or has_begun:
            return
        self.state, row, smooth = start_factors(self.setup, self.state)
        self.evaluated = None if smooth is None else (self.state, smooth)
        self.record(row)
        change = settle_nodes(self.setup, self.state.phi, self.state.theta)  # now, not after a whole fit
        if change is not None:
            self.changed(change)

    def step(self, block: str, iteration: int) -> None:
        """One step; a block without parameters is skipped."""
        size = {"E": self.setup.phi.size, "M": self.setup.theta.size}.get(block, 1)
        self.iterations = iteration
        if not size:
            return
        if block == "M":
            for name, hook in self.hooks.items():
                self.state, made = hooked(self.setup, self.state, name, hook, iteration)
                self.record(made)
            if set(self.hooks) >= set(self.setup.theta.names):
                return
        if self.closed is not None and block != "joint":
            if block == "E" and self.is_expected:  # the extrapolation has taken this step
                self.is_expected = False
                if self.closed.is_all_of["E"]:
                    return
            self.state, row = self.closed.step(self.state, block, iteration)
            self.record(row)
            if self.closed.is_all_of[block]:
                return
        known, self.evaluated = self.evaluated, None  # or two graphs would be kept at a time
        self.state, row, smooth = step(
            self.setup, self.state, block, self.scales,
            iteration=iteration, gtol=self.gtol, method=self.method(block),
            max_iter=self.options.step_iterations,
            begun=known[1] if known is not None and known[0] is self.state else None,
        )  # fmt: skip
        self.evaluated = None if smooth is None else (self.state, smooth)
        self.record(row)

    def profile(self, iteration: int) -> None:
        """A quasi-Newton step in theta, with the E-step at its end."""
        self.iterations = iteration
        self.state, row = self.profiled.step(self.state, iteration)
        self.record(row)

    @property
    def hooks(self) -> Mapping[str, Hook]:
        """The caller's functions for parameters, which nothing else moves."""
        return self.methods[1] if isinstance(self.methods[1], Mapping) else {}

    @functools.cached_property
    def profiled(self) -> Profile:
        """The bound maximised over phi."""
        return Profile(self.setup, self.best_phi, lambda: self.scales.held)

    def best_phi(self, state: State) -> State:
        """The E-step at other parameters, to its own tolerance."""
        if not self.setup.phi.size:
            return replace(state, elbo=elbo_at(self.setup, state.phi, state.theta))
        if self.closed is not None:
            state, _ = self.closed.step(state, "E", self.iterations)
            if self.closed.is_all_of["E"]:
                return state
        return step(
            self.setup, state, "E", self.scales, iteration=self.iterations, gtol=self._final_gtol(),
            method=self.method("E"), max_iter=self.options.step_iterations,
        )[0]  # fmt: skip

    def _best_theta(self, state: State) -> State:
        """The M-step at other factors, where it is of closed forms alone."""
        if not self.setup.theta.size:
            return replace(state, elbo=elbo_at(self.setup, state.phi, state.theta))
        assert self.closed is not None
        return self.closed.step(state, "M", self.iterations)[0]

    def maximise(self, iteration: int, is_accelerated: bool) -> None:
        """The second half of a round: the M-step, and an extrapolation of the rounds so far."""
        if not is_accelerated or self.closed is None or not self.closed.is_complete:
            self.step("M", iteration)
        elif self.extrapolation.by_theta:
            self.step("M", iteration)
            self._extrapolate(iteration)
        elif not self._extrapolate(iteration):
            self.step("M", iteration)

    @functools.cached_property
    def extrapolation(self) -> Extrapolation:
        """Of theta where the E-step is exact (or the M-step has hooks), else of phi."""
        assert self.closed is not None
        by_theta = self.closed.is_led_by_theta or bool(self.hooks)
        return Extrapolation(self.setup, self.scales, by_theta, self.hooks)

    def _extrapolate(self, iteration: int) -> bool:
        """Go on from where the rounds seem to lead, if the bound is higher there; whether it is."""
        start, old, by_theta = time.perf_counter(), self.state, self.extrapolation.by_theta
        trial = self.extrapolation.proposed(old, iteration)
        if trial is None:
            return False
        trial = self.best_phi(trial) if by_theta else self._best_theta(trial)
        note, is_higher = "extrapolated", trial.elbo > old.elbo
        if is_higher:
            self.state, self.is_expected = trial, by_theta
            self.extrapolation.taken(trial)
        else:
            self.extrapolation.rule.restart()
            note = "extrapolation rolled back: the bound would have fallen"
        seconds = time.perf_counter() - start
        self.record(Step(iteration, "joint", old.elbo, self.state.elbo, 0.0, 1, 0, seconds, note))
        return is_higher

    def is_converged(self) -> bool:
        """The stopping rule, tried only where the gains say that it may hold.

        A check costs as much as several steps, so after one that fails the next waits.
        """
        gain, tol, final = self.gain_of_round(), self.tolerance(), self._final_gtol()
        has_both = self.setup.theta.size and self.setup.phi.size
        is_solved = not has_both or self.gtol <= final
        is_held_up = is_solved and self.kinks.hold_up(gain)  # by what the step was asked for
        # Inexact at first: a block need not be solved far beyond what a round gains.
        self.gtol = float(np.clip(0.1 * max(gain, 0.0) ** 0.5, final, max(final, self.gtol)))
        most = 1 if self.hooks else 10 if self.closed is not None else 1e3 if has_both else np.inf
        is_slow = gain > most * tol  # no gradient tells what functions of the caller have left
        if is_held_up:
            return self.kinks.are_passed()
        if not is_solved or is_slow or (self.iterations < self.next_check and not self.is_stalled()):
            return False
        smooth = self.smooth()
        left = remaining(smooth, tol)
        if left.is_small(tol) or (left.is_no_maximum and gain < tol):
            if has_left_saddle(self, smooth):
                return False
            if left.is_small(tol) and not self.border.has_released():
                self.border.mark()
                return True
        self.failed += 1
        self.gtol = min(self.gtol, self._final_gtol())
        self.next_check = self.iterations + min(2**self.failed, 32)
        return False

    def smooth(self) -> Smooth:
        """The bound as a function of all that moves, about where it is; evaluated there if the step was."""
        scale = self.scales.of(self.state, "joint", self.iterations)
        known, self.evaluated = self.evaluated, None
        if known is not None and known[0] is self.state and not self.setup.objective.has_kinks:
            smooth = known[1].in_units_of(scale)
        else:
            smooth = Smooth(joint_loss(self.setup), self.state.joint, scale)
        fewer = on_fewer(self.setup)
        if fewer is not None:
            smooth.curvature = Smooth(joint_loss(fewer), self.state.joint, scale)
        return smooth

    def tolerance(self) -> float:
        """The caller's tolerance, or what rounding leaves of a bound of many nats."""
        return max(self.tol, ROUNDING * abs(self.state.elbo))

    def _final_gtol(self) -> float:
        """Scaled gradient norm at which a block counts as solved; lower after each failed check."""
        return max(1e-10, 0.1 * self.tolerance() ** 0.5 * 0.3**self.failed)

    def is_stalled(self) -> bool:
        """True if the last steps used up their iterations for next to nothing, or none moves anything."""
        is_stalled = stalled(self.history, 2 * self.options.step_iterations)
        return is_stalled or self.kinks.are_too_large or self.is_still()

    def is_still(self) -> bool:
        """True if rounds of closed forms are down to rounding, which takes back every step of theirs."""
        return self.closed is not None and self.closed.is_complete and standing_still(self.history)

    @regular("a draw of the guide")
    def is_reopened(self) -> bool:
        """True if the bound itself had to change at the point reached: the fit goes on from there."""
        change = settle(self.setup, self.state)
        if change is None:
            scale = self.scales.of(self.state, "joint", self.iterations)
            change = None if self.few.are_enough(scale) else more_draws(self.setup, self.state, scale)
        if change is not None:
            self.changed(change)
            self.next_check = 0
        return change is not None

    def forget_rounds(self) -> None:
        """The rounds so far say nothing of those to come."""
        for name in ("profiled", "extrapolation"):
            self.__dict__.pop(name, None)

    def changed(self, change: str) -> None:
        """Record that the bound itself is another one from here on."""
        self.setup.captures.forget()
        if self.few.is_on:
            self.few.follow()
        else:
            self.setup.objective.take_full_draws()
        self.forget_rounds()
        if self.setup.lifted is not None:
            self.closed = ClosedForm(self.setup, self.setup.lifted, self.hooks)
        before = self.state.elbo
        elbo = elbo_at(self.setup, self.state.phi, self.state.theta)
        self.state = replace(self.state, elbo=elbo)
        self.record(Step(self.iterations, "check", before, elbo, 0.0, 1, 0, 0.0, change))

    def gain_of_round(self) -> float:
        """Gain of the last M-step and the E-step after it (or of the joint step)."""
        blocks = [row for row in self.history if row.iteration >= self.iterations - 1]
        last = [row for row in blocks if row.iteration == self.iterations or row.block == "M"]
        return sum((row.gain for row in last), 0.0)

    def is_diverged(self, is_last: bool = False) -> bool:
        """True, with a warning that names it, if a site or parameter has run away, or would if it could."""
        name = runaway(self.setup, self.state, self.first)
        if name is None and is_last and self.closed is not None:
            name = self.closed.singular_at(self.state)
        name = self.setup.processes.first(name)
        if name is not None:
            warn(f"site {name!r} has run away: {Status.diverged.value}")
        return name is not None

    def result(self, status: Status) -> VEMResult:
        """The frozen result at the present state."""
        self.few.close()
        return VEMResult.of(
            self.setup, self.state, status, tuple(self.history), self.iterations,
            time.perf_counter() - self.begin, self.options, tuple(self.points),
            self.border.edges.named() if status is Status.converged else (),
        )  # fmt: skip

    def save(self, is_last: bool = False) -> None:
        """Write the checkpoint, if there is to be one."""
        self.checkpoint.save(
            lambda: snapshot(*self.few.saved(), self.iterations, time.perf_counter() - self.begin), is_last
        )

    def polish(self) -> None:
        """Go on with closed forms, which are cheap, until a round moves nothing."""
        if self.closed is None or not self.closed.is_complete:
            return
        moved = np.inf
        for _ in range(MOST_POLISHED):
            point, last = self.state.joint, moved
            for block in ("M", "E"):
                self.step(block, self.iterations)
            moved = self.setup.processes.most(float(np.abs(self.state.joint - point).max(initial=0)))
            if moved < FIXED or moved > 0.5 * last:
                return

    def close(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def method(self, block: str) -> Method:
        """The optimiser of a block's steps."""
        chosen = self.methods[1] if block == "M" else self.methods[0]
        if not isinstance(chosen, Mapping) and chosen != "auto":
            return chosen
        sizes = {"E": self.setup.phi.size, "M": self.setup.theta.size}
        size = self.setup.processes.spread(block).size(sizes.get(block, sum(sizes.values())))
        return "newton" if size <= NEWTON_LIMIT else "lbfgs"

    def record(self, row: Step | None, is_told: bool = True) -> None:
        """Add a row to the history, and tell whoever watches."""
        if row is None:
            return
        objective = self.setup.objective
        is_drawn = objective.is_random and not objective.is_exact
        row = replace(row, draws=objective.num_draws if is_drawn else 0)
        self.history.append(row)
        if self.state.joint.size <= MOST_KEPT:
            self.points.append(self.state)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{row.block}-step {row.iteration}, ELBO {row.after:.6f}", refresh=False)
            self.bar.update()
        for callback in self.callbacks if is_told else ():
            with torch.no_grad():  # of a copy: what a callback writes into is its own
                callback(row, self.setup.theta_values(torch.tensor(self.state.theta)))
