"""A smooth loss with its derivatives in scaled coordinates, and what its Hessian tells at a point."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import linalg as sparse_linalg
from torch import Tensor

from ..model.checks import SingularMatrix
from .processes import Spread

Vector: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]

DIFFERENCE = 1e-4  # step of differences of a gradient, in scaled coordinates
ACROSS = 0.3  # the same where the gradient has jumps: across so many of them that their sum is a slope
MOST_PRODUCTS = 400  # of a predicted gain
FEW_PRODUCTS, STILL = 10, 0.03  # products, and the part of the tolerance that they add to no gain worth it
NEAR, EXPLAINED = 1e-3, 1e-2  # scaled lengths to another point with the same Hessian, and what it may miss


@dataclass(frozen=True)
class Loss:
    """A smooth scalar function of a flat float64 vector.

    Attributes:
        function: the function, differentiable by autograd.
        is_twice: whether autograd's second derivatives can be believed; if not, Hessian products
            are differences of the gradient.
        has_kinks: whether its gradient is a sum of many small jumps.
        is_small: whether operations cost the same for a matrix of directions as for one, so that the
            whole Hessian costs about two of its products.
        both, product: value and gradient, and Hessian times vector, if they are known as graphs.
        is_even: whether coordinates have lengths over which the Hessian hardly changes, as means and sds of
            factors do, so that one serves at points near by.
        spread: how the vector lies over several processes, whose functions are summed.
    """

    function: Callable[[Tensor], Tensor]
    is_twice: bool = True
    has_kinks: bool = False
    is_small: bool = False
    is_even: bool = False
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    spread: Spread = field(default_factory=Spread)


class _Bent(NamedTuple):
    """A Hessian on the original scale, with the point and the gradient there."""

    point: Vector
    gradient: Vector
    hessian: Vector

    def explains(self, point: Vector, gradient: Vector, length: Vector) -> bool:
        """True if it is that of another point as well: near by, and the gradient has changed as it says."""
        step, change = point - self.point, length * (gradient - self.gradient)
        if (np.abs(step) > NEAR * length).any():
            return False
        missed = change - length * (self.hessian @ step)
        return float(np.linalg.norm(missed)) <= EXPLAINED * float(np.linalg.norm(change))


class Smooth:
    """Value, gradient and Hessian-vector products of a scalar function of a flat vector.

    The function is evaluated in coordinates x = origin + scale * a, a dimensionless; the graph
    of the last point is kept, so a Hessian-vector product reuses its forward pass. Points where
    the function is not finite, or a matrix is singular, count as +inf. Where several processes share
    the function, origin and scale are this process's, `a` and what comes back are whole.

    Where x is the log of a Gaussian's sd it is origin + log(1 + scale * a) for positive a: the sd grows
    linearly. With curvature H a Newton step in log(sd) is (1 / (H sd^2) - 1) / 2, which from an sd that is
    four times too small is seven e-folds too far; in the sd itself it doubles it.

    Args:
        loss: the function.
        origin: point about which coordinates are taken.
        scale: positive lengths of the coordinates.
        log_sds: which coordinates are logs of sds and grow so; none by default.
        is_bent: whether second derivatives are asked for, whose graph takes time and memory.

    Attributes:
        curvature: a function whose Hessian stands in for this one's, which takes longer.

    Example:
        >>> f = Smooth(Loss(lambda x: (x**2).sum()), np.zeros(2), np.ones(2))
        >>> f.value(np.array([1.0, 2.0])), f.gradient(np.array([1.0, 2.0]))
        (5.0, array([2., 4.]))
        >>> f.hessian_product(np.array([1.0, 2.0]), np.array([1.0, 0.0]))
        array([2., 0.])
    """

    def __init__(
        self,
        loss: Loss,
        origin: Vector,
        scale: Vector,
        log_sds: Flags | None = None,
        *,
        is_bent: bool = True,
    ) -> None:
        self.loss, self.spread, self.is_bent = loss, loss.spread, is_bent
        self.curvature: Smooth | None = None
        self.origin, self.scale = self.spread.whole(origin), self.spread.whole(scale)
        self.log_sds = None if log_sds is None else self.spread.whole(log_sds.astype(float)) > 0
        self._slope = self.scale
        self._bend: Vector | None = None
        self.zero = np.zeros_like(self.origin)
        self.evaluations = 0
        self.products = 0
        self._at: Vector | None = None
        self._leaf = torch.zeros(0)
        self._value = torch.zeros(())
        self._number = 0.0
        self._gradient: Tensor | None = None
        self._whole: Vector | None = None
        self._hessian: Vector | None = None
        self._bent: _Bent | None = None

    def in_units_of(self, scale: Vector, log_sds: Flags | None = None) -> "Smooth":
        """The same function about the point that it was evaluated at last, which costs no evaluation.

        This one forgets it: one graph is kept at a time.
        """
        assert self._at is not None
        if not self.is_bent:
            self._gradient_tensor()  # which frees the graph that both would need
        twin = Smooth(self.loss, self.point(self._at), scale, log_sds, is_bent=self.is_bent)
        twin._at, twin._leaf, twin._value = twin.zero, self._leaf, self._value
        twin._number, twin._gradient, twin._bent = self._number, self._gradient, self._bent
        self.forget()
        return twin

    def forget(self) -> None:
        """Let go of the last point and its graph."""
        self._at, self._value, self._gradient = None, torch.zeros(()), None

    def is_at(self, a: Vector) -> bool:
        """True if `a` is the point that it was evaluated at last."""
        return self._at is not None and np.array_equal(a, self._at)

    def point(self, a: Vector) -> Vector:
        """The point on the original scale, this process's entries of it."""
        return self._placed(a)[0]

    def _placed(self, a: Vector) -> tuple[Vector, Vector, Vector | None]:
        """The point, its derivative x', and x'' / x' unless all of it is zero."""
        step = self.scale * a
        grows = self.log_sds & (step > 0) if self.log_sds is not None else None
        if grows is None or not grows.any():
            return self.spread.own(self.origin + step), self.scale, None
        growth = np.where(grows, step, 0.0)
        slope = self.scale / (1 + growth)
        step = np.where(grows, np.log1p(growth), step)
        return self.spread.own(self.origin + step), slope, np.where(grows, -slope, 0.0)

    def value(self, a: Vector) -> float:
        """The function at `a`; +inf where it is not finite."""
        self._move(a)
        return self._number if np.isfinite(self._number) else np.inf

    def gradient(self, a: Vector) -> Vector:
        """Gradient with respect to `a`."""
        self._move(a)
        if self._whole is None:
            self._whole = self._slope * self.spread.summed(self._gradient_tensor().detach().numpy())
        return self._whole

    def plain_gradient(self, a: Vector) -> Vector:
        """Gradient at `a` in lengths of `scale`, also where a log of an sd has grown."""
        gradient = self.gradient(a)
        return gradient if self._bend is None else gradient * (self.scale / self._slope)

    def hessian_product(self, a: Vector, v: Vector) -> Vector:
        """Hessian with respect to `a`, times `v`."""
        self.products += 1
        if self.curvature is not None:
            return self.curvature.hessian_product(a, v)
        if not self.is_bent:  # asked for after all
            self.is_bent, self._at = True, None
        if not self.loss.is_twice:
            return self.difference_product(a, v, ACROSS if self.loss.has_kinks else DIFFERENCE)
        self._move(a)
        if self.loss.is_small:
            return np.asarray(self._dense_hessian(a) @ v)
        product = self._product(torch.as_tensor(self.spread.own(self._slope * v)))
        found: Vector = self._slope * self.spread.summed(product.numpy())
        return found if self._bend is None else found + self._bend * self.gradient(a) * v

    def _product(self, direction: Tensor) -> Tensor:
        if self.loss.product is not None:
            return self.loss.product(self._leaf.detach(), direction)
        gradient = self._gradient_tensor()
        if not gradient.requires_grad:
            return torch.zeros_like(direction)
        (product,) = torch.autograd.grad(  # not by grad_outputs=, whose checks load sympy
            gradient @ direction, self._leaf, retain_graph=True, materialize_grads=True
        )
        return product

    def _dense_hessian(self, a: Vector) -> Vector:
        if self._hessian is None:  # it costs two or three products, and a step takes five
            point, gradient = self._leaf.detach().numpy(), self._gradient_tensor()
            known = self._bent if self.loss.is_even else None
            if known is None or not known.explains(point, gradient.detach().numpy(), self._slope):
                known = _Bent(point, gradient.detach().numpy(), jacobian(gradient, self._leaf).numpy())
            self._bent = known
            self._hessian = self._slope[:, None] * known.hessian * self._slope
            if self._bend is not None:
                self._hessian += np.diag(self._bend * self.gradient(a))
        return self._hessian

    def hessian(self) -> Vector:
        """The Hessian at the origin, of few coordinates."""
        return np.stack([self.hessian_product(self.zero, e) for e in np.eye(self.zero.size)])

    def hessian_operator(self, a: Vector) -> Any:
        """The Hessian at `a`, for SciPy's iterative solvers."""
        return sparse_linalg.LinearOperator(
            (a.size, a.size), matvec=lambda v: self.hessian_product(a, np.ravel(v)), dtype=float
        )

    def difference_product(self, a: Vector, v: Vector, length: float = DIFFERENCE) -> Vector:
        """The Hessian product by central differences of the gradient, a scaled length from `a`."""
        step = length / max(float(np.linalg.norm(v)), 1e-300)
        twin = copy.copy(self)
        twin.evaluations = 0
        product = (twin.gradient(a + step * v) - twin.gradient(a - step * v)) / (2 * step)
        self.evaluations += twin.evaluations
        return product

    def _move(self, a: Vector) -> None:
        if self.is_at(a):
            return
        self.evaluations += 1
        point, self._slope, self._bend = self._placed(a)
        self._leaf = torch.as_tensor(point).requires_grad_()
        try:
            if self.loss.both is not None:
                self._value, self._gradient = self.loss.both(self._leaf.detach())
            else:
                self._value, self._gradient = self.loss.function(self._leaf), None
        except SingularMatrix:  # a covariance that is singular here
            self._value, self._gradient = torch.tensor(torch.inf), None
        self._number = self.spread.total(float(self._value.detach()))
        self._at, self._whole, self._hessian = np.array(a), None, None

    def _gradient_tensor(self) -> Tensor:
        if self._gradient is None and not self._value.requires_grad:
            self._gradient = torch.zeros_like(self._leaf)  # nothing here enters the function
        if self._gradient is None:
            (self._gradient,) = torch.autograd.grad(
                self._value, self._leaf, create_graph=self.is_bent, materialize_grads=True
            )
        return self._gradient


