"""Where fits start; and of several starts which is best, and how far the others agree with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..bound.compiled.expect import TOO_FEW
from ..errors import ModelError
from ..guides.factorised import Factorised
from ..model.parameters import Block
from ..model.runtime import isolated
from .exactness import check_kl, compile_terms, prepare, settle_nodes, values_of
from .options import FitOptions
from .result import VEMResult
from .scales import Scales
from .setup import Setup
from .smooth import Vector
from .state import State
from .status import Status

NARROWER = (1e-3, 1e-5, 1e-7)  # sds to start with where the usual ones leave no finite bound


@dataclass(frozen=True)
class Start:
    """Where one start ended.

    Attributes:
        number: of the start; 0 is the one from the given initial values.
        elbo: its bound, in nats.
        status: how it ended.
        n_iter: its rounds.
        distance: root mean square difference from the best start in the log density of an
            observation, in nats: components that only changed places do not count.
    """

    number: int
    elbo: float
    status: Status
    n_iter: int
    distance: float


def best_of(fits: Mapping[int, VEMResult]) -> VEMResult:
    """Of fits by the number of their start the one with the highest bound, with a report on all of them."""
    best = max(fits.values(), key=merit)
    if len(fits) == 1:
        return best
    rows = densities(best)
    starts = tuple(
        Start(i, fit.elbo, fit.status, fit.n_iter, 0.0 if fit is best else _distance(densities(fit), rows))
        for i, fit in fits.items()
    )
    return replace(best, starts=starts)


def merit(fit: VEMResult) -> tuple[bool, float]:
    """What starts are ranked by: whether they have not run away, then their bounds.

    One that has run away is the best only where all have: a bound that grows without end, as that of a
    component with one row does, is no sign of a good fit (Redner and Walker 1984, SIAM Review 26).
    """
    return fit.status is not Status.diverged, fit.elbo if np.isfinite(fit.elbo) else -np.inf


def densities(fit: VEMResult) -> torch.Tensor:
    """Log density of each observation with every factor at its median, flat."""
    objective = fit.setup.objective
    centre = {spec.name: torch.zeros(1, *spec.shape, dtype=torch.float64) for spec in objective.specs}
    with isolated(torch.float64):
        found = objective.sample(
            fit.guide_params, fit.params, 1, 0, ("log_likelihood",), noise=centre
        )["log_likelihood"]  # fmt: skip
    return torch.cat([value.reshape(-1) for value in found.values()] or [torch.zeros(0)])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt()) if a.numel() else 0.0


def initial_values(setup: Setup, block: Block, warm: VEMResult | None) -> Vector:
    """Where a block starts, flat: at its own values, or at those of an earlier fit that still fit."""
    values = {p.name: p.init for p in block.parameters}
    here = torch.get_default_device()
    if warm is not None:
        known = setup.processes.taken(warm.guide_params, {p.name: p.init.shape for p in setup.phi.parameters})
        for name, value in {**warm.params, **known}.items():
            if name in values and values[name].shape == value.shape:
                values[name] = value.to(here)
    flat: Vector = block.flat(values).numpy()
    return flat


def scattered(setup: Setup, phi: Vector, theta: Vector) -> tuple[Vector, Vector]:
    """Both blocks at random where nothing of them is drawn: parameters moved by standard normals.

    Latents of our guides and MAP sites have been drawn from the prior when the problem was set up. A
    guide of another kind knows nothing of that, nor do the parameters of a model without latents.
    """
    if setup.guide is not None and not isinstance(setup.guide, Factorised):
        return phi + torch.randn(phi.size, dtype=torch.float64).numpy(), theta
    if setup.guide is None and not setup.prototype.latents:
        return phi, theta + torch.randn(theta.size, dtype=torch.float64).numpy()
    return phi, theta


def first_state(setup: Setup, options: FitOptions, phi: Vector, theta: Vector, can_narrow: bool) -> State:
    """Where a fit begins, with its terms compiled: with smaller sds where the usual ones are too wide.

    Where a predictor is 2,000 times a latent, an sd of 0.1 is one of 200 in the log of a rate: no bound is
    finite there, and no quadrature has the nodes for a logit.

    Raises:
        ModelError: if the bound is not finite with any of them.
    """
    is_log_sd = Scales(setup).log_sds(phi.size)
    starts = [(0.0, phi)]
    if can_narrow and setup.processes.count == 1 and is_log_sd.any():
        starts += [(sd, np.where(is_log_sd, np.minimum(phi, np.log(sd)), phi)) for sd in NARROWER]
    usable: list[tuple[float, Vector]] = []
    first_error, why = None, "quadrature has too few nodes"
    for sd, start in starts:
        has_lost = _compiled_at(setup, options, start, theta)
        try:
            elbo = finite_elbo(setup, start, theta)
        except ModelError as error:
            first_error, why = first_error or error, "no bound is finite"
            continue
        if not has_lost:
            break
        usable.append((sd, start))
    else:
        if not usable:
            assert first_error is not None
            raise first_error
        sd, start = usable[0]
        _compiled_at(setup, options, start, theta)
        elbo = finite_elbo(setup, start, theta)
    if sd:
        setup.objective.add_note(f"began with sds of {sd:g}, unconstrained: with wider ones {why}")
    return State(start, theta, elbo)


def _compiled_at(setup: Setup, options: FitOptions, phi: Vector, theta: Vector) -> bool:
    """Compile the terms anew, with their nodes at a start; whether one of them has too few there."""
    if setup.lifted is None:
        setup.objective.exact = None
    compile_terms(setup, options)
    prepare(setup, phi, theta)
    check_kl(setup, phi, theta)
    settle_nodes(setup, phi, theta)
    exact = setup.objective.exact
    reasons = [exact.refused[name] for name in exact.rough] if exact is not None else []
    return any(reason.endswith(TOO_FEW) for reason in reasons)


def finite_elbo(setup: Setup, phi: Vector, theta: Vector) -> float:
    """The bound at the start; raises `ModelError` with the site whose term is not finite."""
    with torch.no_grad():
        terms = setup.objective.terms(*values_of(setup, phi, theta))
    for name, value in terms.items():
        if not bool(torch.isfinite(value)):
            raise ModelError(
                f"site {name!r}: its term of the bound is {float(value)}. {Status.nonfinite.value}"
            )
    return float(setup.processes.total(torch.stack(list(terms.values())).sum()))
