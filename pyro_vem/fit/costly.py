"""Where fixed draws work on many numbers: fewer of them for what need not be exact."""

from dataclasses import replace

from ..bound.deterministic import Deterministic
from ..bound.draws import widest
from .setup import Setup

FEW_DRAWS = (32, 64, 128, 256)  # that may do
PER_LATENT = 4  # draws for each latent of a clique: with few more than two, factors fit the draws
COSTLY = 300_000  # numbers, data and latents, that all draws together work on
AT_NODES = 30_000  # values of densities that one evaluation at nodes takes


def is_costly(setup: Setup) -> bool:
    """True if all draws work on so many numbers that fewer should do wherever they can."""
    objective = setup.objective
    is_drawn = objective.is_random and not objective.is_exact and setup.processes.count == 1
    return is_drawn and objective.draws_for(COSTLY) < objective.full_draws


def is_costly_at_nodes(setup: Setup) -> bool:
    """True if terms at quadrature nodes work on many numbers, or would if they were not drawn for that."""
    exact = setup.objective.exact
    return isinstance(exact, Deterministic) and setup.processes.count == 1 and exact.work > AT_NODES


def on_fewer(setup: Setup) -> Setup | None:
    """The same bound on as few draws as tell its curvature, where more are costly; None if there are none."""
    objective = setup.objective
    if not is_costly(setup):
        return None
    few = next((n for n in FEW_DRAWS if n >= PER_LATENT * widest(objective.specs, n)), objective.num_draws)
    if few >= objective.num_draws:
        return None
    twin = objective.twin()
    twin.take_draws(few)
    return replace(setup, objective=twin)
