"""E softplus(m + s x), x ~ N(0, 1), row by row, with derivatives that do not pay for the nodes."""

from typing import Any

import torch
from torch import Tensor


class _MeanSoftplus(torch.autograd.Function):
    """The forward pass reduces everything that both derivatives need to rows."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
        shape = (-1,) + (1,) * m.dim()
        x, w = nodes.reshape(shape), weights.reshape(shape)
        eta = m + x * s
        slope = torch.sigmoid(eta)
        bend = slope * (1 - slope)
        rows = [
            (w * part).sum(0)
            for part in (torch.nn.functional.softplus(eta), slope, x * slope, bend, x * bend, x * x * bend)
        ]
        ctx.save_for_backward(m, s, *rows[1:])
        return rows[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_m, by_s = _Slopes.apply(*ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grad * by_m, grad * by_s, None, None


class _Slopes(torch.autograd.Function):
    """E softplus' and E x softplus', given as rows together with their own derivatives."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, s: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*rows[2:])
        return rows[0].clone(), rows[1].clone()

    @staticmethod
    def backward(ctx: Any, g_m: Tensor, g_s: Tensor) -> tuple[Tensor | None, ...]:
        bend, mixed, square = ctx.saved_tensors
        return g_m * bend + g_s * mixed, g_m * mixed + g_s * square, None, None, None, None, None


def mean_softplus_rows(m: Tensor, s: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
    """E softplus(m + s x) by quadrature; twice differentiable in m and s.

    Args:
        m: means, any shape.
        s: standard deviations, broadcastable with m.
        nodes: of the quadrature, one-dimensional.
        weights: of the nodes.

    Example:
        >>> m = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> x, w = torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
        >>> value = mean_softplus_rows(m, torch.ones_like(m), x, w)
        >>> round(float(torch.autograd.grad(value.sum(), m)[0]), 6)  # mean of sigmoid(-1), sigmoid(1)
        0.5
    """
    m, s = torch.broadcast_tensors(m, s)
    value: Tensor = _MeanSoftplus.apply(m, s, nodes, weights)  # type: ignore[no-untyped-call]
    return value
