"""Parameters that are the covariance of vectors: how they make its Cholesky factor, and it makes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.multivariate_normal import _precision_to_scale_tril

POSITIVE = (constraints.positive, dist.constraints.softplus_positive)
TRIL = (dist.constraints.lower_cholesky, dist.constraints.softplus_lower_cholesky)
MATRIX = (dist.constraints.positive_definite,)
CORRELATION = (constraints.corr_cholesky,)


@dataclass(frozen=True)
class Form:
    """A way to write covariances in parameters, of which every covariance of its kind has one value.

    Attributes:
        name: how the plan calls it, a word for each parameter.
        parts: for each parameter, dimensions of one covariance and constraints that allow all values.
        tril: the parameters, (classes, ...), to Cholesky factors, (classes, length, length).
        made: covariances and their Cholesky factors to the parameters.
        is_diagonal: whether vectors have independent elements.
    """

    name: tuple[str, ...]
    parts: tuple[tuple[int, tuple[Any, ...]], ...]
    tril: Callable[[Sequence[Tensor]], Tensor]
    made: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    is_diagonal: bool = False

    def factor(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest covariances of this form, and their Cholesky factors; NaN where they are singular."""
        if self.is_diagonal:
            covariance = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
        factor, failed = torch.linalg.cholesky_ex(covariance)
        return covariance, torch.where((failed > 0)[:, None, None], torch.nan, factor)


def _sds(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).sqrt()


FORMS = (
    Form(("scale_tril",), ((2, TRIL),), lambda v: v[0], lambda _, tril: (tril,)),
    Form(
        ("covariance_matrix",), ((2, MATRIX),),
        lambda v: torch.linalg.cholesky(v[0]), lambda covariance, tril: (covariance + 0 * tril,),
    ),
    Form(
        ("precision_matrix",), ((2, MATRIX),),
        lambda v: _precision_to_scale_tril(v[0]), lambda _, tril: (torch.cholesky_inverse(tril),),
    ),
    Form(
        ("standard deviations", "correlation"), ((1, POSITIVE), (2, CORRELATION)),
        lambda v: v[0].unsqueeze(-1) * v[1],
        lambda covariance, tril: (_sds(covariance), tril / _sds(covariance).unsqueeze(-1)),
    ),
    Form(
        ("standard deviations",), ((1, POSITIVE),),
        lambda v: torch.diag_embed(v[0]), lambda covariance, _: (_sds(covariance),), is_diagonal=True,
    ),
    Form(
        ("variances",), ((1, POSITIVE),),
        lambda v: torch.diag_embed(v[0].sqrt()), lambda covariance, _: (_sds(covariance).square(),),
        is_diagonal=True,
    ),
)  # fmt: skip
