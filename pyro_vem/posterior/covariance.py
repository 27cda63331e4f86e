"""Covariance matrices of latents and of parameters, on their constrained scale."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, hermitenorm
from torch import Tensor

from ..errors import ModelError, check_names
from ..fit.edges import is_simplex, positions
from ..fit.result import VEMResult
from ..model.parameters import is_elementwise, is_identity
from ..model.runtime import isolated
from ..model.sites import Latent
from .arrowhead import Vector
from .importance import at_noise, usable_pool
from .linear_response import inverse_hessian
from .sandwich import sandwich

TIED = 1e-6  # of a matrix's largest number: standard errors of what moves with held numbers alone
NODES, ORDERS = 64, 24  # of the Hermite expansion of a transformed latent


def covariance(
    fit: VEMResult,
    of: Literal["latents", "params"] = "latents",
    method: Literal["linear_response", "psis"] = "linear_response",
    names: Sequence[str] | None = None,
    plate: str | None = None,
) -> pd.DataFrame:
    """Covariance matrix on the constrained scale, as a labelled pandas frame.

    Args:
        fit: the result.
        of: "latents" (given the parameters), or "params": of the estimates, from the inverse
            Hessian of the bound in all its parameters.
        method: of latents: "linear_response", or "psis" for importance-weighted moments.
        names: sites (or parameters) to look at; all by default.
        plate: of parameters: the sandwich over the rows of this plate, which must be independent
            but need not follow the model.

    Parameters at their boundary (``fit.boundary``) have no standard errors: theirs are nan, and others'
    are those of the model in which they are held there.

    Raises:
        ModelError: where there is none: the fit has not converged, the Hessian is not
            definite, or the weights cannot be believed; the message says which.

    References:
        Giordano, Broderick and Jordan (2018), Covariances, robustness, and variational Bayes,
        JMLR 19(51). Self and Liang (1987), Asymptotic properties of maximum likelihood estimators
        and likelihood ratio tests under nonstandard conditions, JASA 82. White (1982), Maximum
        likelihood estimation of misspecified models, Econometrica 50. Westling and McCormick (2019),
        Beyond prediction: a framework for inference with variational approximations in mixture
        models, JCGS 28.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(x, y):
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 2):
        ...         pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)
        >>> data = {"x": torch.tensor([1.0, 1.0]), "y": torch.tensor([2.0, 0.0])}
        >>> print(vem.fit_vem(model, data, progress=False).covariance().round(3))
             a    b
        a  0.6 -0.4
        b -0.4  0.6
    """
    if of not in ("latents", "params"):
        raise ValueError(f"of={of!r}: choose 'latents' or 'params'")
    if method not in ("linear_response", "psis"):
        raise ValueError(f"method={method!r}: choose 'linear_response' or 'psis'")
    if plate is not None and of != "params":
        raise ValueError(f"plate={plate!r} is for of='params'")
    if of == "params":
        return _of_params(fit, names, plate)
    return _of_latents(fit, names) if method == "linear_response" else _weighted(fit, names)


def standard_errors(fit: VEMResult, plate: str | None = None) -> dict[str, Tensor]:
    """See `pyro_vem.VEMResult.standard_errors`."""
    sd = torch.as_tensor(np.sqrt(np.diag(_of_params(fit, None, plate))))
    values = [fit.params[name] for name in fit.setup.theta.names]
    pieces = sd.split([value.numel() for value in values])
    return {
        name: piece.reshape(value.shape)
        for name, value, piece in zip(fit.setup.theta.names, values, pieces, strict=True)
    }


def _of_params(fit: VEMResult, names: Sequence[str] | None, plate: str | None) -> pd.DataFrame:
    """The theta block of the inverse joint Hessian, or the sandwich, by the delta method."""
    theta = fit.setup.theta
    if not theta.size:
        raise ModelError("the model has no free parameters (pyro.param, or map_sites of vem_model)")
    check_names("names", names or (), theta.names)
    matrix = sandwich(fit, plate) if plate is not None else inverse_of_params(fit)
    jacobian = jacobian_of_params(fit)
    labels = [label for name in theta.names for label in _labels(name, tuple(fit.params[name].shape))]
    values = jacobian @ matrix @ jacobian.T
    pinned = _at_boundary(fit, np.sqrt(np.diag(values)))
    values[pinned], values[:, pinned] = np.nan, np.nan
    frame = pd.DataFrame(values, index=labels, columns=labels)
    wanted = [x for n in names or theta.names for x in _labels(n, tuple(fit.params[n].shape))]
    return frame.loc[wanted, wanted]


def _at_boundary(fit: VEMResult, errors: Vector) -> NDArray[np.bool_]:
    """Numbers of the constrained parameters that stand at their boundary, or follow from those that do."""
    theta, flags = fit.setup.theta, []
    held = positions(theta, fit.boundary)
    ends = np.cumsum([p.init.numel() for p in theta.parameters])[:-1]
    for parameter, error in zip(theta.parameters, np.split(errors, ends), strict=True):
        own = held[theta.where([parameter.name])]
        if is_simplex(parameter):  # the last one free is one minus zeros
            rows = own.reshape(-1, parameter.init.shape[-1])
            own = (rows | (rows.sum(-1, keepdims=True) == rows.shape[-1] - 1)).reshape(-1)
        elif len(own) != len(error):  # as of a correlation matrix
            own = own.any() & (error <= TIED * float(fit.params[parameter.name].abs().max()))
        flags.append(own)
    return np.concatenate(flags)


def jacobian_of_params(fit: VEMResult) -> Vector:
    """Derivatives of the constrained parameters in the unconstrained ones, at the estimates."""
    theta = fit.setup.theta

    def constrained(x: Tensor) -> Tensor:
        return torch.cat([value.reshape(-1) for value in theta.constrained(x).values()])

    with isolated(torch.float64):
        found: Vector = torch.autograd.functional.jacobian(constrained, theta.flat(fit.params)).numpy()
    return found


def inverse_of_params(fit: VEMResult) -> Vector:
    """Covariance of the unconstrained parameters: the theta block of the inverse joint Hessian."""
    inverse, lengths, flat = inverse_hessian(fit, "joint")
    where = np.arange(len(flat) - fit.setup.theta.size, len(flat))
    return np.outer(lengths[where], lengths[where]) * inverse.covariance(where)


def _weighted(fit: VEMResult, names: Sequence[str] | None) -> pd.DataFrame:
    """Importance-weighted covariance."""
    pool = usable_pool(fit)
    values = at_noise(fit, pool.noise, "values")["values"]
    latents = [site.name for site in fit.setup.latents]
    check_names("names", names or (), latents)
    chosen = [name for name in latents if names is None or name in names]
    table = np.concatenate([values[name].reshape(len(pool.weights), -1).numpy() for name in chosen], axis=1)
    labels = [label for name in chosen for label in _labels(name, tuple(values[name].shape[1:]))]
    matrix = np.atleast_2d(np.cov(table, rowvar=False, aweights=pool.weights, ddof=0))
    return pd.DataFrame(matrix, index=labels, columns=labels)


def _of_latents(fit: VEMResult, names: Sequence[str] | None) -> pd.DataFrame:
    """Linear response: a Normal on the unconstrained scale, pushed through each site's bijector."""
    response = fit._linear_response
    check_names("names", names or (), [site.name for site in response.sites])
    labels: list[str] = []
    spans, transformed, start = [], [], 0
    for site in response.sites:
        size = site.unconstrained.numel()
        if names is None or site.name in names:
            spans.append(np.arange(start, start + size))
            transformed.append(site)
            labels += _labels(site.name, tuple(site.unconstrained.shape))
        start += size
    at = np.concatenate(spans)
    matrix = response.covariance(at)
    sd = np.sqrt(np.diag(matrix))
    parts = np.split(np.arange(len(at)), np.cumsum([len(span) for span in spans])[:-1])
    weights = np.concatenate(
        [
            _hermite(site, response.loc[at][part], sd[part])
            for site, part in zip(transformed, parts, strict=True)
        ]
    )
    correlation = matrix / np.outer(sd, sd)
    result, power = np.zeros_like(matrix), np.ones_like(matrix)
    for k in range(1, weights.shape[1]):  # Mehler (1866): Cov = sum_k a_ik a_jk rho^k
        power *= correlation
        result += np.outer(weights[:, k], weights[:, k]) * power
    return pd.DataFrame(result, index=labels, columns=labels)


def _hermite(site: Latent, loc: Vector, sd: Vector) -> Vector:
    """Coefficients of T(loc + sd z) in normalised Hermite polynomials, (scalars, orders)."""
    if not is_elementwise(site.transform):
        raise ModelError(
            f"site {site.name!r}: its bijector ties its elements; take draws with "
            "fit.sample(n, correction='linear_response') instead"
        )
    if is_identity(site.transform):
        return np.stack([loc, sd], axis=1) @ np.eye(2, ORDERS)
    nodes, mass = np.polynomial.hermite_e.hermegauss(NODES)
    points = loc + sd * nodes[:, None]
    values = torch.as_tensor(points).reshape(NODES, *site.unconstrained.shape)
    shaped = site.transform(values).reshape(NODES, -1).numpy()
    basis = np.stack([hermitenorm(k)(nodes) / np.exp(0.5 * gammaln(k + 1)) for k in range(ORDERS)], axis=1)
    return shaped.T @ (basis * (mass / mass.sum())[:, None])


def _labels(name: str, shape: tuple[int, ...]) -> list[str]:
    return [f"{name}[{', '.join(map(str, i))}]" if shape else name for i in np.ndindex(*shape)]
