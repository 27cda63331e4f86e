"""Few draws: fits with terms on fixed draws climb on a part of them, and stay there if these are enough."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..bound.draws import widest
from ..bound.objective import Objective, Values
from ..model.checks import SingularMatrix
from .costly import FEW_DRAWS, PER_LATENT, is_costly
from .exactness import draws_note, excess, step_on_other_draws, values_of
from .scales import Scales
from .setup import Setup
from .smooth import Vector
from .state import State, elbo_at
from .status import Step
from .stopping import runaway

if TYPE_CHECKING:
    from .run import Run

SAME = 1e-10  # of a term, between numbers of draws
PER_OPERATION = 2000  # numbers that take as long as calling the operation that makes them
SHARE = 0.5  # of the work of all draws, that few may take
ROUGH = 0.03  # gradient norm on few draws; the optimum on all of them is mostly farther
GAIN = 1e-3  # nats of a round on few draws, likewise
CLOSE = 1e-3  # gradient norm of the first steps on all draws
CONFIRMED = 0.5  # of the rise on few draws, that has to be there on all of them
NEARBY = 0.3  # sds within which draws are as good as they were
FEWEST_ROUNDS = 10  # of a fit that has any to spare

Point: TypeAlias = tuple[Values, Values]


class FewDraws:
    """The part of a run that is on few of its fixed draws.

    Its optimum there is near the one on all of them, where Newton's method takes a step or two. What is
    decided (convergence, divergence, a stall) is decided on all draws, unless others would not move the
    optimum: then the fit ends on the few.

    Args:
        run: at its start.
    """

    def __init__(self, run: "Run") -> None:
        self.run = run
        self._start: State | None = None  # where all draws were left
        self._first = 0.0  # the bound there on few draws
        self._all = run.setup  # the problem on all of them
        self._last_round = 0
        self._is_decided = False
        self._settled: tuple[Vector, float] | None = None  # where few draws were found to be enough

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Fewer draws while the start is looked at, if all of them work on many numbers."""
        setup, objective = self.run.setup, self.run.setup.objective
        if is_costly(setup) and setup.captures.mode is not True:
            objective.take_draws(FEW_DRAWS[0])
        yield
        if objective.num_draws < objective.full_draws:
            objective.take_full_draws()
            setup.captures.start_again()
            if objective.is_random and not objective.is_exact:
                state = self.run.state
                self.run.state = replace(state, elbo=elbo_at(setup, state.phi, state.theta))

    @property
    def is_on(self) -> bool:
        """True while the bound is on few draws, and another one on all of them."""
        return self._start is not None

    @property
    def _is_settled(self) -> bool:
        """True while the bound is on few draws for good."""
        objective = self.run.setup.objective
        return self._settled is not None and objective.num_draws < objective.full_draws

    def begin(self, max_iter: int) -> None:
        """Take few draws, if terms are the same on them, or the fit has some way to go and it saves work."""
        run, setup, objective = self.run, self.run.setup, self.run.setup.objective
        if self._is_decided or not objective.is_random or objective.is_exact or setup.processes.count > 1:
            return
        self._is_decided = True
        few, is_same, share = _number(setup, run.state)
        if is_same:
            objective.take_draws(few)
        is_short = run.is_warm or max_iter < FEWEST_ROUNDS or run.tol >= GAIN or objective.has_kinks
        if is_same or is_short or setup.captures.mode is True or share > SHARE:
            return
        self._all = replace(setup, objective=objective.twin())
        objective.take_draws(few)
        state = replace(run.state, elbo=elbo_at(setup, run.state.phi, run.state.theta))
        if not np.isfinite(state.elbo):
            objective.take_full_draws()
            return
        self._start, self._first, self._last_round = run.state, state.elbo, run.iterations + max_iter // 2
        run.gtol = ROUGH
        self._go_to(state, f"{few} of {objective.full_draws:,} draws on the way")

    def watch(self) -> None:
        """After a step: go on with all draws where few have done their part, or led astray."""
        run = self.run
        name = runaway(run.setup, run.state, run.first)
        if name is not None:
            self.end(f"{name!r} ran away")
        elif self._is_stuck:
            self.end("a step gained nothing, and its gradient stayed")
        elif self._is_done():
            self._settle()

    @property
    def _is_stuck(self) -> bool:
        """True if a step has found no way on where the slope is not small, as at a kink."""
        row = self.run.history[-1]
        return row.block in ("E", "joint") and row.gradient > self.run.gtol and row.gain < GAIN

    def _is_done(self) -> bool:
        run, setup = self.run, self.run.setup
        is_one_problem = run.history[-1].block == "joint" or not (setup.phi.size and setup.theta.size)
        is_solved = is_one_problem and run.history[-1].gradient <= run.gtol
        is_late = run.iterations >= self._last_round
        return is_solved or is_late or run.gain_of_round() < GAIN

    def follow(self) -> None:
        """The bound has changed, and so has the one on all draws."""
        objective = self.run.setup.objective.twin()
        objective.take_full_draws()
        self._all = replace(self.run.setup, objective=objective)

    def _settle(self) -> None:
        """Stay on few draws if others move the optimum by next to nothing; else take more, or all of them."""
        run, objective = self.run, self.run.setup.objective
        if objective.full_draws > FEW_DRAWS[-1]:  # asked for, or found to be necessary
            self.end()
            return
        scale = run.scales.of(run.state, "joint", run.iterations)
        step = step_on_other_draws(run.setup, run.state, scale, 2)
        step = np.array([np.inf]) if step is None else step
        error, too_far = float(np.abs(step).max(initial=0)), excess(step)
        if too_far <= 1:
            self._start, self._settled = None, (run.state.joint, error)
            run.reset_gtol(CLOSE)
            note = f"{objective.num_draws} draws are enough: others move the optimum by {error:.1g} sd"
            self._go_to(run.state, note)
            return
        more = next((n for n in FEW_DRAWS if n > objective.num_draws * too_far), np.inf)
        if more >= objective.full_draws:
            self.end()
            return
        objective.take_draws(int(more))
        state = replace(run.state, elbo=elbo_at(run.setup, run.state.phi, run.state.theta))
        self._first += state.elbo - run.state.elbo
        self._go_to(state, f"{more} draws: others moved the optimum by {error:.1g} sd")

    def are_enough(self, scale: Vector) -> bool:
        """True, with a note, if few draws have been found to be enough next to where the run is now."""
        if not self._is_settled:
            return False
        assert self._settled is not None
        at, error = self._settled
        objective = self.run.setup.objective
        if not (np.abs(self.run.state.joint - at) <= NEARBY * scale).all():
            return False
        objective.add_note(draws_note(objective.num_draws, error))
        return True

    def close(self) -> None:
        """All draws again, for what comes after the fit."""
        found = self._here_on_all() if self._is_settled else None
        self.run.setup.objective.take_full_draws()
        if found is not None:
            self._go_to(*found, is_told=False)

    def end(self, lost: str = "", is_told: bool = True) -> None:
        """All draws from here on, or from the start again.

        Args:
            lost: what happened on few draws, if they have lost the way.
            is_told: whether callbacks are told.
        """
        run, setup = self.run, self.run.setup
        state, note = self._on_all(lost)
        is_back = state is self._start
        setup.objective.take_full_draws()
        self._start = None
        if is_back:
            run.scales = Scales(setup, run.hooks)
        run.reset_gtol(None if is_back else CLOSE)
        self._go_to(state, note, is_told)
        if is_back:
            run.start_factors()

    def saved(self) -> tuple[Setup, State, tuple[Step, ...]]:
        """The problem, a state and a history to go on from: all of them on all draws."""
        run, history = self.run, tuple(self.run.history)
        if self._is_settled:
            state, note = self._here_on_all()
        elif self.is_on:
            state, note = self._on_all("")
        else:
            return run.setup, run.state, history
        row = replace(self._row(state, note), draws=self._all.objective.num_draws)
        return self._all, state, (*history, row)

    def _on_all(self, lost: str) -> tuple[State, str]:
        """Where to go on with all draws, and what to say: from the start where the rise is not there."""
        run, start = self.run, self._start
        assert start is not None
        here, note = self._here_on_all()
        promised, rise = run.state.elbo - self._first, here.elbo - start.elbo
        if not lost and not rise >= CONFIRMED * promised:
            lost = f"the bound rose by {promised:.3g} nats, and on all of them by {rise:.3g}"
        again = f"{self._all.objective.num_draws:,} draws from the start again: on few {lost}"
        return (start, again) if lost else (here, note)

    def _here_on_all(self) -> tuple[State, str]:
        state, num_draws = self.run.state, self._all.objective.num_draws
        return replace(
            state, elbo=elbo_at(self._all, state.phi, state.theta)
        ), f"{num_draws:,} draws from here on"

    def _go_to(self, state: State, note: str, is_told: bool = True) -> None:
        """Another bound from here on, and maybe another place."""
        run, row = self.run, self._row(state, note)
        run.forget_rounds()
        run.setup.captures.start_again()
        run.is_expected, run.next_check, run.state = False, 0, state
        run.record(row, is_told)

    def _row(self, state: State, note: str) -> Step:
        return Step(self.run.iterations, "check", self.run.state.elbo, state.elbo, 0.0, 1, 0, 0.0, note)


