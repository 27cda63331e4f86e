"""The linear part of all compiled terms: two sparse maps, from means and from variances to rows.

Everything that a term's rows need is linear in the means of the variables or in the variances of
the latents. One product with each map serves the whole model, and its adjoint is the backward pass,
so that the cost of autograd does not grow with the number of sites.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

FEW = 1_000  # numbers whose sum needs no care
# Entries of a map that is one matrix: a product costs less than going to SciPy, and so few that the
# Hessian in all directions at once costs less than a step's products (the same from 30,000 on).
SMALL = 25_000
MOST_LIVE = 0.5  # of a block's columns, for which the others are left out
_is_traced: ContextVar[bool] = ContextVar("_is_traced", default=False)


@contextmanager
def as_operations() -> Iterator[None]:
    """Within it the maps are made of torch's operations, so that a tracer sees them."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


@dataclass(frozen=True)
class Input:
    """Rows that are linear in the flat vector of means, or of variances.

    Attributes:
        rows: how many; 1 where all rows of the term share one value.
        of_variance: whether the vector is that of variances.
        locals: variable, its element for each row, and its coefficient.
        denses: variable, and a matrix with a column for each of its elements.
    """

    rows: int
    of_variance: bool
    locals: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    denses: list[tuple[str, Tensor]] = field(default_factory=list)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of weights * values; of few by one operation, which adds one after the other.

    Example:
        >>> weighted_sum(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor(11.)
    """
    if len(weights) <= FEW and values.shape == weights.shape:
        return torch.dot(weights, values)
    return (weights * values).sum()


def _live(matrix: Tensor, first: int) -> tuple[slice | Tensor, Tensor]:
    """The columns of a matrix that are not zero, and where they are; all of them unless most are."""
    live = (matrix != 0).any(0).nonzero().flatten()
    if len(live) > MOST_LIVE * matrix.shape[1]:
        return slice(first, first + matrix.shape[1]), matrix
    return first + live, matrix[:, live]


class Linear:
    """x -> sparse @ x + dense blocks, differentiable as often as needed.

    Args:
        size: length of x.
        inputs: rows, one after the other.
        starts: where each variable begins in x; names with a ``*`` stand for the whole of x.
    """

    def __init__(self, size: int, inputs: Sequence[Input], starts: dict[str, int]) -> None:
        rows, columns, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        self._denses: list[tuple[slice, slice | Tensor, Tensor]] = []
        self.lengths = [entry.rows for entry in inputs]
        start = 0
        for entry in inputs:
            here = np.arange(start, start + entry.rows)
            for name, index, coefficient in entry.locals:
                live = coefficient.numpy() != 0
                rows.append(here[live])
                columns.append(index.numpy()[live] + starts.get(name, 0))
                values.append(coefficient.numpy()[live])
            for name, matrix in entry.denses:
                span = slice(start, start + entry.rows)
                self._denses.append((span, *_live(matrix, starts[name])))
            start += entry.rows
        self._entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
        self._shape = start, size
        self._matrix = self._as_matrix() if start * size <= SMALL else None

    @functools.cached_property
    def _sparse(self) -> Any:
        return sparse.csr_matrix(self._entries, shape=self._shape)

    @functools.cached_property
    def _transposed(self) -> Any:
        return self._sparse.T

    @property
    def is_matrix(self) -> bool:
        """True if the map has few entries."""
        return self._matrix is not None

    def _as_matrix(self) -> Tensor:
        """The whole map, dense blocks and all."""
        whole = np.zeros(self._shape)
        np.add.at(whole, self._entries[1], self._entries[0])
        matrix = torch.from_numpy(whole).to(torch.get_default_device())
        for rows, columns, block in self._denses:
            matrix[rows, columns] += block
        return matrix

    def __call__(self, x: Tensor) -> Tensor:
        """The rows at x."""
        if self._matrix is not None:
            return torch.mv(self._matrix, x)
        if _is_traced.get() or x.device.type != "cpu":
            return self._operations(x)
        result: Tensor = _Map.apply(x, self, False)  # type: ignore[no-untyped-call]
        return result

    def _operations(self, x: Tensor) -> Tensor:
        """The rows at x by operations of torch alone."""
        rows, columns, coefficients = self._triplets
        parts = coefficients * x.index_select(0, columns)
        result = torch.zeros(self._shape[0], dtype=x.dtype).index_add(0, rows, parts)
        for span, where, matrix in self._denses:
            before, after = span.start, self._shape[0] - span.stop
            result = result + torch.nn.functional.pad(matrix @ x[where], (before, after))
        return result

    @functools.cached_property
    def _triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and coefficients, on the device of the fit."""
        found = self._sparse.tocoo()
        rows, columns = (torch.as_tensor(index).long() for index in (found.row, found.col))
        return rows, columns, torch.as_tensor(found.data)

    def apply(self, x: Tensor) -> Tensor:
        """The rows at x, without a graph, on the processor."""
        result = torch.from_numpy(self._sparse @ x.numpy())
        for rows, columns, matrix in self._denses:
            result[rows] += matrix @ x[columns]
        return result

    def adjoint(self, r: Tensor) -> Tensor:
        """The transposed map, without a graph."""
        result = torch.from_numpy(self._transposed @ r.numpy())
        for rows, columns, matrix in self._denses:
            result[columns] += r[rows] @ matrix
        return result


class _Map(torch.autograd.Function):
    """A linear map or its adjoint: each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, is_adjoint: bool) -> Tensor:
        ctx.linear, ctx.is_adjoint = linear, is_adjoint
        return (linear.adjoint if is_adjoint else linear.apply)(x.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Map.apply(grad, ctx.linear, not ctx.is_adjoint), None, None  # type: ignore[no-untyped-call]
