"""Row functions that bring their own first and second derivatives, reduced to rows beforehand.

A Hessian-vector product then costs a few products of rows: it pays neither for quadrature nodes
nor for the graph of the formula.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kl.quadrature import softplus

MOST_AT_NODES = 1 << 19  # numbers: rows times nodes, of which few operations keep any
STIRLING = math.log(10.0)  # of a, from where the series for log Gamma(a) is exact to 1e-13
SERIES = {1: 1 / 12, 3: -1 / 360, 5: 1 / 1260, 7: -1 / 1680, 9: 1 / 1188}  # of it, in powers of 1 / a


class Rows(NamedTuple):
    """A function of some inputs, row by row, at one point.

    Attributes:
        value: the function.
        slopes: its derivative in each input.
        bends: second derivatives by pair of inputs, the smaller number first; absent ones are zero.
    """

    value: Tensor
    slopes: tuple[Tensor, ...]
    bends: dict[tuple[int, int], Tensor]


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Rows, *inputs: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(*inputs)
        return rows.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.rows.slopes
        if torch.is_grad_enabled():  # they are differentiated again; not so under vmap, which refuses `apply`
            slopes = _Slopes.apply(ctx.rows, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *(grad * slope for slope in slopes)


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Rows, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        return tuple(slope.clone() for slope in rows.slopes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(grads)
        for (i, j), bend in ctx.rows.bends.items():
            for here, other in {(i, j), (j, i)}:
                part = grads[other] * bend
                before = result[here]
                result[here] = part if before is None else before + part
        return None, *result


def reduced(rows: Rows, *inputs: Tensor) -> Tensor:
    """The function with its derivatives attached to `inputs`; all of one shape.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> with torch.no_grad():
        ...     cube = Rows(x**3, (3 * x**2,), {(0, 0): 6 * x})
        >>> (slope,) = torch.autograd.grad(reduced(cube, x).sum(), x, create_graph=True)
        >>> slope.detach(), torch.autograd.grad(slope.sum(), x)[0]
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    value: Tensor = _Value.apply(rows, *inputs)  # type: ignore[no-untyped-call]
    return value


class Square(NamedTuple):
    """A function of inputs that all depend on each other, row by row, at one point.

    Attributes:
        value: the function, (rows,).
        slopes: its derivatives, (inputs, rows).
        bends: second derivatives, (inputs, inputs, rows).
    """

    value: Tensor
    slopes: Tensor
    bends: Tensor


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, square: Square, inputs: Tensor) -> Tensor:
        ctx.square = square
        ctx.save_for_backward(inputs)
        return square.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        slopes = ctx.square.slopes
        if torch.is_grad_enabled():  # as in `_Value`
            slopes = _WholeSlopes.apply(ctx.square, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, grad * slopes


class _WholeSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, square: Square, inputs: Tensor) -> Tensor:
        ctx.square = square
        return square.slopes.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        first, *others = zip(ctx.square.bends.unbind(1), grad, strict=True)
        result = first[0] * first[1]
        for bend, part in others:  # in place: no table of them all
            result.add_(bend * part)  # vmap has no rule for addcmul_
        return None, result


def reduced_together(square: Square, inputs: Tensor) -> Tensor:
    """As `reduced`, of inputs in one tensor, (inputs, rows)."""
    value: Tensor = _Whole.apply(square, inputs)  # type: ignore[no-untyped-call]
    return value


