"""Minimisation of a smooth loss by SciPy, in scaled coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import optimize
from scipy.sparse.linalg import cg

from .smooth import Flags, Loss, Smooth, Vector

ROUNDING = 1e-13  # of a value, relative
MOST_REFINED, MOST_PRODUCTS = 3, 30  # steps beyond it, and products for each

Method: TypeAlias = Literal["newton", "lbfgs"]


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        x: the best point met, on the original scale.
        value: the function there.
        gradient: Euclidean norm of the gradient in scaled coordinates there.
        is_solved: whether it is small enough with grown sds as lengths; in the first ones it may not be.
        iterations: of the optimiser.
        smooth: the function, where it ended; None where it is of other coordinates.
    """

    x: Vector
    value: float
    gradient: float
    is_solved: bool
    iterations: int
    evaluations: int
    products: int
    smooth: Smooth | None


def minimise(
    loss: Loss,
    start: Vector,
    scale: Vector,
    *,
    gtol: float,
    max_iter: int,
    method: Method,
    log_sds: Flags | None = None,
    curvature: Loss | None = None,
    begun: Smooth | None = None,
) -> Minimum:
    """Minimise from `start`; never ends at a higher value, and believes only the gradient.

    Args:
        loss: the function.
        start: first point; the function must be finite there.
        scale: one positive length for each coordinate: about the distance over which the
            function changes by a nat.
        gtol: bound on the gradient norm in scaled coordinates.
        max_iter: iterations of the method.
        method: "newton" (trust region on Hessian-vector products) or "lbfgs".
        log_sds: coordinates that are logs of sds, see `Smooth`.
        curvature: a cheaper function whose Hessian stands in for that of the loss.
        begun: the loss, evaluated at `start` already.

    References:
        Gould, Lucidi, Roma and Toint (1999), Solving the trust-region subproblem using the
        Lanczos method, SIAM J. Optim. 9(2).

    Example:
        >>> result = minimise(
        ...     Loss(lambda x: ((x - 3.0) ** 4).sum() + (x**2).sum()), np.zeros(1), np.ones(1),
        ...     gtol=1e-8, max_iter=50, method="newton")
        >>> round(float(result.x[0]), 4)
        2.0
    """
    if begun is not None and begun.is_bent is (curvature is None):
        smooth = begun.in_units_of(scale, log_sds)
    else:
        if begun is not None:
            begun.forget()
        smooth = Smooth(loss, start.copy(), scale, log_sds, is_bent=curvature is None)
    if curvature is not None:
        smooth.curvature = Smooth(curvature, start.copy(), scale, log_sds)
    zero = smooth.zero
    best: list[Any] = [zero, smooth.value(zero)]

    def tracked(a: Vector) -> float:
        value = smooth.value(a)
        if value < best[1]:
            if not np.isfinite(smooth.gradient(a)).all():  # a spike: no step can start from there
                return np.inf
            best[:] = [a.copy(), value]
        return value

    iterations = 0
    if zero.size and float(np.linalg.norm(smooth.gradient(zero))) > gtol:
        with np.errstate(over="ignore", invalid="ignore"):  # trial points may lie anywhere
            iterations = _search(smooth, tracked, best, gtol, max_iter, method)
            if method == "newton":
                _refine(smooth, best, gtol)
    is_solved = float(np.linalg.norm(smooth.gradient(best[0]))) <= gtol
    gradient = float(np.linalg.norm(smooth.plain_gradient(best[0])))
    point = smooth.point(best[0])
    evaluations = smooth.evaluations + (smooth.curvature.evaluations if smooth.curvature is not None else 0)
    return Minimum(point, best[1], gradient, is_solved, iterations, evaluations, smooth.products, smooth)


def _search(
    smooth: Smooth,
    tracked: Callable[[Vector], float],
    best: list[Any],
    gtol: float,
    max_iter: int,
    method: Method,
) -> int:
    """Run the optimiser; `tracked` keeps the best point that it meets. Returns its iterations."""
    if method == "newton":
        zero = np.zeros_like(best[0])
        radius = zero.size**0.5  # a unit for each coordinate
        options = {"gtol": gtol, "maxiter": max_iter}
        options |= {"initial_trust_radius": radius, "max_trust_radius": 1e3 * radius}
        result = optimize.minimize(
            tracked, zero, jac=smooth.gradient, hessp=smooth.hessian_product,
            method="trust-krylov", options=options,
        )  # fmt: skip
        if best[0].any() or float(np.linalg.norm(smooth.gradient(best[0]))) <= gtol:
            return int(result.nit)
    # Asked for; or trust-krylov stood still, as it does where there is no curvature at all.
    _lbfgs(smooth, tracked, best, gtol, max_iter)
    return max_iter


def _refine(smooth: Smooth, best: list[Any], gtol: float) -> None:
    """Newton steps that the gradient vouches for, where the function is down to its own rounding.

    A trust region judges steps by what they gain. At 1e-8 of a unit from the optimum that is less than a
    value of a hundred nats can show, while the gradient still can.
    """
    for _ in range(MOST_REFINED):
        at, value = best
        gradient, rounding = smooth.gradient(at), ROUNDING * (1 + abs(value))
        norm = float(np.linalg.norm(gradient))
        if norm <= gtol or not norm**2 <= rounding:
            return
        with np.errstate(all="ignore"):  # of a Hessian that is singular
            step, _ = cg(smooth.hessian_operator(at), -gradient, rtol=1e-3, maxiter=MOST_PRODUCTS)
        if not float(np.linalg.norm(step)) <= 1:
            return
        trial = smooth.value(at + step)
        if not trial <= value + rounding or float(np.linalg.norm(smooth.gradient(at + step))) > 0.5 * norm:
            return
        best[:] = [at + step, trial]


def _lbfgs(
    smooth: Smooth, tracked: Callable[[Vector], float], best: list[Any], gtol: float, budget: int
) -> None:
    """L-BFGS, started again from its best point until the gradient itself is small.

    After a non-finite trial point the line search gives up and reports success, so its own
    message is not used.
    """

    def both(a: Vector) -> tuple[float, Vector]:
        value = tracked(a)
        if np.isfinite(value):
            return value, smooth.gradient(a)
        return best[1] + 1e10, np.zeros_like(a)

    while budget > 0:
        before = best[1]
        options = {"maxcor": 20, "maxiter": budget, "ftol": 1e-15, "gtol": gtol / max(1, len(best[0])) ** 0.5}
        result = optimize.minimize(both, best[0], jac=True, method="L-BFGS-B", options=options)
        budget -= max(1, result.nit)
        if np.linalg.norm(smooth.gradient(best[0])) <= gtol or before - best[1] <= 1e-12 * (1 + abs(before)):
            return
