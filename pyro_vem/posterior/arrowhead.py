"""The inverse of a Hessian that is block-diagonal within a plate, bordered by everything else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.sparse import linalg as sparse_linalg

from ..model.sites import Plate

Vector: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Product: TypeAlias = Callable[[Vector], Vector]

MOST_PRODUCTS = 5000  # Hessian-vector products that assembling a matrix may cost
AGREEMENT = 1e-6  # of an assembled matrix with the products it came from
SINGULAR = 1e-11  # of a diagonal entry, what the other coordinates may leave of it
MOST_SOLVES = 1000  # by conjugate gradients


class NotDefinite(ArithmeticError):
    """The Hessian has a direction along which the loss does not rise."""


@dataclass(frozen=True)
class Layout:
    """Which coordinates belong together.

    Attributes:
        rows: (rows, b) coordinates that are coupled within a row and to `rest` only.
        rest: all others.
        plate: whose rows they are.
    """

    rows: Indices
    rest: Indices
    plate: Plate | None = None

    @property
    def num_products(self) -> int:
        """Products that assembling costs: the rows share theirs."""
        return int(self.rows.shape[1] + len(self.rest))


def dense(size: int) -> Layout:
    """A layout without rows.

    Example:
        >>> dense(3).num_products
        3
    """
    return Layout(np.zeros((0, 0), dtype=np.intp), np.arange(size))


class Arrowhead:
    """The inverse of a positive definite matrix, block by block.

    With blocks A_i of the rows, borders B_i to the rest and the corner C, the inverse is
    blockdiag(A_i^-1) + V V^T, where V holds -A_i^-1 B_i L^-T (and L^-T for the rest) and
    L L^T = C - sum_i B_i^T A_i^-1 B_i is the Schur complement.

    Args:
        product: v -> H v.
        size: of H.
        layout: which coordinates belong together.

    Raises:
        NotDefinite: if a block or the Schur complement is not positive definite.
        ValueError: if H has entries outside the layout.

    Example:
        >>> H = np.diag([2.0, 2.0, 4.0]); H[0, 2] = H[2, 0] = H[1, 2] = H[2, 1] = 1.0
        >>> inverse = Arrowhead(lambda v: H @ v, 3, Layout(np.array([[0], [1]]), np.array([2])))
        >>> np.allclose(inverse.covariance(np.arange(3)), np.linalg.inv(H))
        True
    """

    def __init__(self, product: Product, size: int, layout: Layout) -> None:
        rows, rest = layout.rows, layout.rest
        corner = np.zeros((len(rest), len(rest)))
        border = np.zeros((*rows.shape, len(rest)))
        blocks = np.zeros((*rows.shape, rows.shape[1]))
        for j, index in enumerate(rest):
            column = product(_unit(size, index))
            corner[:, j], border[:, :, j] = column[rest], column[rows]
        for k in range(rows.shape[1]):
            blocks[:, :, k] = product(_unit(size, rows[:, k]))[rows]
        self._check(product, size, layout, blocks, border, corner)
        try:
            factors = np.linalg.cholesky((blocks + blocks.swapaxes(1, 2)) / 2)
            self._half = np.linalg.inv(factors)  # A^-1 = half^T half
            self._inverse = self._half.swapaxes(1, 2) @ self._half
            weights = self._inverse @ border
            schur = (corner + corner.T) / 2 - np.einsum("rbi,rbj->ij", border, weights)
            low = np.linalg.cholesky(schur)
        except np.linalg.LinAlgError:
            raise NotDefinite("the bound has no maximum here: its Hessian is not definite") from None
        if (np.square(low.diagonal()) < SINGULAR * corner.diagonal()).any():
            raise NotDefinite("the bound is flat along a direction: its Hessian is singular")
        root = solve_triangular(low, np.eye(len(rest)), lower=True).T if len(rest) else corner
        self._common = np.zeros((size, len(rest)))
        self._common[rest], self._common[rows] = root, -weights @ root
        self._row, self._slot = np.full(size, -1), np.zeros(size, dtype=np.intp)
        self._row[rows] = np.arange(rows.shape[0])[:, None]
        self._slot[rows] = np.arange(rows.shape[1])
        self._rows, self.plate = rows, layout.plate

    @staticmethod
    def _check(
        product: Product, size: int, layout: Layout, blocks: Vector, border: Vector, corner: Vector
    ) -> None:
        v = np.random.default_rng(0).standard_normal(size)
        wanted, found = product(v), np.zeros(size)
        inner, outer = v[layout.rows], v[layout.rest]
        found[layout.rest] = corner @ outer + np.einsum("rbj,rb->j", border, inner)
        found[layout.rows] = np.einsum("rbc,rc->rb", blocks, inner) + border @ outer
        gap = np.linalg.norm(found - wanted)
        if not gap <= AGREEMENT * np.linalg.norm(wanted):
            raise ValueError("the Hessian has entries between the rows of a plate")

    def covariance(self, where: Indices) -> Vector:
        """Block of the inverse at the coordinates `where`, (len(where), len(where))."""
        part, row, slot = self._common[where], self._row[where], self._slot[where]
        result = part @ part.T
        a, b = np.nonzero((row[:, None] == row) & (row[:, None] >= 0))
        result[a, b] += self._inverse[row[a], slot[a], slot[b]]
        return result

    def variances(self, where: Indices) -> Vector:
        """Diagonal of the inverse at the coordinates `where`."""
        result = np.square(self._common[where]).sum(1)
        local = self._row[where] >= 0
        slot = self._slot[where][local]
        result[local] += self._inverse[self._row[where][local], slot, slot]
        return result

    def row_of(self, where: Indices) -> Indices:
        """Row of each coordinate, -1 for those outside all rows."""
        return self._row[where]

    def given(self, rows: Indices, rest: Indices) -> tuple[Vector, Vector]:
        """Conditional of N(0, H^-1) at `rows` (rows, b) given `rest`: gains (rows, b, rest), covariances."""
        own, other = self._common[rows], self._common[rest]
        cross = own @ other.T
        gain = cross @ np.linalg.inv(other @ other.T)
        slot = self._slot[rows]
        blocks = self._inverse[self._row[rows][:, :1, None], slot[:, :, None], slot[:, None, :]]
        return gain, own @ own.swapaxes(1, 2) + blocks - gain @ cross.swapaxes(1, 2)

    def draws(self, num: int, where: Indices, generator: np.random.Generator) -> Vector:
        """Draws of N(0, H^-1) at the coordinates `where`, (num, len(where))."""
        result = generator.standard_normal((num, self._common.shape[1])) @ self._common.T
        if self._rows.size:
            noise = generator.standard_normal((num, *self._rows.shape))
            result[:, self._rows] += np.einsum("rcb,nrc->nrb", self._half, noise)
        return result[:, where]


class Solver:
    """The inverse of a matrix too large to assemble, by conjugate gradients, a column at a time.

    Raises:
        NotDefinite: if the smallest eigenvalue is not positive.
    """

    def __init__(self, product: Product, size: int) -> None:
        self._size = size
        self._operator = sparse_linalg.LinearOperator(
            (size, size), matvec=lambda v: product(np.ravel(v)), dtype=float
        )
        lowest = sparse_linalg.eigsh(self._operator, k=1, which="SA", tol=1e-2, return_eigenvectors=False)
        if lowest[0] <= 0:
            raise NotDefinite("the bound has no maximum here: its Hessian is not definite")

    def covariance(self, where: Indices) -> Vector:
        """As `Arrowhead.covariance`; a solve for each coordinate."""
        if len(where) > MOST_SOLVES:
            raise ValueError(
                f"{len(where):,} solves by conjugate gradients: ask for at most {MOST_SOLVES:,} scalars"
            )
        columns = [self._solve(_unit(self._size, index))[where] for index in where]
        return np.stack(columns, axis=1)

    def variances(self, where: Indices) -> Vector:
        """As `Arrowhead.variances`."""
        return np.diag(self.covariance(where)).copy()

    def _solve(self, column: Vector) -> Vector:
        solution, failed = sparse_linalg.cg(self._operator, column, rtol=1e-10, maxiter=10 * self._size)
        if failed:
            raise NotDefinite("conjugate gradients do not converge: the Hessian is close to singular")
        return solution


def _unit(size: int, where: Any) -> Vector:
    vector = np.zeros(size)
    vector[where] = 1.0
    return vector