def mean_of(
    function: Callable[..., Tensor],
    derivatives: Callable[..., tuple[Tensor, Tensor]],
    m: Tensor,
    s: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *data: Tensor,
) -> Tensor:
    """E f(m + s x), x ~ N(0, 1), by quadrature, from f and its first two derivatives.

    Both take numbers at the nodes, and what data there are of each row.
    So many rows at a time as keep the numbers at all nodes few: only rows are left of them.
    """
    m, s = torch.broadcast_tensors(m, s)
    is_value = not (m.requires_grad or s.requires_grad)
    with torch.no_grad():
        x, weighted = nodes.unsqueeze(1), weights * nodes
        powers = torch.stack([weights] if is_value else [weights, weighted, weighted * nodes])

        def at(m: Tensor, s: Tensor, *data: Tensor) -> Tensor:
            eta = m + x * s
            if is_value:
                return powers @ function(eta, *data)
            slope, bend = derivatives(eta, *data)
            return torch.cat([powers[:1] @ function(eta, *data), powers[:2] @ slope, powers @ bend])

        few = max(1, MOST_AT_NODES // len(nodes))
        rows_of = [part.reshape(-1) for part in (m, s, *(d.expand_as(m) for d in data))]
        if m.numel() <= few:
            found = at(*rows_of)
        else:
            parts = [at(*part) for part in zip(*(row.split(few) for row in rows_of), strict=True)]
            found = torch.cat(parts, -1)
        if is_value:
            return found.reshape(m.shape)
        value, by_m, by_s, mm, ms, ss = found.reshape(6, *m.shape)
        rows = Rows(value, (by_m, by_s), {(0, 0): mm, (0, 1): ms, (1, 1): ss})
    return reduced(rows, m, s)


def mean_softplus(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E softplus(m + s x), x ~ N(0, 1), by quadrature; twice differentiable in m and s.

    Args:
        m: means, any shape.
        s: standard deviations, broadcastable with m.
        nodes: of the quadrature, one-dimensional.
        weights: of the nodes.

    Example:
        >>> m = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> x, w = torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
        >>> value = mean_softplus(m, torch.ones_like(m), x, w)
        >>> round(float(torch.autograd.grad(value.sum(), m)[0]), 6)  # mean of sigmoid(-1), sigmoid(1)
        0.5
    """

    def derivatives(eta: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.sigmoid(eta)
        return slope, slope * (1 - slope)

    return mean_of(softplus, derivatives, m, s, nodes, weights)


def mean_after_stirling(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E r(m + s x) by quadrature, r(t) = log Gamma(a) - a log a + a at a = exp(t); arguments as above.

    r lies between linear functions of t, so that few nodes do.

    References:
        Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 6.1.41.

    Example:
        >>> t, one = torch.tensor([-800.0, 0.0, 800.0]).double(), torch.ones(1).double()
        >>> mean_after_stirling(t, torch.zeros(()).double(), 0 * one, one)
        tensor([ 800.0000,    1.0000, -399.0811], dtype=torch.float64)
    """
    return mean_of(after_stirling, slopes_after_stirling, m, s, nodes, weights)


def after_stirling(t: Tensor) -> Tensor:
    """What Stirling leaves: log Gamma(a) - a log a + a at a = exp(t)."""
    low, high = t.clamp(max=STIRLING), t.clamp(min=STIRLING)
    a, u = low.exp(), torch.exp(-high)
    below = torch.lgamma(1 + a) - low - a * low + a
    above = 0.5 * math.log(2 * math.pi) - high / 2 + sum(c * u**k for k, c in SERIES.items())
    return torch.where(t < STIRLING, below, above)


def slopes_after_stirling(t: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of `after_stirling`."""
    low, u = t.clamp(max=STIRLING), torch.exp(-t.clamp(min=STIRLING))
    a = low.exp()
    slope = a * (torch.digamma(1 + a) - low)
    bend = slope + a * (a * torch.special.polygamma(1, 1 + a) - 1)
    slope_above = -0.5 - sum(k * c * u**k for k, c in SERIES.items())
    bend_above = sum(k * k * c * u**k for k, c in SERIES.items())
    is_low = t < STIRLING
    return torch.where(is_low, slope - 1, slope_above), torch.where(is_low, bend, bend_above)


def scaled_square(t: Tensor, d: Tensor, v: Tensor) -> Tensor:
    """exp(2 t) (d^2 + v): what the residual of a Normal costs; twice differentiable."""
    if not t.requires_grad:
        return torch.exp(2 * t) * (d * d + v)
    t, d, v = torch.broadcast_tensors(t, d, v)
    with torch.no_grad():
        precision = torch.exp(2 * t)
        value = precision * (d * d + v)
        by_d = 2 * precision * d
        bends = {
            (0, 0): 4 * value, (0, 1): 2 * by_d, (0, 2): 2 * precision, (1, 1): 2 * precision,
        }  # fmt: skip
        rows = Rows(value, (2 * value, by_d, precision), bends)
    return reduced(rows, t, d, v)
