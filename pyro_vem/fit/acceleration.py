"""Extrapolation of rounds of closed forms: from where they have led to where they seem to end."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from .scales import Scales
from .setup import Setup
from .smooth import Vector
from .state import State

EXTRAPOLATE_FROM = 3  # rounds: the first ones leave the start, and say nothing of the end


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
    last: tuple[Vector, Vector] | None = None  # residual and image of the last round
    steps: list[tuple[Vector, Vector]] = field(default_factory=list)  # how both moved, round by round

    def proposal(self, point: Vector, image: Vector, scale: Vector | float = 1.0) -> Vector:
        """Where the map's fixed point seems to be, after one more application of it.

        Args:
            point: where a round began.
            image: where it led.
            scale: lengths of the coordinates, in which residuals are weighed.
        """
        residual = image - point
        if self.last is not None:
            self.steps = [*self.steps, (residual - self.last[0], image - self.last[1])][-self.depth :]
        self.last = residual, image
        if not self.is_ready:
            return image
        moves, images = (np.stack(part) for part in zip(*self.steps, strict=True))
        moves /= scale
        # Normal equations: of a few unknowns for many coordinates, and the next round mends what they lose.
        weights, *_ = np.linalg.lstsq(moves @ moves.T, moves @ (residual / scale), rcond=1e-14)
        return np.asarray(image - weights @ images)

    @property
    def is_ready(self) -> bool:
        """True if a proposal is more than the image of the last round."""
        return bool(self.steps)

    def restart(self) -> None:
        """Forget the rounds so far."""
        self.last, self.steps = None, []


@dataclass
class Extrapolation:
    """The rounds of one fit, extrapolated in one block; the other block follows by its own step.

    Attributes:
        setup: the problem.
        scales: lengths of the factors, in which phi is extrapolated.
        by_theta: whether the block is theta, else phi.
        still: parameters of the model that keep their values.
        rule: the rounds so far.
        before: the block as the present round began.
    """

    setup: Setup
    scales: Scales
    by_theta: bool
    still: Collection[str] = ()
    rule: Anderson = field(default_factory=Anderson)
    before: Vector | None = None

    def proposed(self, state: State, iteration: int) -> State | None:
        """Where the rounds seem to lead, as a state without its bound; None while there are too few."""
        image = state.theta if self.by_theta else state.phi
        point, self.before = self.before, image
        if point is None or iteration < EXTRAPOLATE_FROM:
            return None
        spread = self.setup.processes.spread("M" if self.by_theta else "E")
        scale = np.ones_like(image) if self.by_theta else self.scales.of_factors(state)
        found = spread.own(self.rule.proposal(spread.whole(point), spread.whole(image), spread.whole(scale)))
        if not self.rule.is_ready:
            return None
        if self.by_theta and self.still:
            found = np.where(self.setup.theta.where(self.still), image, found)
        phi, theta = (state.phi, found) if self.by_theta else (found, state.theta)
        return State(phi, theta, -np.inf)

    def taken(self, state: State) -> None:
        """The next round begins here, where a proposal has led."""
        self.before = state.theta if self.by_theta else state.phi
