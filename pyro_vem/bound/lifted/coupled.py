"""MultivariateNormal vectors under independent Normal factors: quadratic in all means of a row.

No element of such a row is at its best by itself, so a row moves at once: Newton's method in its
means, with every variance at its best given its mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.runtime import Site
from ..kl import leaf_of
from .families import Values
from .variables import Variable

LOG_2PI = float(torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)))
MOST_NUMBERS = 20_000_000  # in the Hessians of rows that move at once
HALVINGS = 30  # of a Newton step
ENOUGH = 1e-3  # of a row's scaled slope, that conjugate gradients may leave
MOST_PRODUCTS = 40  # of conjugate gradients
SETTLED = 1e-7  # change of a log variance: the last Newton step squares it


@dataclass(frozen=True)
class Coupled:
    """The log density of vectors in expected statistics of their elements.

    Attributes:
        name: of the site; its own elements are all that enters.
        length: of a vector.
        loc: on the scale of u, (rows, length).
        precision: likewise, (rows or 1, length, length).
        constant: of each row, (rows or 1,).
        scale: of the site.
    """

    name: str
    length: int
    loc: Tensor
    precision: Tensor
    constant: Tensor
    scale: float
    discrete: tuple[int, ...] = ()
    inner: int = 0

    @property
    def index(self) -> Mapping[str, None]:
        """Variables that enter."""
        return {self.name: None}

    @property
    def scope(self) -> frozenset[str]:
        """Variables that enter."""
        return frozenset((self.name,))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the elements: one a row."""
        return (self.loc.shape[0],)

    def value(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Expected log density by row."""
        first, second = statistics[self.name][:2].reshape(2, -1, self.length)
        gap, diagonal = first - self.loc, self.precision.diagonal(dim1=-2, dim2=-1)
        quadratic = _products(self.precision, gap).mul(gap) + diagonal * (second - first.square())
        return self.scale * (self.constant - 0.5 * quadratic.sum(-1))

    def size(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The sum of the absolute values of its terms."""
        first, second = statistics[self.name][:2].reshape(2, -1, self.length)
        gap, precision = (first - self.loc).abs(), self.precision.abs()
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        quadratic = _products(precision, gap).mul(gap) + diagonal * (second + first.square())
        return self.scale * (self.constant.abs() + 0.5 * quadratic.sum(-1))

    def updated(self, eta: Tensor, q: Values) -> dict[str, Tensor]:
        """A Newton step of all factors of each row; see `Family.updated`.

        The natural parameters hold the slope of this quadratic at the present means, so all that
        they leave out is what its off-diagonal part adds away from them.
        """
        eta = eta.reshape(len(eta), -1, self.length)
        mean, variance = (q[key].reshape(-1, self.length) for key in ("loc", "scale"))
        variance = variance.square()
        off = self.scale * (self.precision - torch.diag_embed(self.precision.diagonal(dim1=-2, dim2=-1)))
        step = max(1, MOST_NUMBERS // self.length**2)
        made = [
            _rows_updated(
                eta[:, i : i + step], mean[i : i + step], variance[i : i + step],
                off if len(off) == 1 else off[i : i + step],
            )
            for i in range(0, len(mean), step)
        ]  # fmt: skip
        mean, variance = (torch.cat(parts).reshape(-1) for parts in zip(*made, strict=True))
        return {"loc": mean, "scale": variance.sqrt()}


def coupled_of(site: Site, variable: Variable) -> Coupled | str:
    """The prior of vectors as a quadratic in a variable with one unit for all elements, or why not."""
    leaf = leaf_of(site["fn"])
    if not isinstance(site["scale"], float | int):
        return "its scale differs between rows"
    if site["mask"] is not None or leaf.mask() is not True:
        return "some of its rows are masked"
    loc = leaf.dist.loc.double()
    tril = (
        leaf.dist._unbroadcasted_scale_tril.double()
    )  # derivatives of the other one are as large as all rows
    size, unit = loc.shape[-1], variable.unit.reshape(-1)[0]
    if tril.shape[:-2].numel() > 1:
        tril = tril.expand(*variable.shape, size)
    tril = tril.reshape(-1, size, size) / unit
    inverse = torch.linalg.solve_triangular(tril, torch.eye(size, dtype=tril.dtype), upper=False)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + size * unit.log()
    loc = ((loc - variable.centre) / unit).reshape(-1, size)
    constant = -log_det - 0.5 * size * LOG_2PI
    return Coupled(site["name"], size, loc, inverse.mT @ inverse, constant, float(site["scale"]))


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Symmetric matrices times vectors: one for all rows, or one each."""
    if len(matrices) == 1:
        return vectors @ matrices[0]
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _rows_updated(eta: Tensor, mean: Tensor, variance: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """A damped Newton step in the means of some rows, variances following."""
    up = eta[2] if len(eta) > 2 else torch.zeros_like(mean)
    down = eta[3] if len(eta) > 3 else torch.zeros_like(mean)
    start, curvature = mean, -2 * eta[1]

    def value(mean: Tensor, variance: Tensor) -> Tensor:
        moved, half = mean - start, variance / 2
        exps = up * (mean + half).exp() + down * (half - mean).exp()
        own = eta[0] * mean - 0.5 * curvature * (mean.square() + variance) + exps + 0.5 * variance.log()
        return (own - 0.5 * _products(off, moved) * moved).sum(-1)

    variance = _best_variance(curvature, up, down, mean, variance)
    plus, minus = up * (mean + variance / 2).exp(), down * (variance / 2 - mean).exp()
    slope = eta[0] - curvature * mean + plus - minus
    cross = ((plus - minus) / 2).square() / ((plus + minus) / 4 - 0.5 / variance.square())
    newton = _solved(off, curvature - plus - minus + cross, slope)
    before, length = value(mean, variance), torch.ones_like(mean[:, :1])
    for _ in range(HALVINGS):
        new_mean = mean + length * newton
        new_variance = _best_variance(curvature, up, down, new_mean, variance)
        is_worse = ~(value(new_mean, new_variance) >= before - 1e-14 * before.abs()).unsqueeze(-1)
        if not bool(is_worse.any()):
            break
        length = torch.where(is_worse, length / 2, length)
    return torch.where(is_worse, mean, new_mean), torch.where(is_worse, variance, new_variance)


def _solved(off: Tensor, diagonal: Tensor, slope: Tensor) -> Tensor:
    """Rows x with (off + diagonal of the row) x = slope of the row.

    Where all rows share their off-diagonal part, conjugate gradients on all rows at once cost a
    fifth of a factorisation of each; the next step mends what they leave.
    """
    if len(off) == 1 and len(slope) > 1:
        x, residual = torch.zeros_like(slope), slope
        direction = scaled = slope / diagonal
        square = (residual * scaled).sum(-1, keepdim=True)
        target = ENOUGH**2 * square
        for _ in range(MOST_PRODUCTS):
            product = direction @ off[0] + diagonal * direction
            length = square / (direction * product).sum(-1, keepdim=True).clamp(min=1e-300)
            x = x + length * direction
            residual = residual - length * product
            scaled = residual / diagonal
            before, square = square, (residual * scaled).sum(-1, keepdim=True)
            if bool((square <= target).all()):
                return x
            direction = scaled + square / before.clamp(min=1e-300) * direction
    factor, failed = torch.linalg.cholesky_ex(off + torch.diag_embed(diagonal))
    newton = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    return torch.where((failed > 0).unsqueeze(-1), slope / diagonal, newton)


def _best_variance(curvature: Tensor, up: Tensor, down: Tensor, mean: Tensor, start: Tensor) -> Tensor:
    """The root of curvature + c exp(v / 2) = 1 / v, by Newton's method in log v (a convex function)."""
    lifted, log = -(up * mean.exp() + down * (-mean).exp()), start.log()
    for _ in range(HALVINGS):
        variance = log.exp()
        grown = lifted * (variance / 2).exp()
        total = curvature + grown
        step = (total.log() + log) / (1 + grown * variance / (2 * total))
        log = log - step
        if not bool((step.abs() > SETTLED * (1 + log.abs())).any()):
            break
    return log.exp()
