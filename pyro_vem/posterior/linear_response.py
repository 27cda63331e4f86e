"""Linear response: the covariance that a mean-field optimum implies by how it reacts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions.transforms import SoftplusLowerCholeskyTransform, UnitLowerCholeskyTransform
from torch import Tensor
from torch.distributions import LowerCholeskyTransform, PositiveDefiniteTransform

from ..errors import ModelError
from ..fit import edges
from ..fit.result import VEMResult
from ..fit.scales import Scales
from ..fit.smooth import Smooth
from ..fit.state import joint_loss, loss_of, state_at
from ..guides.factorised import FactorisedNormal
from ..model.parameters import Parameter
from ..model.runtime import isolated
from ..model.sites import Latent
from ..model.support import first_part
from .arrowhead import MOST_PRODUCTS, Arrowhead, Layout, NotDefinite, Product, Solver, Vector, dense

# Bijectors of triangular matrices, and the diagonal from which on they do not look.
TRIANGULAR: dict[type, int] = {
    LowerCholeskyTransform: 1,
    PositiveDefiniteTransform: 1,
    SoftplusLowerCholeskyTransform: 1,
    UnitLowerCholeskyTransform: 0,
}


@dataclass(frozen=True, eq=False)
class LinearResponse:
    """Normal approximation of the latents (unconstrained, given theta) with all correlations.

    Mean-field sds answer "how much can this latent move while the others stand still". The
    optimum's own reaction to a small tilt of the log density tells the rest: the covariance is
    the block of the means in the inverse Hessian of the bound. It is exact for Gaussian
    posteriors.

    Attributes:
        sites: the latents with a factor, in the order of the vectors here.
        loc, scale: means and sds of the guide's factors, (scalars,).

    References:
        Giordano, Broderick and Jordan (2018), Covariances, robustness, and variational Bayes,
        JMLR 19(51).
    """

    sites: tuple[Latent, ...]
    loc: Vector
    scale: Vector
    inverse: Arrowhead | Solver
    where: NDArray[np.intp]
    lengths: Vector

    @classmethod
    def of(cls, fit: VEMResult) -> "LinearResponse":
        """The linear response at a fit.

        Raises:
            ModelError: if the guide has no mean and sd of its own for a latent, or `infer` holds
                them, the fit has not converged, or the Hessian of the bound is not definite.
        """
        guide = fit.setup.guide
        if not isinstance(guide, FactorisedNormal) or guide.encoded:
            tied = guide.encoded if isinstance(guide, FactorisedNormal) else ()
            reason = (
                f"an encoder ties the factors of {', '.join(tied)}"
                if tied
                else "fit with MeanFieldNormal(model)"
            )
            raise ModelError(f"linear response needs a mean and an sd for each latent: {reason}")
        held = [site.name for site in guide.latents() if guide.loc_name(site.name) not in fit.setup.phi.names]
        if held:
            raise ModelError(
                f"no linear response where factors are held, as infer() holds that of {', '.join(held)}: "
                "fit_vem() with these rows has it"
            )
        factors = _factors(fit)
        where, scales = (np.concatenate([factor[i] for factor in factors]) for i in (1, 2))
        inverse, lengths, flat = inverse_hessian(fit, "E")
        return cls(guide.latents(), flat[where], np.exp(flat[scales]), inverse, where, lengths[where])

    @property
    def sd(self) -> Vector:
        """Standard deviations, (scalars,)."""
        return self.lengths * np.sqrt(self.inverse.variances(self.where))

    def covariance(self, at: NDArray[np.intp] | None = None) -> Vector:
        """Covariance matrix of the scalars at the positions `at` (default: all)."""
        at = np.arange(len(self.where)) if at is None else at
        return np.outer(self.lengths[at], self.lengths[at]) * self.inverse.covariance(self.where[at])

    def draws(self, num: int, generator: np.random.Generator) -> Vector:
        """Draws of N(loc, covariance), (num, scalars).

        Raises:
            ModelError: where the Hessian is too large for a factor of it.
        """
        if isinstance(self.inverse, Solver):
            raise ModelError("too many coupled latents to draw with their covariance; ask for names= instead")
        return self.loc + self.lengths * self.inverse.draws(num, self.where, generator)


def inverse_hessian(fit: VEMResult, block: str) -> tuple[Arrowhead | Solver, Vector, Vector]:
    """Inverse Hessian of minus the bound at a fit, in scaled coordinates.

    Args:
        fit: the result.
        block: "E" (the guide's parameters) or "joint" (those and then the model's).

    Returns:
        The inverse, the lengths of the coordinates, and the point, flat.

    Raises:
        ModelError: if the fit has not converged, or the Hessian is not definite.
    """
    setup = fit.setup
    if not fit.converged:
        raise ModelError(f"the Hessian is looked at where a fit has converged; this one is {fit.status.name}")
    with isolated(torch.float64):
        state = state_at(setup, fit.guide_params, fit.params, fit.elbo)
        scales, held = Scales(setup), edges.positions(setup.theta, fit.boundary)
        scales.held = held  # what is at its boundary stands still, and the rest is as if it were known
        lengths = scales.of(state, block, 0)
        loss, x = (joint_loss(setup), state.joint) if block == "joint" else loss_of(setup, state, block)
        smooth, zero, idle = Smooth(loss, x, lengths), np.zeros_like(x), _idle(fit, x.size)
        idle[setup.phi.size :] = np.maximum(idle[setup.phi.size :], held[: x.size - setup.phi.size])
        flat = _flat_directions(fit, lengths) if block == "joint" else np.zeros((0, x.size))

        def product(v: Vector) -> Vector:
            return smooth.hessian_product(zero, v) + idle * v + flat.T @ (flat @ v)

        try:
            return _inverse(product, x.size, _layouts(fit, x.size)), lengths, x
        except NotDefinite as error:
            raise ModelError(f"no covariance: {error}") from error


def _flat_directions(fit: VEMResult, lengths: Vector) -> NDArray[np.float64]:
    """Unit vectors along which no parameter moves: softmax of a simplex's row plus a constant.

    Curvature is added along them, which the delta method takes out again.
    """
    theta, start = fit.setup.theta, len(lengths) - fit.setup.theta.size
    found = []
    for parameter in theta.parameters:
        if edges.is_simplex(parameter):
            rows = np.flatnonzero(theta.where([parameter.name])).reshape(-1, parameter.init.shape[-1])
            for row in rows + start:
                direction = np.zeros_like(lengths)
                direction[row] = np.where(lengths[row] > 0, 1 / np.maximum(lengths[row], 1e-300), 0.0)
                found.append(direction / np.linalg.norm(direction))
    return np.array(found).reshape(-1, len(lengths))


def is_unused(parameter: Parameter) -> NDArray[np.bool_]:
    """True at unconstrained numbers that do nothing: what a Cholesky factor has above its diagonal."""
    diagonal, shape = TRIANGULAR.get(type(first_part(parameter.constraint))), parameter.unconstrained.shape
    return np.zeros(shape, dtype=bool) if diagonal is None else np.triu(np.ones(shape, dtype=bool), diagonal)


def _inverse(product: Product, size: int, layouts: Sequence[Layout]) -> Arrowhead | Solver:
    for layout in layouts:
        if layout.num_products <= MOST_PRODUCTS:
            try:
                return Arrowhead(product, size, layout)
            except ValueError:  # rows of that plate are coupled after all
                continue
    return Solver(product, size)


def _factors(fit: VEMResult) -> list[tuple[Latent, NDArray[np.intp], NDArray[np.intp]]]:
    """Sites with a mean and an sd of their own, and where these are in the flat vector."""
    guide, phi = fit.setup.guide, fit.setup.phi
    if not isinstance(guide, FactorisedNormal):
        return []
    return [
        (
            site,
            phi.positions([guide.loc_name(site.name)]).numpy(),
            phi.positions([guide.scale_name(site.name)]).numpy(),
        )
        for site in guide.latents()
        if site.name not in guide.encoded
    ]


def _layouts(fit: VEMResult, size: int) -> list[Layout]:
    """For each plate, the factors inside it row by row; cheapest first, and last no rows at all."""
    factors, found = _factors(fit), [dense(size)]
    for plate in dict.fromkeys(plate for site, *_ in factors for plate in site.plates):
        columns = []
        for site, *positions in factors:
            if plate in site.plates:
                shape = site.unconstrained.shape
                axis = site.init.dim() - site.event_dim + plate.dim
                order = np.moveaxis(np.arange(shape.numel()).reshape(shape), axis, 0)
                columns += [where[order.reshape(plate.size, -1)] for where in positions]
        rows = np.concatenate(columns, axis=1)
        found.append(Layout(rows, np.setdiff1d(np.arange(size), rows), plate))
    return sorted(found, key=lambda layout: layout.num_products)


def _idle(fit: VEMResult, size: int) -> Vector:
    """One at coordinates that nothing depends on: they keep their own sds.

    Those are factors of elements that the model never uses, and what bijectors do not look at.
    """
    result = np.zeros(size)
    for block, start in ((fit.setup.phi, 0), (fit.setup.theta, fit.setup.phi.size)):
        for parameter in block.parameters:
            unused = is_unused(parameter)
            if unused.any():
                where = start + np.flatnonzero(block.where([parameter.name]))
                if where.max() < size:
                    result[where] = unused.reshape(-1)
    for site, *positions in _factors(fit):
        if site.idle is not None:
            for where in positions:
                result[where] = site.idle_in(site.unconstrained).numpy()
    return result


def as_noise(fit: VEMResult, response: LinearResponse, points: Vector) -> dict[str, Tensor]:
    """The standard normal noise at which the guide's factors give `points`, (draws, scalars)."""
    noise = torch.as_tensor((points - response.loc) / response.scale)
    sizes = [site.unconstrained.numel() for site in response.sites]
    pieces = noise.split(sizes, dim=1)
    return {
        site.name: piece.reshape(len(points), *site.unconstrained.shape)
        for site, piece in zip(response.sites, pieces, strict=True)
    }
