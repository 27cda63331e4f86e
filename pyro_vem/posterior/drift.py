"""How far a loose bound has drawn the parameters away from the maximum of the likelihood."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..bound.objective import AT_ONCE
from ..bound.terms import Part
from ..errors import ModelError
from ..fit.result import VEMResult
from ..model.runtime import isolated
from .arrowhead import Vector
from .checks import wider_guides
from .covariance import inverse_of_params, jacobian_of_params
from .importance import Pool

NUM_DRAWS, PARTS = 2000, 20  # weighted draws, and parts of them whose spread is the Monte Carlo error
MOST_PARAMETERS = 300  # numbers beyond which there is no look: weights of networks have no standard errors
# Nats between bound and evidence below which there is no look: a step of d standard errors gains d^2 / 2
# nats of likelihood, and a gap so small has seldom more than itself to give.
SMALL_GAP = 0.02
NOTED, FAR = 0.2, 1.0  # standard errors above which a drift is noted, and above which it is a reason
LARGE_GAP = 0.5  # nats that are said where standard errors cannot be had


def drift(fit: VEMResult, pool: Pool) -> dict[str, float]:
    """By how many standard errors a Newton step on the log likelihood would move each parameter.

    The gradient of the log likelihood is the posterior mean of d log p(y, z) / d theta (Fisher's
    identity), here over weighted draws; the step and the standard errors have the inverse Hessian
    of the bound. Parameters come with their farthest number; what two Monte Carlo errors explain is zero.

    Returns:
        Standard errors by parameter; empty where they cannot be had.

    References:
        Louis (1982), Finding the observed information matrix when using the EM algorithm, JRSS B
        44(2). Wang and Titterington (2005), Inadequacy of interval estimates corresponding to
        variational Bayesian approximations, AISTATS.
    """
    if not 0 < fit.setup.theta.size <= MOST_PARAMETERS:
        return {}
    try:
        covariance = inverse_of_params(fit)
    except ModelError:
        return {}
    jacobian = jacobian_of_params(fit)
    errors = np.sqrt(np.diag(jacobian @ covariance @ jacobian.T))
    errors[errors == 0] = np.inf  # what a constraint holds, as zeros of a Cholesky factor
    steps = _scores(fit, pool) @ covariance @ jacobian.T / errors
    noise = steps.std(0, ddof=1) / PARTS**0.5
    size = np.abs(steps.mean(0))
    moves = np.where(size > 2 * noise, size, 0.0)
    sizes = [fit.params[name].numel() for name in fit.setup.theta.names]
    pieces = np.split(moves, np.cumsum(sizes)[:-1])
    return {name: float(piece.max()) for name, piece in zip(fit.setup.theta.names, pieces, strict=True)}


def of_the_parameters(
    fit: VEMResult, moves: Mapping[str, float], gap: float
) -> tuple[list[str], list[str], list[str]]:
    """Reasons, actions and notes about estimates at the maximum of a bound that lies below the evidence."""
    below = f"the bound lies {gap:.2f} nats below the evidence, and its maximum is not that of "
    below += "the marginal posterior" if fit.setup.problem.map_sites else "the likelihood"
    far = [f"{name!r} by {move:.2f}" for name, move in moves.items() if move > NOTED]
    if far:
        text = f"{below}: a Newton step on that would move {', '.join(far)} standard errors"
        if max(moves.values()) <= FAR:
            return [], [], [text]
        advice = " or ".join([*wider_guides(fit), "integrate latents out in the model"])
        return [text], [f"for better parameters close the gap: {advice}"], []
    if fit.setup.theta.size and not moves and gap > LARGE_GAP:
        return [], [], [f"{below}: {', '.join(fit.setup.theta.names[:5])} may be off"]
    return [], [], []


def _scores(fit: VEMResult, pool: Pool) -> Vector:
    """Means of d log p(y, z) / d theta over parts of the weighted draws, (parts, unconstrained theta)."""
    setup = fit.setup
    noise = pool.resampled(PARTS * min(NUM_DRAWS // PARTS, setup.objective.draws_for(AT_ONCE)), 0)
    flat = setup.theta.flat(fit.params).requires_grad_()
    found = []
    with isolated(torch.float64):
        for part in range(PARTS):
            some: Mapping[str, Tensor] = {name: value[part::PARTS] for name, value in noise.items()}
            objective = setup.objective.on(setup.problem.call, some)
            objective.plan = objective.plan.demoted("weighted draws")  # log p, and log q without theta
            values = objective.row_parts(fit.guide_params, setup.theta_values(flat), _summed)
            found.append(torch.autograd.grad(values.mean(), flat)[0].numpy())
    return np.stack(found)


def _summed(parts: list[Part]) -> Tensor:
    return torch.stack([part.value.sum() for part in parts]).sum()
