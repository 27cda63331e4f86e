"""The E-step, the M-step, and what both share: one block of parameters moved uphill."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, NonMonotoneError
from ..guides.factorised import FactorisedNormal
from ..model.parameters import is_identity
from .costly import on_fewer
from .minimise import Method, minimise
from .scales import Scales, free_sites
from .setup import Setup
from .smooth import DIFFERENCE, Smooth, Vector
from .state import State, eager_loss, elbo_at, joint_loss, loss_of, moved
from .status import Step
from .turns import Turns

RESCALE_AFTER = 10  # Newton iterations
STILL = 100.0  # squares of the gradient asked for, which is the tenth of a root: nats that as many must gain
FAR = 1e3  # posterior sds from where means are moved alone first
FAR_ITERATIONS = 10
NO_LESS = 1e-8  # precision of a start, in its variance: differences say nothing of less
HOOK_DRAWS, HOOK_SEED = 512, 271_828  # what a caller's M-step sees of the latents


def step(
    setup: Setup,
    state: State,
    block: str,
    scales: Scales,
    *,
    iteration: int,
    gtol: float,
    method: Method,
    max_iter: int,
    begun: Smooth | None = None,
) -> tuple[State, Step, Smooth | None]:
    """Raise the bound in one block ("E", "M" or "joint"); the other block cannot move.

    Returns the new state, a row of history, and the bound as a function of all that moves, evaluated there,
    where this block is all.

    Args:
        setup: the problem.
        state: where the fit is.
        block: the block that moves.
        scales: lengths of the coordinates.
        iteration: for the history.
        gtol: bound on the scaled gradient norm.
        method: optimiser.
        max_iter: its iterations.
        begun: the bound as a function of all that moves, evaluated here already.

    A Gaussian factor's own sd is its length, so after some Newton iterations the lengths are taken
    anew: from far starts the first ones are wrong by orders of magnitude.

    Raises:
        NonMonotoneError: if the bound fell.
    """
    start, smooth = time.perf_counter(), None
    has_lengths = block != "M" and bool(free_sites(setup.guide))
    most = min(max_iter, RESCALE_AFTER) if has_lengths and method == "newton" else max_iter
    turns = Turns.of(setup, block) if has_lengths and method == "newton" else None
    is_drawn = setup.objective.is_random and not setup.objective.is_exact
    new, evaluations, products = state, 0, 0
    for left in range(max_iter, 0, -most):
        begin, before = time.perf_counter(), new.elbo
        scale = scales.of(new, block, iteration)
        loss, x = loss_of(setup, new, block)
        can_turn = turns is not None and loss.both is None and bool(scale.all())  # a length of zero holds
        can_turn &= iteration <= 1 or left < max_iter  # later rounds are short: few steps need no turns
        is_other = x.size != state.joint.size or loss.both is not None or loss.has_kinks or can_turn
        if begun is not None and is_other:
            begun.forget()
            begun = None
        fewer = on_fewer(setup) if method == "newton" and not can_turn and loss.both is None else None
        result = (turns.minimise if turns is not None and can_turn else minimise)(
            loss, x, scale, gtol=gtol, max_iter=min(most, left), method=method,
            log_sds=scales.log_sds(x.size) if has_lengths else None,
            curvature=None if fewer is None else eager_loss(fewer, new, block)[0],
            begun=begun,
        )  # fmt: skip
        begun = None
        new = moved(setup, new, block, result.x, -result.value)
        setup.captures.spent += time.perf_counter() - begin
        evaluations, products = evaluations + result.evaluations, products + result.products
        is_stuck = result.iterations < most and not (result.is_solved and result.iterations)
        is_stuck |= is_drawn and new.elbo - before < STILL * gtol**2  # kinks: as low as they let it
        smooth = result.smooth if x.size == state.joint.size and loss.both is None else None
        if result.gradient <= gtol or is_stuck:
            break
    _check_rise(state.elbo, new.elbo, block, iteration)
    row = Step(
        iteration, block, state.elbo, new.elbo, result.gradient,
        evaluations, products, time.perf_counter() - start,
    )  # fmt: skip
    return new, row, smooth


def hooked(
    setup: Setup, state: State, name: str, hook: Callable[..., Tensor], iteration: int
) -> tuple[State, Step]:
    """A parameter at the value that the caller's function gives it, unless the bound falls there.

    Raises:
        ModelError: if the parameter is unknown, or the value has the wrong shape or is not finite.
    """
    begin = time.perf_counter()
    if name not in setup.theta.names:
        raise ModelError(f"m_step: unknown name {name!r}; the parameters are {', '.join(setup.theta.names)}")
    with torch.no_grad():
        phi = setup.phi.constrained(torch.as_tensor(state.phi))
        theta = setup.theta_values(torch.tensor(state.theta))  # a copy, which the function may write into
        drawn = setup.objective.sample(phi, theta, HOOK_DRAWS, HOOK_SEED, ("values",))["values"]
        value = torch.as_tensor(hook(drawn, dict(theta)), dtype=torch.float64)
        if value.shape != theta[name].shape or not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"m_step[{name!r}] returned {value.tolist()}: return a finite value of shape "
                f"{tuple(theta[name].shape)}"
            )
        moved_to = setup.theta.flat({**theta, name: value}).numpy()
    elbo = elbo_at(setup, state.phi, moved_to)
    note, new = "", State(state.phi, moved_to, elbo)
    if not elbo >= state.elbo:
        note, new = (
            f"m_step[{name!r}] rolled back: the bound would have fallen by {state.elbo - elbo:.3g}",
            state,
        )
    seconds = time.perf_counter() - begin
    return new, Step(iteration, "M", state.elbo, new.elbo, 0.0, 1, 0, seconds, note)


def check_second_derivatives(setup: Setup, state: State, scale: Vector) -> None:
    """Compare one Hessian product with differences of the gradient; the plan says if they differ.

    Operations with a first derivative only mostly do not raise: autograd takes the second for zero.

    Raises:
        ModelError: where the gradient itself is not finite, or torch has none.
    """
    if not state.joint.size:
        return
    smooth = Smooth(joint_loss(setup), state.joint, scale)
    zero, probe = smooth.zero, np.cos(np.arange(smooth.zero.size))
    expected = _differenced(smooth, probe)
    if not np.isfinite(expected).all() and not np.isfinite(smooth.gradient(zero)).all():
        raise ModelError(_without_slope(setup, state))
    try:
        error = float(np.linalg.norm(smooth.hessian_product(zero, probe) - expected))
    except (RuntimeError, NotImplementedError):
        error = np.inf
    size, objective = float(np.linalg.norm(expected)), setup.objective
    if error <= 1e-3 * size + 1e-6:
        return
    farther = smooth.difference_product(zero, probe, 10 * DIFFERENCE)
    is_smooth = float(np.linalg.norm(farther - expected)) <= 0.1 * size
    if is_smooth or not objective.is_random or objective.is_exact:
        objective.is_twice = False
        objective.add_note("Hessian products are differences of the gradient: second derivatives are wrong")
    else:
        expect_kinks(setup)


def expect_kinks(setup: Setup) -> None:
    """Take curvatures across many kinks of the draws from here on, where autograd's are those between two."""
    if not setup.objective.has_kinks:
        setup.objective.has_kinks = True
        setup.objective.add_note("kinks of terms on draws: Hessian products are slopes across many of them")


