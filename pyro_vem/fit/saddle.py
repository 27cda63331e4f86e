"""Points where the gradient vanishes and the bound still rises: saddles, where no step would leave."""

import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import linalg as sparse_linalg

from .setup import Setup
from .smooth import Smooth, Vector
from .state import State, elbo_at, moved
from .status import Step

if TYPE_CHECKING:
    from .run import Run

MOST_SADDLES = 5  # that a fit leaves
SMALL = 30  # parameters up to which the whole Hessian is formed
MOST_ROUNDS = 12  # of the search for a direction of negative curvature
NEGATIVE = -1e-3  # curvature in scaled coordinates, where one is a factor's own
LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of trial steps; coordinates are scaled to posterior sds
ENTERS = 0.1  # share of the largest part of a direction, by which a name enters it


def has_left_saddle(run: "Run", smooth: Smooth) -> bool:
    """True if the point of a run was a saddle of the bound, and it goes on from a higher one.

    Args:
        run: where the gradient vanishes.
        smooth: minus the bound in both blocks, about that point.
    """
    if run.saddles == MOST_SADDLES:
        return False
    start = time.perf_counter()
    found = past_saddle(run.setup, run.state, smooth, run.tolerance())
    if found is None:
        return False
    old, (run.state, names) = run.state, found
    run.saddles, run.failed, run.next_check = run.saddles + 1, 0, run.iterations + 2
    run.is_expected = False
    run.forget_rounds()
    seconds, note = time.perf_counter() - start, f"left a saddle of the bound along {names}"
    run.record(Step(run.iterations, "check", old.elbo, run.state.elbo, 0.0, 0, 0, seconds, note))
    return True


def past_saddle(setup: Setup, state: State, smooth: Smooth, tol: float) -> tuple[State, str] | None:
    """A higher point along a direction of negative curvature, with what lies along it.

    None if the smallest curvature that a few Hessian-vector products find is not negative, or if
    nothing is gained along it (a flat direction, of parameters that are not identified).

    Args:
        setup: the problem.
        state: where the gradient vanishes.
        smooth: minus the bound in both blocks, about that point.
        tol: gain in nats that matters.

    References:
        Knyazev (2001), Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput. 23.
    """
    direction = _most_negative(smooth)
    if direction is None:
        return None
    best = state
    for length in LENGTHS:
        for sign in (1.0, -1.0):
            x = smooth.point(sign * length * direction)
            trial = moved(setup, state, "joint", x, elbo_at(setup, *np.split(x, [setup.phi.size])))
            if trial.elbo > best.elbo:
                best = trial
        if best.elbo > state.elbo + 10 * tol:
            return best, _names(setup, smooth.spread.own(direction))
    return None


def _most_negative(smooth: Smooth) -> Vector | None:
    """A direction of negative curvature, its largest part one; None if none was found."""
    size = smooth.zero.size
    if not size:
        return None
    if size <= SMALL:
        hessian = smooth.hessian()
        if not np.isfinite(hessian).all():
            return None
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    else:
        start = np.random.default_rng(0).standard_normal((size, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own accuracy does not matter here
            values, vectors = sparse_linalg.lobpcg(
                smooth.hessian_operator(smooth.zero), start, largest=False, maxiter=MOST_ROUNDS, tol=0.1
            )
    if not values[0] < NEGATIVE:
        return None
    return np.asarray(vectors[:, 0] / np.abs(vectors[:, 0]).max())


def _names(setup: Setup, direction: Vector) -> str:
    """The parameters that enter a direction."""
    parts: dict[str, float] = {}
    for block, part in zip((setup.phi, setup.theta), np.split(direction, [setup.phi.size]), strict=True):
        parts |= {name: float(np.abs(part[block.where([name])]).max(initial=0)) for name in block.names}
    return ", ".join(name for name, size in parts.items() if size > ENTERS)
