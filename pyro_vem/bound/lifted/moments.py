"""Priors of vectors whose mean and covariance are parameters: their M-step is a match of moments."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ...model.density import collapsed
from ...model.parameters import Parameter
from ...model.runtime import Site
from ..kl import leaf_of

Values = Mapping[str, Tensor]
Total = Callable[[Tensor], Tensor]
KINDS: Mapping[str, tuple[Any, ...]] = {  # with the constraints under which a moment is always allowed
    "scale_tril": (dist.constraints.lower_cholesky, dist.constraints.softplus_lower_cholesky),
    "covariance_matrix": (dist.constraints.positive_definite,),
}


@dataclass(frozen=True)
class Moments:
    """A MultivariateNormal prior with parameters of its own.

    Attributes:
        site: the latent.
        loc: the parameter that is its mean, one for all vectors; None if it is none.
        factor: the parameter that is its covariance or the Cholesky factor of it.
        kind: which of the two.
    """

    site: str
    loc: str | None
    factor: str
    kind: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.factor,) if self.loc is None else (self.loc, self.factor)

    def prior(self, values: Values, shape: torch.Size, scale: float) -> Site:
        """The site as a run of the model would have it, where the mean is a parameter too."""
        assert self.loc is not None
        loc = values[self.loc].expand(shape)
        fn = dist.MultivariateNormal(loc, **{self.kind: values[self.factor]})
        return {"name": self.site, "fn": fn, "scale": scale, "mask": None}

    def best(self, prior: Tensor, q: Values, total: Total) -> dict[str, Tensor]:
        """The parameters that maximise the expected log prior under a factor; NaN if they are singular.

        Args:
            prior: mean of the prior as it is, broadcastable with the factor's.
            q: the factor's "loc", and its "scale" or "scale_tril".
            total: sums over processes that have rows of their own.
        """
        size = q["loc"].shape[-1]
        mean = q["loc"].reshape(-1, size)
        count = total(torch.tensor(float(len(mean))))
        loc = (
            total(mean.sum(0)) / count
            if self.loc is not None
            else prior.expand(q["loc"].shape).reshape(-1, size)
        )
        gap = mean - loc
        square = gap.mT @ gap
        if "scale" in q:
            square = square + torch.diag(q["scale"].reshape(-1, size).square().sum(0))
        else:
            tril = q["scale_tril"].reshape(-1, size, size)
            square = square + (tril @ tril.mT).sum(0)
        covariance = total(square) / count
        made = {} if self.loc is None else {self.loc: loc}
        factor, failed = torch.linalg.cholesky_ex(covariance)
        found = covariance if self.kind == "covariance_matrix" else factor
        return {**made, self.factor: torch.where(failed > 0, torch.nan, found)}


def mean_of(site: Site) -> Tensor:
    """Of a site's vectors."""
    loc: Tensor = leaf_of(site["fn"]).dist.loc
    return loc


def moments_of(
    sites: Sequence[str],
    execute: Callable[[Values], Any],
    points: Sequence[Values],
    parameters: Mapping[str, Parameter],
    seen_by: Callable[[str], Collection[str]],
) -> tuple[Moments, ...]:
    """Those priors of vectors whose parameters enter nowhere else, and may be any moments.

    Args:
        sites: latent vectors.
        execute: runs the model at values.
        points: generic values of all latents and parameters.
        parameters: that have no statistics.
        seen_by: factors that a parameter enters.
    """
    runs = [execute(point) for point in points]
    own = {name: [p for p in parameters if set(seen_by(p)) == {name}] for name in sites}
    found = []
    for name in sites:
        priors = [run.sites[name] for run in runs]
        factor = next(
            (
                (p, kind)
                for p in own[name]
                for kind, free in KINDS.items()
                if parameters[p].constraint in free and _is(priors, kind, 2, points, p)
            ),
            None,
        )
        if factor is None or any(not _is_plain(site) for site in priors):
            continue
        loc = next((p for p in own[name] if _is(priors, "loc", 1, points, p)), None)
        if loc is not None and not parameters[loc].is_real:
            continue
        found.append(Moments(name, loc, *factor))
    return tuple(found)


def _is(priors: Sequence[Site], what: str, event_dim: int, points: Sequence[Values], name: str) -> bool:
    """Whether an argument of a prior is a parameter itself, at every point."""
    made = [collapsed(getattr(leaf_of(site["fn"]).dist, what), event_dim) for site in priors]
    values = [point[name] for point in points]
    return all(
        value.shape == m.shape[m.dim() - event_dim :]
        and m.numel() == value.numel()
        and torch.allclose(m.double().reshape(value.shape), value, rtol=1e-10, atol=1e-12)
        for m, value in zip(made, values, strict=True)
    )


def _is_plain(site: Site) -> bool:
    """True if every vector counts the same."""
    return (
        isinstance(site["scale"], float | int) and site["mask"] is None and leaf_of(site["fn"]).mask() is True
    )
