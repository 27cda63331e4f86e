"""Parameters whose maximum lies at the edge of their constraint: found, gone to, held there, and named."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributions import SoftmaxTransform, transform_to

from ..model.parameters import Block, Parameter
from ..model.support import first_part
from .setup import Setup
from .smooth import Flags, Smooth, Vector
from .state import State, elbo_at, loss_of

FAR = (40.0, 80.0)  # unconstrained distances at which a value with an end has come to it
SAME = 1e-9  # of values there, relative
STRIDE = float(np.log(10.0))  # towards an edge, unconstrained: a variance falls to a hundredth
MOST_STRIDES = 12
# Of slopes in a stride: less than a square root falls, and a likelihood without end falls not at all.
DECAY = 0.5
# Towards an edge: before a slow fit tries it, tries it whatever factors alone can follow (loadings may have
# to turn with them), and before a converged one does.
DRIFTED, GONE, FARTHER = 1.0, 3.0, 5.0
MOST_NAMED = 6  # numbers of a parameter that a sentence lists
ROUGH, PRECISE = 1e-5, 1e-2  # gradient norm, for a nat of slope and for one of tolerance
FIRST_TRY = 16  # round: before, steps of all parameters at once may end a slow fit
BOTH = "E", "joint"
LEFT = 0.1  # share of the tolerance that may be left to gain beyond
Follow = Callable[[State, Flags, float, tuple[str, ...]], State | None]  # to a gradient norm, by blocks


@dataclass(frozen=True)
class Edge:
    """A number of a parameter whose maximum is at the edge of its constraint.

    Attributes:
        name: of the parameter, or of the MAP site.
        index: of the number, on the unconstrained scale (for most constraints the value's own).
        limit: the value there; nan where the number is no element's own, as of a correlation matrix.
    """

    name: str
    index: tuple[int, ...]
    limit: float

    @property
    def label(self) -> str:
        """As it is written in reports.

        Example:
            >>> Edge("w", (1,), 0.0).label
            'w[1]'
        """
        return f"{self.name}[{', '.join(map(str, self.index))}]" if self.index else self.name

    def __str__(self) -> str:
        """With its value.

        Example:
            >>> print(Edge("w", (1,), 0.0))
            w[1] = 0
        """
        return f"{self.label} at its limit" if np.isnan(self.limit) else f"{self.label} = {self.limit:.6g}"


@dataclass
class Edges:
    """What is known of the edges of one fit's parameters.

    Where the maximum is at an edge, the bound rises to its limit as C exp(-k |u|) dies away, u unconstrained:
    every step moves u by about as much as the one before, for less and less, and the factors of a variance
    component have to shrink with it. So a stride of a decade is taken, factors and other parameters follow,
    and the slope tells: towards the edge still and much smaller, or inwards, when the maximum lies between.
    Nothing here depends on units. What has come to its edge is held: no step could tell it from rounding.

    Attributes:
        setup: the problem.
        follow: gives the best factors and other parameters where some numbers of theta stand still.
        still: parameters that no step moves.
        held: numbers of theta that are held at their edge: -1 or 1, the direction; 0 elsewhere.

    References:
        Self and Liang (1987), Asymptotic properties of maximum likelihood estimators and likelihood
        ratio tests under nonstandard conditions, JASA 82.
    """

    setup: Setup
    follow: Follow
    still: Collection[str] = ()
    held: Vector = field(init=False)
    next_try: int = FIRST_TRY
    tries: int = 0

    def __post_init__(self) -> None:
        size = self.setup.theta.size
        self.held, self._banned = np.zeros(size), np.zeros(size, dtype=bool)
        self._least, self._most = np.full(size, np.inf), np.full(size, -np.inf)
        self._before = np.zeros(size)  # where what is held now was inside

    def watch(self, theta: Vector) -> None:
        """Remember how far inside parameters have been."""
        np.minimum(self._least, theta, out=self._least)
        np.maximum(self._most, theta, out=self._most)

    def drifted(self, theta: Vector, least: float) -> Vector:
        """Directions to the edges that numbers have gone towards by so much; 0 elsewhere."""
        is_free = (self.held == 0) & ~self._banned & ~self.setup.theta.where(self.still)
        down, up = is_free & (self._most - theta >= least), is_free & (theta - self._least >= least)
        found = []
        for parameter in self.setup.theta.parameters:
            where = self.setup.theta.where([parameter.name])
            has_down, has_up = ends(parameter, down[where], up[where])
            found.append(np.where(has_down, -1.0, np.where(has_up, 1.0, 0.0)))
        return np.concatenate([np.zeros(0), *found])

    def gone_to(self, state: State, least: float, tol: float, iteration: int) -> tuple[State, str] | None:
        """The state at the edges that the bound rises to, held from now on, and their names; or None.

        Args:
            state: where factors are at their optimum given theta.
            least: drift from which on a number is tried.
            tol: what is left to gain, in nats.
            iteration: after which tries become rarer and rarer.
        """
        chosen = self.drifted(state.theta, least)
        if not chosen.any():
            return None
        self.tries += 1
        self.next_try = iteration + 4**self.tries
        gone = self.drifted(state.theta, GONE)
        found = self._reached(state, np.where(gone != 0, gone, self._plausible(state, chosen, tol)), tol)
        if found is None:
            return None
        reached, chosen = found
        self.held = np.where(chosen != 0, chosen, self.held)
        self._before = np.where(chosen != 0, state.theta, self._before)
        return reached, ", ".join(edge.label for edge in self.named(chosen))

    def inside(self, state: State, names: Collection[str], tol: float) -> tuple[State, str] | None:
        """The state with what stands at an edge begun inside, and its names; None if the bound is no higher.

        At an edge slopes are rounding, towards a maximum inside too: only another start tells.

        Args:
            state: at the start, as an earlier fit has left it.
            names: of parameters that may begin where the model itself starts.
            tol: what is left to gain, in nats.
        """
        chosen = np.where(self.setup.theta.where(names), self.drifted(state.theta, FARTHER), 0.0)
        if not chosen.any():
            return None
        moved = self._moved(state, np.where(chosen != 0, self.setup.theta.initial().numpy(), state.theta))
        here = self.follow(state, chosen != 0, PRECISE * tol, BOTH)
        there = self.follow(moved, np.zeros_like(chosen, dtype=bool), PRECISE * tol, BOTH)
        if here is None or there is None or there.elbo <= here.elbo + tol:
            return None
        return there, ", ".join(edge.label for edge in self.named(chosen))

    def _plausible(self, state: State, chosen: Vector, tol: float) -> Vector:
        """What a first stride, followed by the factors alone and roughly, does not rule out."""
        before = np.abs(self._slopes(state, chosen))
        gtol = float(np.clip(1e-3 * before.sum(), PRECISE * tol, 1e-2))
        while chosen.any():
            moved = self._moved(state, state.theta + STRIDE * chosen)
            trial = self.follow(moved, chosen != 0, gtol, ("E",))
            if trial is None:
                return np.zeros_like(chosen)
            now = self._slopes(trial, chosen)
            is_lost = (chosen != 0) & (now < -0.1 * before - tol)
            if not is_lost.any():
                return chosen if trial.elbo >= state.elbo - tol else np.zeros_like(chosen)
            # The worst first: with them so far off, others' slopes say little.
            is_lost &= now <= 0.1 * now.min()
            chosen = np.where(is_lost, 0.0, chosen)
        return chosen

    def _reached(self, state: State, chosen: Vector, tol: float) -> tuple[State, Vector] | None:
        """Strides to the edges, all at once; directions with a maximum between drop out."""
        # Slopes are those of the maximum over all else once that is found, as precisely as they are small.
        begin = self.follow(state, chosen != 0, _precision(self._slopes(state, chosen), tol), BOTH)
        if begin is None:
            return None
        before = self._slopes(begin, chosen)
        chosen = np.where(before > -LEFT * tol, chosen, 0.0)
        state, slopes = begin, before
        for _ in range(MOST_STRIDES):
            if not chosen.any():
                return None
            # What is held goes on with it: two errors near zero fix two factors together.
            moved = self._moved(state, state.theta + STRIDE * np.where(chosen != 0, chosen, self.held))
            trial = self.follow(moved, chosen != 0, _precision(slopes, tol), BOTH)
            if trial is None:
                return None
            now = self._slopes(trial, chosen)
            limit = np.maximum(DECAY * slopes, LEFT * tol / float((chosen != 0).sum()))
            is_inwards = (chosen != 0) & (now < -LEFT * tol)
            # A maximum lies between for the worst of them, or the bound rises without end.
            is_lost = is_inwards & (now <= 0.1 * now.min()) if is_inwards.any() else now > limit
            if is_lost.any():
                chosen, state, slopes = np.where(is_lost, 0.0, chosen), begin, before
                continue
            if not trial.elbo >= state.elbo - tol:
                return None
            state, slopes = trial, now
            if float(slopes[chosen != 0].sum()) < LEFT * tol:
                return state, chosen
        return None

    def released(self, state: State, tol: float) -> tuple[State, str] | None:
        """The state with what the bound draws inside again where it was before, and its names; or None."""
        if not self.held.any():
            return None
        precise = self.follow(state, self.held != 0, PRECISE * tol, BOTH)
        if precise is None:
            return None
        back = np.where(self._slopes(precise, self.held) < -tol, self.held, 0.0)
        if not back.any():
            return None
        self.held, self._banned = np.where(back != 0, 0.0, self.held), self._banned | (back != 0)
        moved = self._moved(state, np.where(back != 0, self._before, state.theta))
        found = self.follow(moved, back != 0, PRECISE * tol, BOTH)
        return None if found is None else (found, ", ".join(edge.label for edge in self.named(back)))

    def mark(self, state: State, tol: float) -> None:
        """Know what is at its edge where a fit has converged on its way there; the state stays as it is."""
        self.watch(state.theta)
        self.gone_to(state, FARTHER, tol, 0)

    def named(self, chosen: Vector | None = None) -> tuple[Edge, ...]:
        """What the numbers chosen are called; by default those held."""
        chosen = self.held if chosen is None else chosen
        found, start = [], 0
        for parameter in self.setup.theta.parameters:
            shape = parameter.unconstrained.shape
            part = torch.as_tensor(chosen[start : start + shape.numel()]).reshape(shape)
            start += shape.numel()
            if part.any():
                limits = parameter.moved(FAR[1] * part)
                limits = torch.where(limits.abs() <= SAME * parameter.init.abs(), 0.0, limits)
                is_own = limits.shape == shape
                aside = parameter.moved(torch.where(part != 0, FAR[1] * part, 1.0))
                is_fixed = (aside - limits).abs() <= SAME * (1 + parameter.init.abs() + limits.abs())
                limits = torch.where(is_fixed, limits, torch.nan)  # others move a covariance there
                for index in part.nonzero().tolist():
                    limit = float(limits[tuple(index)]) if is_own else float("nan")
                    found.append(Edge(parameter.name, tuple(index), limit))
        return tuple(found)

    def _moved(self, state: State, theta: Vector) -> State:
        """Other parameters, and the factors as they are."""
        return State(state.phi, theta, elbo_at(self.setup, state.phi, theta))

    def _slopes(self, state: State, chosen: Vector) -> Vector:
        """By how much the bound rises towards the edges, nats for a unit; 0 elsewhere."""
        if not chosen.any():
            return np.zeros_like(chosen)
        loss, theta = loss_of(self.setup, state, "M")
        smooth = Smooth(loss, theta, np.ones_like(theta))
        return np.asarray(-chosen * smooth.gradient(smooth.zero))


def _precision(slopes: Vector, tol: float) -> float:
    """The gradient norm at which slopes a hundred times smaller are known to a percent or so."""
    return max(ROUGH * float(np.abs(slopes).sum()), PRECISE * tol)


def sentences(edges: Sequence[Edge]) -> list[str]:
    """What a user should know of parameters at their edges, parameter by parameter.

    Example:
        >>> sentences([Edge("tau", (), 0.0)])[0]
        'tau is at its boundary: the maximum is where tau = 0.'
    """
    found = []
    for name, group in itertools.groupby(edges, lambda edge: edge.name):
        own = list(group)
        rest = f" and {len(own) - MOST_NAMED} numbers more" if len(own) > MOST_NAMED else ""
        where = ", ".join(map(str, own[:MOST_NAMED])) + rest
        found.append(f"{name} is at its boundary: the maximum is where {where}.")
    if found:
        found.append(
            "Standard errors, tests and the usual penalties of AIC and BIC do not hold there; errors of "
            "other parameters are as if it were held. Leave the term out, or give it a prior (map_sites) "
            "that keeps it inside."
        )
    return found


def positions(theta: Block, edges: Iterable[Edge]) -> Flags:
    """Which numbers of theta, flat, are at an edge."""
    flags = {p.name: torch.zeros(p.unconstrained.shape, dtype=torch.bool) for p in theta.parameters}
    for edge in edges:
        flags[edge.name][edge.index] = True
    found: Flags = (
        torch.cat([torch.zeros(0, dtype=torch.bool), *(f.reshape(-1) for f in flags.values())]).cpu().numpy()
    )
    return found


def ends(parameter: Parameter, down: Flags, up: Flags) -> tuple[Flags, Flags]:
    """Which of some unconstrained numbers, flat, have values with an end as they fall, and as they rise.

    Args:
        parameter: of one name.
        down: numbers to look at for an end as they fall.
        up: the same as they rise.

    Example:
        >>> from torch.distributions import constraints
        >>> one, tau = np.array([True]), Parameter("tau", constraints.positive, torch.tensor(1.0))
        >>> [bool(end) for end in ends(tau, one, one)]
        [True, False]
    """
    if is_simplex(parameter):  # at one are those whose others are at zero
        up = np.zeros_like(up)
    return _having_end(parameter, -1.0, down), _having_end(parameter, 1.0, up)


def _having_end(parameter: Parameter, sign: float, wanted: Flags) -> Flags:
    """The numbers that take the value to an end, each moved alone."""
    if parameter.is_real or not wanted.any():
        return np.zeros_like(wanted)
    shape, here, transform = parameter.unconstrained.shape, parameter.init, transform_to(parameter.constraint)
    chosen = torch.as_tensor(wanted.reshape(shape))
    flags, dims = torch.zeros(shape, dtype=torch.bool), transform.domain.event_dim
    rows = chosen.reshape(-1, *shape[len(shape) - dims :]).any(0)  # which are independent: all at once
    for index in map(tuple, rows.nonzero().tolist()):
        direction = torch.zeros(shape)
        direction[(..., *index)] = sign
        near, far = (parameter.moved(distance * direction) for distance in FAR)
        is_same = (far - near).abs() <= SAME * (here.abs() + far.abs())
        is_moved = (far - here).abs() > SAME * here.abs()
        if dims:
            axes = tuple(range(-transform.codomain.event_dim, 0))
            is_same, is_moved = is_same.all(axes), is_moved.any(axes)
        flags[(..., *index)] = is_same & is_moved
    found: Flags = (flags & chosen).reshape(-1).cpu().numpy()
    return found


def is_simplex(parameter: Parameter) -> bool:
    """True if its rows are softmaxes, each of one number more than can move."""
    return isinstance(first_part(parameter.constraint), SoftmaxTransform)