class _Seed(torch.autograd.Function):
    """Nothing, whose derivative is whatever `direction` holds when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, direction: list[Tensor]) -> Tensor:
        ctx.direction = direction
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.direction[-1], None


def jacobian(y: Tensor, x: Tensor) -> Tensor:
    """The derivative of a vector that was computed from another, all rows in one backward pass.

    As torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True), which loads sympy: a direction
    that is no argument of grad is not checked by it.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobian(x * x[0], x)
        tensor([[2., 0.],
                [2., 1.]])
    """
    if not y.requires_grad:
        return torch.zeros(len(y), len(x), dtype=x.dtype)
    direction: list[Tensor] = []
    seed: Tensor = _Seed.apply(y, direction)  # type: ignore[no-untyped-call]

    def row(unit: Tensor) -> Tensor:
        direction.append(unit)
        (found,) = torch.autograd.grad(seed, x, retain_graph=True, materialize_grads=True)
        return found

    rows: Tensor = torch.func.vmap(row)(torch.eye(len(y), dtype=y.dtype))
    return rows


def curvature_scale(loss: Loss, x: Vector, probes: int = 8) -> Vector:
    """Lengths 1 / sqrt|H_ii| of a block without a natural scale, H_ii by Hutchinson's estimator.

    Coordinates with no curvature get the largest length found, or 1.

    References:
        Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, Appl.
        Numer. Math. 57.

    Example:
        >>> curvature_scale(Loss(lambda x: 50 * x[0] ** 2 + 0.5 * x[1] ** 2), np.ones(2))
        array([0.1, 1. ])
    """
    smooth = Smooth(loss, x, np.ones_like(x))
    zero, size = smooth.zero, smooth.zero.size
    if not size:
        return np.zeros(0)
    if size <= probes:
        diagonal = smooth.hessian().diagonal()
    else:
        signs = np.random.default_rng(0).integers(0, 2, (probes, size)) * 2.0 - 1.0
        diagonal = np.mean([v * smooth.hessian_product(zero, v) for v in signs], axis=0)
    magnitude = np.abs(diagonal)
    if not np.isfinite(magnitude).all() or not magnitude.any():
        return np.ones_like(x)
    return smooth.spread.own(1.0 / np.sqrt(np.maximum(magnitude, 1e-8 * magnitude.max())))


def predicted_gain(smooth: Smooth, *, tol: float) -> float:
    """What a Newton step from the origin would gain, 1/2 g' H^-1 g, by conjugate gradients.

    Args:
        smooth: the function, about the point.
        tol: what the gain is held against: a sum that has passed it, or has come to a standstill far
            below it, is returned as it is.

    Returns:
        The predicted gain in nats, or the part of it that is more than tol; +inf if the Hessian is
        not positive along a search direction (no maximum of the bound here) or the products run out.

    Example:
        >>> predicted_gain(Smooth(Loss(lambda x: 2 * (x**2).sum()), np.ones(2), np.ones(2)), tol=10.0)
        4.0
    """
    zero = smooth.zero
    if not zero.size:
        return 0.0
    residual = -smooth.gradient(zero)
    direction = residual.copy()
    gains, square = [0.0], float(residual @ residual)
    target = 1e-8 * square if square > tol else 1e-2 * square  # far below tol a rough figure will do
    for _ in range(min(MOST_PRODUCTS, 2 * zero.size + 10)):
        is_still = len(gains) > FEW_PRODUCTS and gains[-1] - gains[-1 - FEW_PRODUCTS] < STILL * tol
        if square <= target or gains[-1] > tol or is_still:
            return gains[-1]
        product = smooth.hessian_product(zero, direction)
        curvature = float(direction @ product)
        if not curvature > 0.0:
            return float("inf")
        step = square / curvature
        gains.append(gains[-1] + 0.5 * step * square)
        residual = residual - step * product
        previous, square = square, float(residual @ residual)
        direction = residual + square / previous * direction
    return gains[-1] if square <= target or gains[-1] - gains[-2] < 0.01 * tol else float("inf")


def newton_step(loss: Loss, x: Vector, scale: Vector, gradient: Vector, max_products: int = 12) -> Vector:
    """-H^-1 g by conjugate gradients, roughly, in scaled coordinates.

    Args:
        loss: the function whose Hessian is H.
        x: the point.
        scale: lengths of the coordinates.
        gradient: g, in scaled coordinates, whole.
        max_products: most Hessian-vector products.

    Returns:
        The step, this process's entries of it.

    Example:
        >>> newton_step(Loss(lambda x: 2 * (x**2).sum()), np.ones(1), np.ones(1), np.ones(1))
        array([-0.25])
    """
    smooth = Smooth(loss, x, scale)
    hessian = smooth.hessian_operator(smooth.zero)
    step, _ = sparse_linalg.cg(hessian, -gradient, rtol=0.1, maxiter=max_products)
    return smooth.spread.own(step)
