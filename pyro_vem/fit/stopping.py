"""When to stop: the predicted remaining gain of the joint problem, and signs of divergence."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import constraints

from ..bound.lifted.covariance import MATRIX, TRIL
from ..bound.lifted.families import INVERSE_GAMMA, SD
from ..bound.lifted.variables import Coding
from ..guides.factorised import FactorisedNormal
from ..model.parameters import Parameter
from ..model.support import element_of
from .setup import Setup
from .smooth import Smooth, Vector, predicted_gain
from .state import State
from .status import Step

GRADIENT_LIMIT = 1e-3  # of the scaled gradient per square root of dimension: posterior sds
RUNAWAY = 25.0  # |log sd| beyond which a factor has collapsed or exploded
DRIFT = 1e8  # movement of a real parameter, relative to its start, that no data set needs
CANCELLED = 15.0  # log ratio at which x^-2 leaves the statistics beside it two or three digits
LOST = "no step raised the bound"  # of a profile step
STALLED, STALLED_GAIN = 3, 1e-4  # steps, and nats that none of them gains
STILL = 6  # steps that gain nothing at all
FAR = 50.0  # movement of a constrained one on its unconstrained (mostly log) scale, likewise


@dataclass(frozen=True)
class Remaining:
    """What is left to gain at a point.

    Attributes:
        gain: predicted gain of the joint problem in nats; +inf where it cannot be certified.
        gradient: scaled gradient norm of both blocks at the same point, per sqrt(dimension).
    """

    gain: float
    gradient: float

    def is_small(self, tol: float) -> bool:
        """The stopping rule."""
        return self.gain < tol and self.gradient < GRADIENT_LIMIT

    @property
    def is_no_maximum(self) -> bool:
        """True where the gradient vanishes, and the bound curves upwards."""
        return self.gain == float("inf") and self.gradient < GRADIENT_LIMIT


def remaining(smooth: Smooth, tol: float) -> Remaining:
    """Predict what a joint Newton step would gain from where `smooth` has its origin."""
    gradient = scaled_gradient(smooth)
    if gradient >= GRADIENT_LIMIT:
        return Remaining(float("inf"), gradient)
    return Remaining(predicted_gain(smooth, tol=tol), gradient)


def scaled_gradient(smooth: Smooth) -> float:
    """Its norm where `smooth` has its origin, per square root of dimension: posterior sds."""
    return float(np.linalg.norm(smooth.gradient(smooth.zero))) / max(1, smooth.zero.size) ** 0.5


def stalled(history: Sequence[Step], budget: int) -> bool:
    """True if the last steps took more evaluations than `budget` for next to nothing.

    Or two profile steps in a row found nothing: the second began afresh, as any other would.
    """
    rows = _last(history, STALLED)
    is_lost = len(rows) > 1 and all(row.note == LOST for row in rows[-2:])
    is_spent = all(row.evaluations > budget and row.gain < STALLED_GAIN for row in rows)
    return is_lost or (len(rows) == STALLED and is_spent)


def standing_still(history: Sequence[Step]) -> bool:
    """True if the last steps gained nothing at all."""
    rows = _last(history, STILL)
    return len(rows) == STILL and all(row.gain == 0 for row in rows)


def _last(history: Sequence[Step], number: int) -> list[Step]:
    """The last steps of a history since the last check, before which the bound or the point was another."""
    since = itertools.takewhile(lambda row: row.block != "check", reversed(history))
    return [row for row in since if row.block != "start"][:number][::-1]


def runaway(setup: Setup, state: State, start: State) -> str | None:
    """The site or parameter that has run away, or None."""
    moved = np.abs(state.phi - start.phi) > 1  # a small unit, or a variance at its edge, are where it began
    name = exploded(setup.guide, lambda scale: np.where(moved, state.phi, 0.0)[setup.phi.where([scale])])
    if name is not None:
        return name
    drift = np.abs(state.theta - start.theta)
    tabulated = setup.lifted.lifted.found.codings if setup.lifted is not None else {}
    for parameter in setup.theta.parameters:
        coding, where = tabulated.get(parameter.name), setup.theta.where([parameter.name])
        support = coding.variable.support if coding is not None else None
        if element_of(parameter.constraint) is constraints.simplex or support == "unit":
            continue  # a probability, at whose edge the bound has its maximum: a value that never occurs
        limit = _limit(parameter, start.theta[where])
        is_gone = (drift[where] > limit).any()
        if coding is not None and support == "positive":
            is_gone |= _is_cancelled(coding, state.theta[where], start.theta[where])
        if is_gone:
            return parameter.name
    return _collapsed(setup, state)


def _collapsed(setup: Setup, state: State) -> str | None:
    """The parameter of vectors whose covariance has become singular, or None."""
    moments = setup.lifted.lifted.matching.found.values() if setup.lifted is not None else ()
    if not moments:
        return None
    values = setup.theta_values(torch.as_tensor(state.theta))
    return next((own.factors[0] for own in moments if own.has_collapsed(values)), None)


def _limit(parameter: Parameter, start: Vector) -> Vector:
    """How far a parameter may go from its start on its unconstrained scale."""
    real = DRIFT * (1 + np.abs(start))
    if parameter.is_real:
        return real
    if element_of(parameter.constraint) in (*TRIL, *MATRIX):  # beside the diagonal such a factor is real
        shape = parameter.unconstrained.shape
        is_diagonal = np.broadcast_to(np.eye(shape[-1], dtype=bool), shape).reshape(-1)
        return np.where(is_diagonal, FAR * (1 + np.abs(start)), real)
    return np.full_like(start, FAR)


def exploded(guide: object, log_scale: Callable[[str], Vector]) -> str | None:
    """The site of a factor that has collapsed or exploded, or None; `log_scale` gives its log sds by name."""
    if isinstance(guide, FactorisedNormal):
        for site in guide.latents():
            if not (np.abs(log_scale(guide.scale_name(site.name))) < RUNAWAY).all():
                return site.name
    return None


def _is_cancelled(coding: Coding, log: Vector, start: Vector) -> bool:
    """Whether a positive parameter has gone to where statistics beside its own cancel: sds near zero."""
    sign = -1 if coding.family in (SD, INVERSE_GAMMA) else 1
    unit = np.log(coding.variable.unit.reshape(-1).numpy())
    return bool((np.minimum(sign * (log - unit), sign * (log - start)) > CANCELLED).any())