def _number(setup: Setup, state: State) -> tuple[int, bool, float]:
    """How few draws may do, whether all terms are the same on them, and their share of the work.

    Averages of cubic polynomials in the latents of a clique are exact however many matched draws there are:
    factor scores under loadings that are parameters, states of a linear system. Two points that have nothing
    in particular tell those from other terms.
    """
    objective = setup.objective
    noise = np.random.default_rng(objective.seed)
    points = [
        values_of(setup, *(x + 0.5 * noise.standard_normal(x.size) for x in (state.phi, state.theta)))
        for _ in range(2)
    ]
    for few in FEW_DRAWS:
        width = widest(objective.specs, few)
        if few >= objective.num_draws:
            break
        if few <= 2 * width:  # moments are not matched
            continue
        other = objective.with_other_draws(few)
        if _are_same(other, objective.with_other_draws(2 * few), points):
            return few, True, 0.0
        if few >= PER_LATENT * width:
            return few, False, _share(objective, other, points[0])
    return objective.num_draws, False, 1.0


def _are_same(one: Objective, other: Objective, points: Sequence[Point]) -> bool:
    """Whether two numbers of draws give the same terms at points."""
    for point in points:
        try:
            with torch.no_grad():
                first, second = one.terms(*point), other.terms(*point)
        except SingularMatrix:
            return False
        if any(bool((first[n] - second[n]).abs() > SAME * (1 + first[n].abs())) for n in first):
            return False
    return True


def _share(one: Objective, other: Objective, point: Point) -> float:
    """What a second, smaller number of draws takes of the work of the first."""
    with torch.no_grad(), _Work() as work:
        try:
            other.drawn_terms(*point)
        except SingularMatrix:
            return 1.0
    if not other.is_vectorised:  # a run each
        return other.num_draws / one.num_draws
    called = PER_OPERATION * work.operations
    return (called + other.num_draws * work.numbers) / (called + one.num_draws * work.numbers)


class _Work(TorchFunctionMode):
    """Work that is the same each time, as seconds are not: operations called, and numbers made in a draw.

    A mode of the dispatcher would see more of both, and load torch's compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.numbers = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in (made if isinstance(made, list | tuple) else (made,)) if isinstance(t, Tensor)]
        self.operations += bool(tensors)
        self.numbers += sum(tensor.numel() for tensor in tensors)
        return made
