"""What one round of a fit does."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .run import Run

Schedule = Literal["auto", "alternate", "accelerated", "profile", "joint"]
PROFILE_FROM = 3  # rounds: two of EM before
MOST_PROFILED = 60  # parameters
SLOW_AFTER = 10  # rounds of EM before a joint step may follow


def schedule_of(run: "Run", iteration: int, schedule: Schedule) -> Schedule:
    """What one round does; "auto" decides by whether steps have closed forms.

    Two rounds of EM leave the start. Then quasi-Newton steps in theta, where the E-step is exact
    and theta is small; extrapolation of the rounds where all steps are closed; elsewhere EM, with
    joint steps once it has become slow.
    """
    num_theta, closed = run.setup.theta.size, run.closed
    if schedule == "profile":
        return "profile" if iteration >= PROFILE_FROM and num_theta else "alternate"
    if schedule != "auto":
        return schedule
    if run.hooks:  # joint and profile steps would pass them by
        return "accelerated" if closed is not None and closed.is_complete else "alternate"
    if closed is None or not closed.is_complete:
        return "joint" if is_slow(run) else "alternate"
    if closed.is_exact and 0 < num_theta <= MOST_PROFILED:
        return "profile" if iteration >= PROFILE_FROM else "alternate"
    return "accelerated"


def is_slow(run: "Run") -> bool:
    """True if EM has become linear: ten rounds, and the last gained over half of the one before."""
    if run.iterations < SLOW_AFTER or not (run.setup.phi.size and run.setup.theta.size):
        return False
    gains = [0.0, 0.0, 0.0]
    for row in run.history:
        if row.block != "check" and 0 <= run.iterations - row.iteration < 3:
            gains[run.iterations - row.iteration] += row.gain
    return gains[1] > 0.5 * gains[2] and gains[1] > 10 * run.tolerance()
