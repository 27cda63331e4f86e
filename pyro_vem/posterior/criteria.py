"""AIC and BIC of a fit by maximum likelihood; what a bound makes of them is said."""

import math
from dataclasses import dataclass

import torch

from ..bound.kl import leaf_of
from ..bound.weights import element_weight
from ..errors import ModelError
from ..fit.edges import is_simplex
from ..fit.result import VEMResult
from ..model.parameters import Parameter
from ..model.runtime import Site
from .checks import run_at
from .linear_response import is_unused

FEWEST_ROWS = 2  # log n, the penalty of the BIC, is zero for one


@dataclass(frozen=True)
class Criteria:
    """Information criteria; lower is better.

    Attributes:
        aic: Akaike's (1974), -2 log likelihood + 2 k.
        bic: Schwarz's (1978), -2 log likelihood + k log n; nan where n is one: it is an approximation
            for many independent rows.
        num_parameters: k, free numbers in the parameters.
        num_rows: n.
        is_bound: whether latents are averaged over by factors: the ELBO stands for the log
            likelihood then, and each criterion is at most what is given here. Two such bounds do
            not rank two models unless their gaps are alike.
        boundary: what is at its boundary: it counts in k, which penalises it too much.
    """

    aic: float
    bic: float
    num_parameters: int
    num_rows: int
    is_bound: bool
    boundary: tuple[str, ...] = ()

    def __str__(self) -> str:
        sign = "<=" if self.is_bound else "="
        edges = (
            f"; too large a penalty for {', '.join(self.boundary)}, at its boundary" if self.boundary else ""
        )
        aic = f"AIC {sign} {self.aic:.2f}"
        if self.num_rows < FEWEST_ROWS:
            return f"{aic}, no BIC, which needs independent rows: the model has one{edges}"
        bic = f"BIC {sign} {self.bic:.2f}"
        return f"{aic}, {bic} ({self.num_parameters} parameters, {self.num_rows} rows){edges}"


def criteria(fit: VEMResult, plate: str | None = None) -> Criteria:
    """AIC and BIC of the fitted parameters.

    Args:
        fit: the result.
        plate: whose rows are independent, n of the BIC; by default every row that is observed counts.

    Raises:
        ModelError: if the model has no parameters, or its parameters have priors (``map_sites``).

    References:
        Akaike (1974), A new look at the statistical model identification, IEEE Trans. Autom.
        Control 19. Schwarz (1978), Estimating the dimension of a model, Ann. Stat. 6.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     mu = pyro.param("mu", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor([1.0, 2.0, 6.0])}, progress=False)
        >>> print(fit.criteria())
        AIC <= 16.59, BIC <= 15.69 (1 parameters, 3 rows)
    """
    setup = fit.setup
    if setup.problem.map_sites:
        raise ModelError(
            f"latents {', '.join(setup.problem.map_sites)} are point estimates with priors: AIC and BIC are "
            "of likelihoods; fit.loo() compares such models"
        )
    if not setup.theta.size:
        raise ModelError("the model has no free parameters: fit.loo() compares models by their posteriors")
    k = sum(_free(parameter) for parameter in setup.theta.parameters)
    n = _rows(fit, plate)
    penalty = k * math.log(n) if n >= FEWEST_ROWS else math.nan
    aic, bic = -2 * fit.elbo + 2 * k, -2 * fit.elbo + penalty
    return Criteria(aic, bic, k, n, setup.phi.size > 0, tuple(edge.label for edge in fit.boundary))


def _free(parameter: Parameter) -> int:
    """Numbers of a parameter that may move by themselves."""
    shape = parameter.unconstrained.shape
    if is_simplex(parameter):
        return shape[:-1].numel() * (shape[-1] - 1)
    return int((~is_unused(parameter)).sum())


def _rows(fit: VEMResult, plate: str | None) -> int:
    if plate is not None:
        return fit.setup.prototype.plate(plate).size
    sites = run_at(fit).sites
    return max(1, sum(_num_observed(sites[name], fit) for name in fit.setup.prototype.observed))


def _num_observed(site: Site, fit: VEMResult) -> int:
    """Rows of an observed site, without those of discrete sites beside it, and those that are masked out."""
    leaf, left = leaf_of(site["fn"]), fit.setup.problem.model.first_available_dim
    shape = site["fn"].log_prob(site["value"]).shape
    shape = shape if left is None else shape[max(0, len(shape) + left + 1) :]
    known = torch.as_tensor(element_weight(site, leaf.inner)) != 0
    for _ in range(leaf.inner):
        known = known.any(-1) if known.dim() else known
    return int(known.expand(shape).sum())
