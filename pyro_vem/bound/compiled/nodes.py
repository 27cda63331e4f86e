"""Expectations of any function of a few Gaussians at the nodes of a grid, with derivatives of their own.

Nodes see the function's first and second derivatives once a point, by autograd; what is left of them are
rows, so that a Hessian product costs what it does for a closed form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .reduced import MOST_AT_NODES, Rows, reduced

Numbers: TypeAlias = Mapping[str, Tensor]
Bends: TypeAlias = Mapping[tuple[int, int], Tensor | None]
Derivatives: TypeAlias = Callable[[Numbers, Sequence[str]], tuple[Sequence[Tensor], Bends, Tensor]]
Place: TypeAlias = tuple[int, int]
"""An input: of which number, and 0 for its mean or 1 + j for its part in the j-th standard normal."""


def mean_at_nodes(
    function: Callable[[Numbers], Tensor],
    mean: Numbers,
    parts: Mapping[tuple[str, int], Tensor],
    rule: tuple[Tensor, Tensor],
    derivatives: Derivatives | None = None,
) -> Tensor:
    """E f by a tensor grid over the numbers that are random; twice differentiable in all moments.

    Args:
        function: from numbers by name to values, element by element.
        mean: means by name, any shapes.
        parts: what numbers have of each standard normal, by name and dimension of the grid; as a rule a
            Cholesky factor of their covariance.
        rule: nodes and weights of N(0, 1) in each dimension.
        derivatives: first and second derivatives in numbers of these names, and values; by autograd if there
            are none.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> rule = one.new_tensor([-1.0, 1.0]), one.new_tensor([0.5, 0.5])
        >>> mean = {"a": one, "b": 3 * one}
        >>> mean_at_nodes(lambda at: at["a"] ** 2 * at["b"], mean, {("a", 0): one}, rule)
        tensor([6.], dtype=torch.float64)
    """
    random = {name for name, _ in parts}
    names = [name for name in mean if name in random or mean[name].requires_grad]
    places = [(names.index(name), 0) for name in names]
    places += [(names.index(name), 1 + j) for name, j in parts]
    given = [*(mean[name] for name in names), *parts.values()]
    rest = (mean[name] for name in mean if name not in names)
    every = torch.broadcast_tensors(*given, *rest)
    inputs = every[: len(given)]
    dimensions = max((1 + j for _, j in parts), default=0)
    is_value = not any(value.requires_grad for value in inputs)
    sums: dict[Any, Tensor] = {}
    with torch.no_grad():
        few = max(1, MOST_AT_NODES // every[0].numel())
        for noise, weights in zip(*(p.split(few) for p in tensor_grid(rule, dimensions)), strict=True):
            monomials = torch.cat([torch.ones_like(weights).unsqueeze(0), noise.T])
            at = {name: value for name, value in mean.items() if name not in names}
            for i, name in enumerate(names):
                mine = [(k, j) for k, (of, j) in enumerate(places) if of == i]
                column = monomials[[j for _, j in mine]].T.reshape(-1, len(mine), *(1,) * every[0].dim())
                at[name] = (column * torch.stack([inputs[k] for k, _ in mine])).sum(1)
            found: tuple[Sequence[Tensor], Bends, Tensor]
            if is_value:
                found = [], {}, function(at)
            else:
                found = derivatives(at, names) if derivatives else _derivatives(function, at, names)
            for key, part in _sums(*found, weights, monomials, every[0].shape).items():
                sums[key] = sums[key] + part if key in sums else part
    if is_value:
        return sums[()][0]
    bends = {
        (a, b): sums[min(i, k), max(i, k)][j * (1 + dimensions) + m]
        for a, (i, j) in enumerate(places)
        for b, (k, m) in enumerate(places[a:], a)
        if (min(i, k), max(i, k)) in sums
    }
    rows = Rows(sums[()][0], tuple(sums[i,][j] for i, j in places), bends)
    return reduced(rows, *inputs)


def tensor_grid(rule: tuple[Tensor, Tensor], dimensions: int) -> tuple[Tensor, Tensor]:
    """Nodes (points, dimensions) and weights (points,) of N(0, I), a rule of N(0, 1) each way."""
    if not dimensions:
        return rule[0].new_zeros(1, 0), rule[1].new_ones(1)
    points, weights = (torch.cartesian_prod(*[part] * dimensions) for part in rule)
    return points.reshape(-1, dimensions), weights.reshape(-1, dimensions).prod(-1)


def _sums(
    slopes: Sequence[Tensor],
    bends: Bends,
    value: Tensor,
    weights: Tensor,
    monomials: Tensor,
    shape: Sequence[int],
) -> dict[tuple[int, ...], Tensor]:
    """Sums over nodes of a function and its derivatives, times monomials in the noise."""
    powers = weights * monomials

    def summed(values: Tensor, powers: Tensor) -> Tensor:
        flat = values.expand(len(weights), *shape).reshape(len(weights), -1)
        return (powers @ flat).reshape(-1, *shape)

    squares = (powers.unsqueeze(1) * monomials).flatten(0, 1)
    found: dict[tuple[int, ...], Tensor] = {(): summed(value, powers[:1])}
    found |= {(i,): summed(slope, powers) for i, slope in enumerate(slopes)}
    return found | {key: summed(bend, squares) for key, bend in bends.items() if bend is not None}


def _derivatives(
    function: Callable[[Numbers], Tensor], at: Numbers, names: Sequence[str]
) -> tuple[Sequence[Tensor], Bends, Tensor]:
    """First and second derivatives of an elementwise function, and its values; None for what is zero."""
    leaves = [at[name].detach().requires_grad_() for name in names]
    with torch.enable_grad():
        value = function({**at, **dict(zip(names, leaves, strict=True))})
        slopes = torch.autograd.grad(value.sum(), leaves, create_graph=True, materialize_grads=True)
        bends: dict[tuple[int, int], Tensor | None] = {}
        for i, slope in enumerate(slopes):
            found: Sequence[Tensor | None] = [None] * (len(leaves) - i)
            if slope.requires_grad:
                found = torch.autograd.grad(slope.sum(), leaves[i:], retain_graph=True, allow_unused=True)
            bends |= {(i, i + k): bend for k, bend in enumerate(found)}
    return [slope.detach() for slope in slopes], bends, value.detach()
