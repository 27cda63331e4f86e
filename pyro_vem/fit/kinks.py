"""Fits whose terms have kinks at the draws: a gradient that jumps where it would vanish."""

from typing import TYPE_CHECKING

from .exactness import MOST_DRAWS
from .steps import expect_kinks
from .stopping import GRADIENT_LIMIT, scaled_gradient

if TYPE_CHECKING:
    from .run import Run


class Kinks:
    """The stopping rule of a run for terms on draws that have kinks.

    An average of `relu` over draws is a sum of many small kinks: autograd's Hessian has none of them, and no
    step finds a zero of the gradient.

    Args:
        run: at its start.

    Attributes:
        are_too_large: whether the gradient jumps by more than an optimum may have, on as many draws as
            there may be.
    """

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.are_too_large = False

    def hold_up(self, gain: float) -> bool:
        """True if the last step ended short of a zero gradient, with nothing left to gain.

        Args:
            gain: of the last round, in nats.
        """
        run, objective = self.run, self.run.setup.objective
        if not run.history or not objective.is_random or objective.is_exact:
            return False
        row = run.history[-1]
        return row.block in ("E", "joint") and row.gradient > run.gtol and gain < run.tolerance()

    def are_passed(self) -> bool:
        """The stopping rule without curvatures, which kinks have none of; more draws where it fails."""
        run, objective = self.run, self.run.setup.objective
        were_known, most = objective.has_kinks, 4 * objective.num_draws
        expect_kinks(run.setup)
        gradient = scaled_gradient(run.smooth())
        if gradient < GRADIENT_LIMIT:
            objective.add_note(f"the gradient jumps by {gradient:.1g} posterior sd where it vanishes: kinks")
            return True
        if were_known and most <= MOST_DRAWS:
            objective.take_draws(most)
            run.changed(f"{most:,} draws: the gradient jumps by {gradient:.2g} posterior sd at kinks")
        self.are_too_large = were_known and most > MOST_DRAWS
        return False
