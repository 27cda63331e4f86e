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
from .exponentials import HALVINGS, Curve
from .families import Values
from .variables import Variable

LOG_2PI = float(torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)))
MOST_NUMBERS = 20_000_000  # in the Hessians of rows that move at once
ENOUGH = 1e-2  # of a row's scaled slope, that conjugate gradients may leave
MOST_PRODUCTS = 40  # of conjugate gradients


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

    def slope(self, name: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Derivatives of the sum of all rows in the statistics."""
        slope, diagonal = torch.zeros_like(statistics[name]), self.precision.diagonal(dim1=-2, dim2=-1)
        first = statistics[name][0].reshape(-1, self.length)
        by_first, by_second = slope[:2].view(2, -1, self.length)
        by_first += self.scale * (diagonal * first - _products(self.precision, first - self.loc))
        by_second -= 0.5 * self.scale * diagonal
        return slope

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
        mean, scale = (q[key].reshape(-1, self.length) for key in ("loc", "scale"))
        log = 2 * scale.log()
        off = self.scale * (self.precision - torch.diag_embed(self.precision.diagonal(dim1=-2, dim2=-1)))
        step = max(1, MOST_NUMBERS // self.length**2)
        made = [
            _rows_updated(
                eta[:, i : i + step], mean[i : i + step], log[i : i + step],
                off if len(off) == 1 else off[i : i + step],
            )
            for i in range(0, len(mean), step)
        ]  # fmt: skip
        mean, log = (torch.cat(parts).reshape(-1) for parts in zip(*made, strict=True))
        return {"loc": mean, "scale": (log / 2).exp()}


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


def _rows_updated(eta: Tensor, mean: Tensor, log: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """A damped Newton step in means and log variances of some rows.

    The variances are near their best before it, which is cheap: a step from a bad one would be too
    long, and one bad element would hold up its row.
    """
    curve, start = Curve(eta), mean

    def value(mean: Tensor, log: Tensor) -> Tensor:
        moved = mean - start
        return (curve.value(mean, log) - 0.5 * _products(off, moved) * moved).sum(-1)

    before, length = value(mean, log), torch.ones_like(mean[:, :1])
    near = curve.best_log(mean, log)
    at = curve.slopes(mean, near)
    ratio, lift = at.mean_log / at.log_log, at.by_log / at.log_log
    newton = _solved(off, at.mean_log * ratio - at.mean_mean, at.by_mean - at.mean_log * lift)
    newton_log = -lift - ratio * newton
    for _ in range(HALVINGS):
        new_mean, new_log = mean + length * newton, near + length * newton_log
        is_worse = ~(value(new_mean, new_log) >= before - 1e-14 * before.abs()).unsqueeze(-1)
        if not bool(is_worse.any()):
            break
        length = torch.where(is_worse, length / 2, length)
    return torch.where(is_worse, mean, new_mean), torch.where(is_worse, log, new_log)


def _solved(off: Tensor, diagonal: Tensor, slope: Tensor) -> Tensor:
    """Rows x with (off + diagonal of the row) x = slope of the row.

    Where all rows share their off-diagonal part, conjugate gradients on all rows at once cost a
    tenth of a factorisation of each; the next step mends what they leave.
    """
    x = _rows_searched(off[0], diagonal, slope) if len(off) == 1 and len(slope) > 1 else None
    if x is not None:
        return x
    factor, failed = torch.linalg.cholesky_ex(off + torch.diag_embed(diagonal))
    newton = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    return torch.where((failed > 0).unsqueeze(-1), slope / diagonal, newton)


def _rows_searched(off: Tensor, diagonal: Tensor, slope: Tensor) -> Tensor | None:
    """The same by conjugate gradients; None where they do not get there.

    In single precision: two digits are asked for, and its numbers are half as many bytes.
    """
    off, diagonal, residual = off.float(), diagonal.float(), slope.float()
    x, tiny = torch.zeros_like(residual), torch.finfo(torch.float32).tiny
    direction = scaled = residual / diagonal
    square = (residual * scaled).sum(-1, keepdim=True)
    target = ENOUGH**2 * square
    for _ in range(MOST_PRODUCTS):
        product = torch.addcmul(direction @ off, diagonal, direction)
        length = square / (direction * product).sum(-1, keepdim=True).clamp(min=tiny)
        x = torch.addcmul(x, length, direction)
        residual = torch.addcmul(residual, length, product, value=-1)
        scaled = residual / diagonal
        before, square = square, (residual * scaled).sum(-1, keepdim=True)
        if bool((square <= target).all()):
            return x.double()
        direction = torch.addcmul(scaled, square / before.clamp(min=tiny), direction)
    return None
