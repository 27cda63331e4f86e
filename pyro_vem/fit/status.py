"""What a fit says of itself: a row of history a step, a progress bar, and how it ended."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(Enum):
    """How a fit ended, with a sentence on what happened and what to do.

    Example:
        >>> Status.converged.value
        'Converged: both gradients are small and the predicted remaining gain is below tol.'
    """

    converged = "Converged: both gradients are small and the predicted remaining gain is below tol."
    max_iterations = (
        "Stopped at the iteration limit before convergence: raise max_iter, or warm-start a second "
        "fit with init=fit; look at the history for a step that still gains."
    )
    nonfinite = "The bound is not finite at the start: give initial values with init=, or rescale the data."
    diverged = (
        "A posterior standard deviation or a parameter ran away: the posterior or the likelihood has "
        "no maximum there; give the named site a proper prior or hold the parameter with fixed=."
    )
    stalled = (
        "Stalled: steps gain next to nothing before the gradient vanishes, so the bound has an edge or a "
        "kink there (a support or a branch that moves with a latent, a clamp, an sd on its way to zero); it "
        "is no optimum to believe. Rewrite that term, or use fit.compare_nuts()."
    )
    interrupted = "Interrupted: the result is the last complete step."


@dataclass(frozen=True)
class Step:
    """One row of a fit's history.

    Attributes:
        iteration: counts E/M rounds from 1.
        block: "E", "M", "joint", "profile", "start" (the two closed-form variance steps before the
            first E), "epoch" (of batches of rows; bounds are averages over them) or "check" (the bound
            itself changed, as the note says: it may fall there).
        before, after: the bound on the fixed draws, in nats.
        gradient: norm of the scaled gradient of the block after the step.
        evaluations, products: bound evaluations and Hessian-vector products spent.
        seconds: wall time.
        note: what was unusual, empty otherwise.
        draws: fixed draws that the bound is on after the step; 0 where no term is on draws.
    """

    iteration: int
    block: str
    before: float
    after: float
    gradient: float
    evaluations: int
    products: int
    seconds: float
    note: str = ""
    draws: int = 0

    @property
    def gain(self) -> float:
        """Rise of the bound, in nats."""
        return self.after - self.before


def progress_bar(progress: bool | None) -> Any:
    """On standard error; None shows it in a terminal only."""
    if progress is False:  # a bar that is not shown starts a thread all the same
        return None
    from tqdm import tqdm

    return tqdm(desc="fit_vem", unit=" steps", disable=None if progress is None else False)
