"""Standard errors that do not believe the model: the sandwich, over the rows of a plate."""

import numpy as np
import torch
from torch import Tensor

from ..bound.dependence import differ, fingerprint
from ..bound.terms import Part
from ..errors import ModelError
from ..fit.exactness import values_of
from ..fit.result import VEMResult
from ..model.runtime import isolated
from ..model.sites import plates_of
from .arrowhead import Indices, Vector
from .checks import run_at
from .linear_response import inverse_hessian

STEP = 1e-4  # of a coordinate's length, for central differences of the scores
MOST_COORDINATES = 2000  # of parameters and global factors: the bound is evaluated twice for each


def sandwich(fit: VEMResult, plate: str) -> Vector:
    """Covariance of the unconstrained parameters, A^-1 B A^-1.

    A is minus the Hessian of the bound with the factors inside the plate profiled out, B the sum of
    outer products of the rows' scores. Rows must be independent given the parameters and the
    latents outside the plate; whether they follow the model does not matter. Latents outside of it
    are estimated from the rows like parameters, which is right for global ones whose priors are fixed;
    others are refused.

    Args:
        fit: the result.
        plate: name of the plate.

    Raises:
        ModelError: if the bound does not come apart by the rows of that plate, if rows share latents of
            another plate or latents whose priors depend on parameters, or if there is no covariance.
    """
    setup = fit.setup
    setup.prototype.plate(plate)
    _check_shared(fit, plate)
    inverse, lengths, flat = inverse_hessian(fit, "joint")
    size = setup.phi.size
    outer = _outside(fit, plate)
    psi = np.concatenate([outer, np.arange(size, len(flat))]).astype(np.intp)
    if len(psi) > MOST_COORDINATES:
        raise ModelError(
            f"{len(psi):,} parameters and factors outside plate {plate!r}: scores of more than "
            f"{MOST_COORDINATES:,} are not computed"
        )
    theta = np.arange(len(outer), len(psi))
    bread = inverse.covariance(psi)[theta]
    scores = _scores(fit, plate, flat, lengths, psi)
    half = scores @ bread.T  # (rows, parameters)
    return np.outer(lengths[size:], lengths[size:]) * (half.T @ half)


def _check_shared(fit: VEMResult, plate: str) -> None:
    """Refuse latents outside the plate that are a sample themselves: their spread is in no row's score."""
    shared = [s for s in fit.setup.prototype.latents if not s.is_in((plate,))]
    for site in shared:
        if site.plates:
            other = site.plates[0].name
            raise ModelError(
                f"rows of plate {plate!r} share latent {site.name!r} of plate {other!r}, so that they are "
                f"not independent given the parameters: ask for plate={other!r} if plate {plate!r} is nested "
                "in it (and does not reach it by an index), or for standard_errors() without a plate, which "
                "believe the model"
            )
    for name in _with_moving_priors(fit, [site.name for site in shared]):
        raise ModelError(
            f"latent {name!r} is outside plate {plate!r}, and its prior depends on parameters, of which no "
            "row of the plate tells: ask for standard_errors() without a plate, which believe the model"
        )


def _with_moving_priors(fit: VEMResult, names: list[str]) -> list[str]:
    """Latents whose priors are others at other parameters (values of MAP sites among them)."""
    problem, other = fit.setup.problem, fit.setup.objective.elsewhere
    here = run_at(fit).sites
    values = {site.name: here[site.name]["value"] for site in fit.setup.prototype.latents}
    values |= {name: other[name] for name in problem.map_sites}
    with isolated(torch.float64), torch.no_grad():
        there = problem.run_model(other, values).sites
    return [name for name in names if differ(fingerprint(here[name]), fingerprint(there[name]))]


def _outside(fit: VEMResult, plate: str) -> Indices:
    """Coordinates of phi that belong to factors outside a plate."""
    phi, latents = fit.setup.phi, fit.setup.prototype.latents
    sites = {site.name for site in latents if site.is_in((plate,))}
    inside = [name for name in phi.names if name.split(".")[-1] in sites]
    if any("$$$" in name for name in phi.names):
        raise ModelError("factors from an encoder are not those of single rows: there is no sandwich")
    return np.flatnonzero(~phi.where(inside))


def _scores(fit: VEMResult, plate: str, flat: Vector, lengths: Vector, psi: Indices) -> Vector:
    """Derivatives of each row's part of the bound in the scaled coordinates psi, (rows, psi)."""
    columns = []
    for index in psi:
        step = np.zeros_like(flat)
        step[index] = STEP * lengths[index]
        up, down = (_rows(fit, plate, x) for x in (flat + step, flat - step))
        columns.append((up - down).numpy() / (2 * STEP))
    return np.stack(columns, axis=1)


def _rows(fit: VEMResult, plate: str, x: Vector) -> Tensor:
    """The bound by rows of a plate, at a flat point."""
    setup, objective = fit.setup, fit.setup.objective
    if objective.exact is not None and objective.exact.not_averages:
        raise ModelError(
            "the bound sums discrete sites out at expected log densities, which do not come apart by "
            "rows: there is no sandwich where latents go with discrete sites"
        )
    with isolated(torch.float64), torch.no_grad():
        values = values_of(setup, *np.split(x, [setup.phi.size]))
        return objective.row_parts(*values, lambda parts: by_row(parts, plate)).mean(0)


def by_row(parts: list[Part], plate: str) -> Tensor:
    """Pieces of one draw's terms, added up by rows of a plate."""
    total: Tensor | None = None
    for row, value, frames in parts:
        dims = [p.dim for p in plates_of({"cond_indep_stack": frames}) if p.name == plate]
        if dims:
            rest = [d for d in range(-value.dim(), 0) if d != dims[0]]
            one = value.sum(rest) if rest else value
            total = one if total is None else total + one
        elif row.kind == "likelihood":
            raise ModelError(
                f"site {row.site!r} is outside plate {plate!r}: rows are found by plates; nest the plate of "
                "the site in it, instead of an index"
            )
    if total is None:
        raise ModelError(f"nothing is inside plate {plate!r}")
    return total
