"""E[log p] of rows whose slots are jointly Gaussian: closed forms, row-reduced sums, or a tensor grid.

A form takes the slots' means and covariances, row by row, and the nodes of one quadrature rule;
`form_of` chooses the one with the fewest quadrature dimensions.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributions as td

from ..kl.quadrature import softplus
from .categories import LOW, ordered, picked, slopes_between, slopes_of_share
from .counts import mean_log_density
from .links import arguments, grows, is_linked
from .nodes import mean_at_nodes
from .reduced import mean_after_stirling, mean_softplus, scaled_square
from .slots import RATIO, RESIDUAL, Spec
from .softmax import POINTS, mean_log_sum
from .student import mean_normaliser, mean_tail

Mean: TypeAlias = Mapping[str, Tensor]
Cov: TypeAlias = Mapping[tuple[str, str], Tensor]
Rule: TypeAlias = tuple[Tensor, Tensor]
Vector: TypeAlias = NDArray[np.float64]

REACH = 8.0  # of the trapezoid rule, in standard deviations
FEW = 8  # nodes up to which Gauss-Hermite is always better: narrow factors need no more
ROUNDING = 1e-13  # of a variance
FEW_ODDS = 2  # of categories, that a grid is as cheap for
CHEAPER = 8  # nodes that cost what one does which derivatives are taken through
LOGIT = (td.Bernoulli, td.Binomial, td.NegativeBinomial, td.Geometric)
KINKED = (td.Laplace, dist.AsymmetricLaplace)  # smooth only where the residual is random
# Log densities that grow at most linearly in their slots: the trapezoid rule beats Gauss-Hermite.
BOUNDED = (*LOGIT, td.Categorical, dist.OrderedLogistic, td.StudentT, td.Cauchy, td.HalfCauchy)


def gauss_hermite(n: int) -> Rule:
    """Nodes and weights of N(0, 1)."""
    x, w = _hermite(n)
    return torch.as_tensor(x), torch.as_tensor(w)


def trapezoid(n: int) -> Rule:
    """Equidistant nodes with normal weights, 24 for n = 16."""
    x, w = _equidistant(n)
    return torch.as_tensor(x), torch.as_tensor(w)


@functools.cache
def _hermite(n: int) -> tuple[Vector, Vector]:
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return x, w / w.sum()


@functools.cache
def _equidistant(n: int) -> tuple[Vector, Vector]:
    x = np.linspace(-REACH, REACH, 3 * n // 2)
    w = np.exp(-(x**2) / 2)
    return x, w / w.sum()


@dataclass(frozen=True)
class Form:
    """How the rows of a term are integrated over its random slots.

    Attributes:
        dims: dimensions of its quadrature; 0 for a closed form.
        is_bounded: whether the rule is the trapezoid one.
    """

    spec: Spec
    random: tuple[str, ...]
    function: Callable[[Spec, tuple[str, ...], Mean, Cov, Rule], Tensor]
    dims: int
    is_bounded: bool

    def rows(self, mean: Mean, cov: Cov, nodes: int) -> Tensor:
        """E log p of each row."""
        return self.function(self.spec, self.random, mean, cov, self._rule(nodes))

    def _rule(self, nodes: int) -> Rule:
        return trapezoid(nodes) if self.is_bounded and nodes > FEW else gauss_hermite(nodes)

    @property
    def doubled(self) -> float:
        """How many nodes count as one: the trapezoid rule may take twice as many, beside another one half."""
        return 0.5 if self.function is _independent else 2 if self.is_bounded else 1

    @property
    def is_light(self) -> bool:
        """True if an evaluation costs next to what a product does: softplus at nodes of one dimension."""
        return self.function in (_logit, _ordered, _half_cauchy, _laplace)

    @property
    def pairs(self) -> list[tuple[str, ...]]:
        """Random slots whose covariances are needed."""
        if self.function is _independent:  # any two slots have one covariance
            return [*((name, name) for name in self.random), self.random[:2]]
        return list(itertools.combinations_with_replacement(self.random, 2))

    def size(self, nodes: int) -> int:
        """Points of the grid."""
        return int(len(self._rule(nodes)[0]) ** self.dims) * (POINTS if self.function is _independent else 1)

    def points(self, nodes: int) -> int:
        """Numbers of each row that derivatives are taken through, or as many as cost what its nodes do."""
        points = self.size(nodes)
        if self.function is _independent:
            return points // CHEAPER
        if self.function in (_categorical, _between):
            return max(1, points // 2)
        if self.function is _grid and self.dims > 1:  # by autograd, with more derivatives in more dimensions
            return 2 ** (self.dims - 1) * points
        return max(1, points // CHEAPER) if self.dims > 1 else 1  # rows come with their own derivatives


def form_of(spec: Spec, random: tuple[str, ...], is_alike: bool = False) -> Form:
    """The form of a term with these random slots; with `is_alike` all pairs of them have one covariance."""
    family, count = spec.family, len(random)
    is_other = is_linked(spec.slots)
    is_bounded = not any(map(grows, spec.slots)) if is_other else family in BOUNDED

    def form(function: Callable[..., Tensor], dims: int) -> Form:
        return Form(spec, random, function, dims, is_bounded)

    if not random:
        return form(_known, 0)
    if LOW in spec.slots:
        return form(_between, count)
    if is_other:
        is_normal = family is td.Normal
        return form(_normal_by_link, int(spec.slots[1] in random)) if is_normal else form(_grid, count)
    if family is td.Normal:
        return form(_normal, 0)
    if family in KINKED:
        return form(_laplace, int("asymmetry" in random))
    if spec.slots[0] == RATIO and family in (td.HalfNormal, td.Exponential):
        return form(_half_normal if family is td.HalfNormal else _exponential, 0)
    if spec.slots[0] == RATIO and family in (td.Gamma, dist.InverseGamma):
        return form(_gamma, int("concentration" in random))
    if spec.slots[0] == RATIO and family is td.HalfCauchy:
        return form(_half_cauchy, 1)
    if spec.latent is None and family in (td.Poisson, td.Exponential):
        return form(_rate, 0)
    if family in LOGIT and random == ("logits",):
        return form(_logit, 1)
    if family is td.NegativeBinomial:
        return form(_negative_binomial, 1)
    if family is dist.OrderedLogistic:
        return form(_ordered, 1)
    if family is td.Categorical:
        return form(_independent, 1) if is_alike else form(_categorical, count)
    if family in (td.StudentT, td.Cauchy):
        return form(_student, int(RESIDUAL in random) + int("scale" in random or "df" in random))
    return form(_grid, count)


def _of(cov: Cov, a: str, b: str) -> Tensor:
    found = cov.get((a, b), cov.get((b, a)))
    return torch.zeros((), dtype=torch.float64) if found is None else found


def root(v: Tensor) -> Tensor:
    """Square root whose gradient is finite at zero."""
    return v.clamp_min(1e-300).sqrt()


def _known(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    return spec.log_density(mean)


def _normal(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    m_r, m_l = mean[RESIDUAL], mean["scale"]
    v_r, v_l, c = (
        _of(cov, *pair) for pair in ((RESIDUAL, RESIDUAL), ("scale", "scale"), (RESIDUAL, "scale"))
    )
    square = scaled_square(v_l - m_l, m_r - 2 * c if c.dim() else m_r, v_r)
    return spec.jacobian - 0.5 * math.log(2 * math.pi) - m_l - 0.5 * square


def _laplace(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """Both sides of E |r| exp(t), t = -log scale (+ log asymmetry on the right, - on the left).

    Under the weight exp(t) the residual r is Gaussian still, its mean moved by their covariance.
    """
    zero, k = torch.zeros((), dtype=torch.float64), "asymmetry"
    m_s, m_k, v_k = mean["scale"], mean.get(k, zero), _of(cov, k, k)
    total = m_k - m_s - (mean_softplus(2 * m_k, 2 * root(v_k), *rule) if k in random else softplus(2 * m_k))
    for side in (1, -1):
        m_t = side * m_k - m_s
        v_t = v_k + _of(cov, "scale", "scale") - 2 * side * _of(cov, "scale", k)
        m = mean[RESIDUAL] + side * _of(cov, RESIDUAL, k) - _of(cov, RESIDUAL, "scale")
        total = total - 0.5 * (_distance(m, cov.get((RESIDUAL, RESIDUAL))) + side * m) * torch.exp(
            m_t + v_t / 2
        )
    return total


def _distance(m: Tensor, v: Tensor | None) -> Tensor:
    """E |r| of Gaussians."""
    if v is None:
        return m.abs()
    sd = root(v)
    return sd * math.sqrt(2 / math.pi) * torch.exp(-0.5 * (m / sd) ** 2) + m * torch.erf(
        m / (sd * math.sqrt(2))
    )


def _half_normal(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    m, v = mean[RATIO], _of(cov, RATIO, RATIO)
    return spec.jacobian + 0.5 * math.log(2 / math.pi) + m - 0.5 * torch.exp(2 * (m + v))


def _exponential(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    m, v = mean[RATIO], _of(cov, RATIO, RATIO)
    return spec.jacobian + m - torch.exp(m + v / 2)


def _half_cauchy(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    m, v = mean[RATIO], _of(cov, RATIO, RATIO)
    above = mean_softplus(2 * m, 2 * root(v), *rule)
    return spec.jacobian + math.log(2 / math.pi) + m - above


def _gamma(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """E[a r] - E log Gamma(a) - E e^r: only what Stirling leaves of log Gamma needs nodes, if a is random.

    With all of log Gamma at nodes the bound has no maximum: E[a r] sees farther than nodes do.
    """
    name = "concentration"
    m, v, m_a = mean[RATIO], _of(cov, RATIO, RATIO), mean[name]
    v_a, c = _of(cov, name, name), _of(cov, RATIO, name)
    if name in random:
        rest = mean_after_stirling(m_a, root(v_a), *rule)
        product = torch.exp(m_a + v_a / 2) * (m + c - m_a - v_a + 1)
    else:
        rest, product = torch.lgamma(m_a.exp()), m_a.exp() * m
    return spec.jacobian + product - rest - torch.exp(m + v / 2)


def _rate(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    y, m = spec.value, mean["rate"]
    assert y is not None
    exponential = torch.exp(m + _of(cov, "rate", "rate") / 2)
    if spec.family is td.Poisson:
        return y * m - exponential - torch.lgamma(y + 1)
    return m - y * exponential


def _logit(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """E log p of a family whose log density is linear in the logit and its softplus."""
    y, m, family = spec.value, mean["logits"], spec.family
    assert y is not None
    above = mean_softplus(m, root(cov["logits", "logits"]), *rule)
    if family is td.Bernoulli:
        return y * m - above
    if family is td.Geometric:
        return m - (y + 1) * above
    count = spec.argument("total_count", mean["total_count"])
    if family is td.Binomial:
        choices = torch.lgamma(count + 1) - torch.lgamma(y + 1) - torch.lgamma(count - y + 1)
        return choices + y * m - count * above
    choices = torch.lgamma(count + y) - torch.lgamma(y + 1) - torch.lgamma(count)
    return choices + y * m - (count + y) * above


def _negative_binomial(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    count, logits = (
        (mean[name], root(_of(cov, name, name)) if name in random else 0 * mean[name])
        for name in ("total_count", "logits")
    )
    assert spec.value is not None
    return mean_log_density(spec.value, count, logits, _of(cov, "total_count", "logits"), *rule)


def _ordered(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """The two ends of a category apart: each is a softplus of one Gaussian."""
    m, gap = mean["predictor"] - mean["cut"], mean["gap"]
    v = _of(cov, "predictor", "predictor") - 2 * _of(cov, "predictor", "cut") + _of(cov, "cut", "cut")
    assert spec.value is not None
    above, below = mean_softplus(m, root(v), *rule), mean_softplus(-m - gap, root(v), *rule)
    return ordered(spec.value, gap, above, below)


def _student(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """A normaliser in the degrees of freedom, and a tail in the residual and t = log scale + log df / 2."""
    m_s, m_d = mean["scale"], mean.get("df", torch.zeros((), dtype=torch.float64))
    v_d, with_r = _of(cov, "df", "df"), _of(cov, RESIDUAL, "df")
    with_t = _of(cov, "scale", "df") + v_d / 2
    means, covs = {"r": mean[RESIDUAL], "t": m_s + m_d / 2}, {}
    if RESIDUAL in random:
        covs["rr"] = cov[RESIDUAL, RESIDUAL]
    if "scale" in random or "df" in random:
        covs["tt"] = _of(cov, "scale", "scale") + _of(cov, "scale", "df") + v_d / 4
        covs["rt"] = _of(cov, RESIDUAL, "scale") + with_r / 2
    tail = mean_tail(means, covs, *rule)
    if "df" in random:
        moved = {"r": means["r"] + with_r, "t": means["t"] + with_t}
        tail = tail + torch.exp(m_d + v_d / 2) * mean_tail(moved, covs, *rule)
        normaliser = mean_normaliser(m_d, root(v_d), *rule)
    else:
        tail = tail + m_d.exp() * tail
        normaliser = mean_normaliser(m_d, torch.zeros_like(m_d), *gauss_hermite(1))
    return spec.jacobian + normaliser - 0.5 * math.log(math.pi) - m_s - 0.5 * tail


def _categorical(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """A grid over the log odds that are random."""
    assert spec.value is not None
    slopes = functools.partial(slopes_of_share, spec.value)
    return mean_at_nodes(spec.log_density, mean, _parts(random, cov), rule, slopes)


def _independent(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """Log odds of independent logits: what they share is the variance of the first."""
    zero = torch.zeros((), dtype=torch.float64)
    shared = _of(cov, *random[:2])
    means = [zero, *(mean[name] for name in spec.slots)]
    sds = [root(shared), *(root(cov[n, n] - shared) if n in random else zero for n in spec.slots)]
    every = torch.broadcast_tensors(*means, *sds)
    m, s = torch.stack(every[: len(means)]), torch.stack(every[len(means) :])
    assert spec.value is not None
    return picked(spec.value, m) - mean_log_sum(m, s, *rule)


def _between(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """A grid over the predictor and the distances of cutpoints."""
    assert spec.value is not None
    slopes = functools.partial(slopes_between, spec.value)
    return mean_at_nodes(spec.log_density, mean, _parts(random, cov), rule, slopes)


def _grid(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """A tensor grid over the random slots."""
    return mean_at_nodes(spec.log_density, mean, _parts(random, cov), rule)


def _normal_by_link(spec: Spec, random: tuple[str, ...], mean: Mean, cov: Cov, rule: Rule) -> Tensor:
    """A Normal whose scale is another function of a slot than exp: given that slot the residual is closed."""
    name = spec.slots[1]
    v_r, parts = _of(cov, RESIDUAL, RESIDUAL), {}
    if name in random:
        parts[name, 0] = root(cov[name, name])
        shared = _of(cov, RESIDUAL, name) / parts[name, 0]
        v_r = v_r - shared * shared
        if shared.dim():
            parts[RESIDUAL, 0] = shared

    def density(at: Mean) -> Tensor:
        scale = arguments({name: at[name]})["scale"]
        square = (at[RESIDUAL] ** 2 + at["variance"]) / scale**2
        return spec.jacobian - 0.5 * math.log(2 * math.pi) - scale.log() - 0.5 * square

    return mean_at_nodes(density, {**mean, "variance": v_r}, parts, rule)


def _parts(names: tuple[str, ...], cov: Cov) -> dict[tuple[str, int], Tensor]:
    """What slots have of standard normals: the Cholesky factor of their covariance, row by row."""
    lower: dict[tuple[int, int], Tensor] = {}
    for j, b in enumerate(names):
        rest = cov[b, b]
        for k in range(j):
            rest = rest - lower[j, k] ** 2
        is_free = rest > ROUNDING * cov[b, b]  # else the slot is a combination of those before
        lower[j, j] = root(torch.where(is_free, rest, 0.0))
        by = torch.where(is_free, lower[j, j], 1.0)
        for i in range(j + 1, len(names)):
            part = _of(cov, b, names[i])
            for k in range(j):
                part = part - lower[i, k] * lower[j, k]
            lower[i, j] = torch.where(is_free, part, 0.0) / by
    return {(names[i], j): part for (i, j), part in lower.items()}
