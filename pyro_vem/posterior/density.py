"""The log joint density of a fitted model as one function of a flat vector that its fit standardises."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..bound.lifted.marginal import Marginal
from ..bound.problem import Problem, Values
from ..bound.terms import log_density
from ..errors import ModelError
from ..fit.capture import AGREEMENT, POINTS, compiled, gap_between
from ..fit.result import VEMResult
from ..model.sites import Latent

Gradient: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A flat vector to the log density and its gradient."""

MOST_DENSE = 500  # latents up to which all correlations enter the coordinates
MOST_TRIES = 100  # draws to find a start
GUIDE_DRAWS = 1000  # from which mean and sds of a guide without factors of its own are taken


@dataclass(frozen=True, eq=False)
class Density:
    """log p(latents, data) at the fitted parameters, of standardised unconstrained latents.

    A point z stands for the latents ``loc + root z`` on the unconstrained scale, log Jacobians
    included in the density. Where `root` is a root of the linear-response covariance, the
    posterior of z is about N(0, I): a sampler with a unit metric in z has the inverse
    covariance as its metric, whatever the sampler.

    Attributes:
        problem: model and data.
        theta: parameters and MAP sites, held.
        sites: the latents.
        loc: centre, (scalars,).
        free: positions of the scalars that z moves, (dim,); the model never uses the others.
        root: lower triangular (dim, dim), or standard deviations (dim,).
        starts: points that the guide makes, (starts, dim); None for standard normal ones.
        graph: what runs in place of the model, see `captured`.
        told: how the density is evaluated, in a word or two.
    """

    problem: Problem
    theta: Values
    sites: tuple[Latent, ...]
    loc: Float[Tensor, " scalars"]
    free: Tensor
    root: Tensor
    starts: Tensor | None = None
    graph: Gradient | None = None
    told: str = "not captured"

    @classmethod
    def of(cls, fit: VEMResult) -> "Density":
        """The density of a fit, in coordinates of its linear response where there is one.

        Otherwise in sds of its guide. Call it, and what it returns, in `isolated(torch.float64)`.
        """
        problem = fit.setup.problem
        sites = fit.setup.latents
        free = torch.cat([~site.idle_in(site.unconstrained) for site in sites]).nonzero()[:, 0]
        if not len(free):
            raise ModelError("nothing to sample: the model uses no element of its latents")
        try:
            response = fit._linear_response
            where = free.numpy()
            loc = torch.as_tensor(response.loc)
            if len(free) <= MOST_DENSE:
                root = np.linalg.cholesky(response.covariance(where))
            else:
                root = response.sd[where]
        except (ModelError, ValueError):  # no linear response, or too many latents to solve for
            draws = _guide_draws(fit, sites)
            loc, sd = draws.mean(0), draws.std(0)[free]
            sd = torch.where(sd > 0, sd, 1.0)  # of a Delta
            return cls(problem, fit.params, sites, loc, free, sd, (draws - loc)[:, free] / sd)
        return cls(problem, fit.params, sites, loc, free, torch.as_tensor(root))

    @property
    def dim(self) -> int:
        """Number of scalars that are sampled."""
        return len(self.free)

    @property
    def origin(self) -> str:
        """Where its coordinates come from."""
        if self.starts is not None:
            return "guide"
        return "linear response" if self.root.dim() == 2 else "linear response (variances only)"

    def start(self, seed: int) -> Float[Tensor, " dim"]:
        """A point to start a chain from: a draw of the guide, or of its linear response.

        Raises:
            ModelError: if no draw has a finite density.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(MOST_TRIES):
            if self.starts is None:
                z = torch.randn(self.dim, generator=generator, dtype=torch.float64)
            else:
                z = self.starts[torch.randint(len(self.starts), (), generator=generator)]
            if all(bool(part.isfinite().all()) for part in self.gradient(z)):
                return z
        raise ModelError(
            f"none of {MOST_TRIES} draws of the {self.origin} has a finite log density: NUTS cannot start "
            "from this fit; fit.diagnose() may say why"
        )

    def values(self, z: Float[Tensor, "*draws dim"]) -> dict[str, Tensor]:
        """The latents at z, constrained, ``(*draws, *site)``."""
        return {name: value for name, (_, value) in self._split(z).items()}

    def __call__(self, z: Float[Tensor, " dim"]) -> Float[Tensor, ""]:
        """Log p(latents, data) + log |d latents / d unconstrained|, in nats."""
        parts, values = [], {name: self.theta[name] for name in self.problem.map_sites}
        split = self._split(z)
        for site in self.sites:
            inner, value = split[site.name]
            parts.append(site.transform.log_abs_det_jacobian(inner, value).sum())
            values[site.name] = value
        run = self.problem.run_model(self.theta, values)
        summed_out = Marginal.of(run).rows
        rows = [
            summed_out[name] if name in summed_out else log_density(site) for name, site in run.sites.items()
        ]
        return torch.stack(parts + [row.sum() for row in rows]).sum()

    def gradient(self, z: Float[Tensor, " dim"]) -> tuple[Float[Tensor, ""], Float[Tensor, " dim"]]:
        """The density at z and its gradient."""
        if self.graph is not None:
            value, slope = self.graph(z)
            return value, slope
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self(z)
            (slope,) = torch.autograd.grad(value, z)
        return value.detach(), slope

    def captured(self, is_long: bool) -> "Density":
        """The same density with a graph for `gradient`, if one agrees with the model at random points.

        Args:
            is_long: whether there are enough evaluations to pay for compiling the graph.
        """
        # Here: it loads dynamo and sympy.
        from torch.fx.experimental.proxy_tensor import make_fx

        def eager(z: Tensor) -> tuple[Tensor, Tensor]:  # the tracer takes no bound methods
            return self.gradient(z)

        points, reason = [self.start(seed) for seed in range(POINTS)], ""
        for told in ("compiled", "traced") if is_long else ("traced",):
            try:
                graph = compiled(eager, points[:1]) if told == "compiled" else make_fx(eager)(points[0])
                gap = max(gap_between(graph(z), eager(z)) for z in points)
            except Exception as error:  # whatever tracer or compiler refuses, the model itself serves
                reason = str(error).strip().splitlines()[0][:120]
                continue
            if gap <= AGREEMENT:
                return replace(self, graph=graph, told=told)
            reason = f"its graph is off by {gap:.1g}: the model looks at values, or leaves torch"
        return replace(self, told=f"not captured ({reason})")

    def _split(self, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Unconstrained and constrained value of each site."""
        moved = z * self.root if self.root.dim() == 1 else z @ self.root.mT
        flat = self.loc.expand(*z.shape[:-1], -1).index_add(-1, self.free, moved)
        found = {}
        pieces = flat.split([site.unconstrained.numel() for site in self.sites], dim=-1)
        for site, piece in zip(self.sites, pieces, strict=True):
            inner = piece.reshape((*z.shape[:-1], *site.unconstrained.shape))
            found[site.name] = inner, site.transform(inner)
        return found


def _guide_draws(fit: VEMResult, sites: tuple[Latent, ...]) -> Tensor:
    """Unconstrained draws of a guide, (draws, scalars)."""
    values = fit.sample(GUIDE_DRAWS)
    return torch.cat(
        [site.transform.inv(values[site.name]).reshape(GUIDE_DRAWS, -1) for site in sites], dim=1
    )
