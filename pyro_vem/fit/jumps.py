"""A last look at terms that run the model: does the gradient that was followed tell how they change?"""

import torch
from torch import Tensor

from ..bound.draws import independent_noise
from ..guides.factorised import FactorisedNormal
from .exactness import values_of
from .measure import MOST_NUMBERS
from .setup import Setup
from .state import State

PAIRS, SEED = 256, 15_485_867  # of draws; of their noise
LIMIT = 6.0  # standard errors, in each coordinate
LEAST = 0.3  # nats a posterior sd: about the sds that an optimum would move by
MOST_SHARE = 0.25  # of one draw in the variance: beyond it the standard error says little
MOST_TERMS = 64


def jumping(setup: Setup, state: State) -> str | None:
    """Name of a term that changes with a latent where its gradient does not show it, or None.

    Of a continuous function of Gaussian noise e, E[e f(e)] and E[f'(e)] are equal, and so are
    E[(e^2 - 1) f(e)] and E[e f'(e)] (Stein's identity). Through a jump, or where values leave torch, f' is
    zero and what stands beside it is not: no step of the fit has seen what a mean does, or an sd.
    """
    objective = setup.objective
    rows = objective.rest.rows
    if not isinstance(setup.guide, FactorisedNormal):  # draws of a Gamma have no derivatives in their noise
        return None
    if not rows or len(rows) > MOST_TERMS or objective.draws_for(MOST_NUMBERS) < 2 * PAIRS:
        return None
    names = _jumping(setup, state, SEED)
    if names:  # standard errors of so skewed numbers may be too small by chance, not twice
        names &= _jumping(setup, state, SEED + 1)
    return min(names, default=None)


def _jumping(setup: Setup, state: State, seed: int) -> set[str]:
    """Names of terms whose identities fail at some draws."""
    objective, found = setup.objective, set()
    generator = torch.Generator().manual_seed(seed)
    noise = independent_noise(objective.specs, PAIRS, generator)
    both = {name: torch.cat([value, -value]) for name, value in noise.items()}
    for name, values, slopes in objective.slopes(*values_of(setup, state.phi, state.theta), both):
        odd, even = (values[:PAIRS] - values[PAIRS:]) / 2, (values[:PAIRS] + values[PAIRS:]) / 2
        for site, one in noise.items():
            shape = (-1, *(1,) * (one.dim() - 1))
            there, back = slopes[site][:PAIRS], slopes[site][PAIRS:]
            by_mean = odd.reshape(shape) * one - (there + back) / 2
            by_sd = (even - even.mean()).reshape(shape) * (one * one - 1) - one * (there - back) / 2
            if _differ(by_mean) or _differ(by_sd):
                found.add(name)
    return found


def _differ(gap: Tensor) -> bool:
    """True if draws of something, (draws, ...), have a mean that is not zero in some coordinate."""
    mean, square = gap.mean(0).abs(), gap.square()
    error = gap.std(0) / len(gap) ** 0.5
    is_even = square.amax(0) < MOST_SHARE * square.sum(0)
    return bool(((mean > LIMIT * error) & (mean > LEAST) & is_even).any())