def _differenced(smooth: Smooth, probe: Vector) -> Vector:
    try:
        return smooth.difference_product(smooth.zero, probe)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ModelError(
            "the model writes into a tensor that its gradient needs, as `h[t] = a * h[t - 1]` does: collect "
            "the parts in a list, and put them together by torch.stack"
        ) from error


def _without_slope(setup: Setup, state: State) -> str:
    """Which sites have a term whose gradient is not finite, and what mends it."""
    phi, theta = (torch.as_tensor(x).clone().requires_grad_() for x in (state.phi, state.theta))
    with torch.enable_grad():
        terms = setup.objective.terms(setup.phi.constrained(phi), setup.theta_values(theta))
        slopes = {
            name: torch.autograd.grad(
                term, [phi, theta], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, term in terms.items()
            if term.requires_grad
        }
    names = [repr(n) for n, found in slopes.items() if not all(bool(x.isfinite().all()) for x in found)]
    return (
        f"site {', '.join(names)}: the gradient of its term is not finite where the fit starts: give other "
        "initial values with init=, or keep the arguments of its distribution off the edge of their range (a "
        "rate of `lam * z + 1e-12` instead of `lam * z`, which is 0 for a z of 0)"
    )


def note_idle(setup: Setup, state: State) -> None:
    """Record in the plan each parameter that does not move the bound where it starts."""
    if not setup.theta.size:
        return
    loss, theta = loss_of(setup, state, "M")
    smooth = Smooth(loss, theta, np.ones_like(theta))
    zero = smooth.zero
    gradient, noise = smooth.gradient(zero), 1e-14 * (1 + abs(state.elbo))
    for name in setup.theta.names:
        where = setup.theta.where([name])
        is_still = (np.abs(gradient[where]) <= noise).all()
        if is_still and not smooth.hessian_product(zero, where.astype(float))[where].sum() > noise:
            setup.objective.add_note(
                f"{name}: the bound does not change with it where it starts; if that is not its optimum, "
                "give it another start with init="
            )


def _check_rise(before: float, after: float, block: str, iteration: int) -> None:
    if not after >= before - 1e-9 * (1 + abs(before)):
        raise NonMonotoneError(
            f"{block}-step of iteration {iteration}: the bound fell from {before:.12g} to {after:.12g} "
            "on the same draws; the model may change between runs"
        )


def start_factors(setup: Setup, state: State) -> tuple[State, Step | None, Smooth | None]:
    """Two fixed-point steps on the variances of free Gaussian factors, after their means if those are far.

    Returns what `step` does.

    At the optimum sigma^2 = sigma^2 / (1 - dELBO/d log sigma); the iteration moves variances
    near their optimum at the price of two gradients, before the first Newton step.
    """
    guide = setup.guide
    free = free_sites(guide)
    if not isinstance(guide, FactorisedNormal) or not free:
        return state, None, None
    start = time.perf_counter()
    where = setup.phi.where(guide.scale_name(site) for site in free)
    loss, phi = loss_of(setup, state, "E")
    smooth = Smooth(loss, phi, np.ones_like(phi))
    near, evaluations, products = _means_from_afar(setup, guide, state, smooth)
    if products:
        smooth = Smooth(loss, near.phi, np.ones_like(phi))
    at, elbo, norm = smooth.zero, near.elbo, 0.0
    for _ in range(2):
        gradient = smooth.gradient(at)
        step = 0.5 * np.log(np.clip(1 + loss.spread.own(gradient), 0.04, 1e4))
        trial = at - loss.spread.whole(np.where(where, step, 0.0))
        if not -smooth.value(trial) > elbo:
            break
        at, elbo, norm = trial, -smooth.value(trial), float(np.linalg.norm(gradient))
    new = replace(state, phi=smooth.point(at), elbo=elbo)
    seconds, evaluations = time.perf_counter() - start, evaluations + smooth.evaluations
    row = Step(0, "start", state.elbo, elbo, norm, evaluations, products, seconds)
    is_here = smooth.is_at(at) and new.phi.size == state.joint.size and loss.both is None
    return new, row, smooth if is_here else None


def _means_from_afar(
    setup: Setup, guide: FactorisedNormal, state: State, smooth: Smooth
) -> tuple[State, int, int]:
    """Means of real latents moved alone where they start a thousand posterior sds away; what it took.

    The bound of Normal terms is quadratic in them, so that one Newton step is right however long it is (an
    intercept of 10,000 under a vague prior). With variances among the coordinates, whose logs it is
    exponential in, steps of that length lead nowhere.
    """
    free = free_sites(guide)
    real = [site.name for site in guide.latents() if site.name in free and is_identity(site.transform)]
    if not real or setup.processes.count > 1:
        return state, 0, 0
    is_loc, is_scale = (setup.phi.where(map(of, real)) for of in (guide.loc_name, guide.scale_name))
    gradient = smooth.gradient(smooth.zero)
    sd = np.exp(state.phi[is_scale]) / np.sqrt(np.maximum(1 + gradient[is_scale], NO_LESS))  # at the optimum
    distance = float(np.linalg.norm(gradient[is_loc] * sd)) / sd.size**0.5
    if not FAR < distance < np.inf:
        return state, 0, 0
    scale = np.zeros_like(state.phi)
    scale[is_loc] = distance * sd
    found = minimise(
        smooth.loss, state.phi, scale, gtol=distance, max_iter=FAR_ITERATIONS, method="newton"
    )  # to a sd
    return replace(state, phi=found.x, elbo=-found.value), found.evaluations, found.products
