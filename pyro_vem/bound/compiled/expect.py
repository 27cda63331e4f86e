"""E[log p] of a compiled term under a factorised Gaussian: closed forms, else quadrature over slots.

Given its conditions at quadrature nodes, a term's slots are jointly Gaussian, row by row: their
means, variances and covariances follow from the coefficients. Nodes are doubled until the value
stands still.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch import distributions as td

from .affine import AffineSlot, Dense, Local, Values
from .slots import POSITIVE, RESIDUAL, Spec
from .softplus import mean_softplus_rows

FIRST_NODES = 8
MOST_NODES = {"conditions": 64, 1: 128, 2: 32, 3: 16}
MOST_POINTS = 4_000_000  # nodes times rows of one term
SETTLED = 1e-9  # change of a term, relative, on doubling its nodes
REACH = 8.0  # of the trapezoid rule, in standard deviations
DENSITY = 3  # trapezoid nodes for each that is counted: 24 at first
# Log densities that grow at most linearly in their slots: the trapezoid rule beats Gauss-Hermite.
BOUNDED = (
    td.Bernoulli,
    td.Binomial,
    td.NegativeBinomial,
    td.Geometric,
    td.StudentT,
    td.Cauchy,
    td.HalfCauchy,
)


LOGIT = (td.Bernoulli, td.Binomial, td.NegativeBinomial, td.Geometric)


@functools.cache
def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


@functools.cache
def trapezoid(n: int) -> tuple[Tensor, Tensor]:
    """Equidistant nodes with normal weights."""
    x = np.linspace(-REACH, REACH, DENSITY * n)
    w = np.exp(-(x**2) / 2)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


@dataclass(frozen=True)
class Moments:
    """Means of all variables, and standard deviations of the latent ones, each flat by name."""

    centre: Values
    scale: Values


@dataclass(frozen=True)
class CompiledTerm:
    """One term of the bound as a function of the guide's moments and the parameters.

    Attributes:
        spec: family, rows, data.
        slots: its compiled slots by name.
        latents: names of the variables that are random.
        condition_nodes, slot_nodes: numbers of quadrature nodes.
    """

    spec: Spec
    slots: dict[str, AffineSlot]
    latents: frozenset[str]
    condition_nodes: int = FIRST_NODES
    slot_nodes: int = FIRST_NODES
    _squares: dict[tuple[str, str, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def conditions(self) -> dict[str, Tensor]:
        """Index of each conditioning variable, by row."""
        return {name: c.index for slot in self.slots.values() for name, c in slot.conditions.items()}

    @functools.cached_property
    def random_conditions(self) -> tuple[str, ...]:
        """Latent conditions: integrated on a grid."""
        return tuple(name for name in self.conditions if name in self.latents)

    @functools.cached_property
    def random_slots(self) -> tuple[str, ...]:
        """Slots that are random given the conditions."""
        given = set(self.conditions)
        return tuple(
            name
            for name, slot in self.slots.items()
            if any(k in self.latents and k not in given for k in (*slot.locals, *slot.denses))
        )

    def problem(self) -> str | None:
        """Why the term cannot be integrated, or None."""
        for slot in self.slots.values():
            for name, index in self.conditions.items():
                if name in slot.denses:
                    return f"{name} is conditioned on and summed over"
                if name in slot.locals:
                    live = slot.locals[name].coefficient != 0
                    if not torch.equal(slot.locals[name].index[live], index[live]):
                        return f"rows see {name} at two elements"
        grown = self._doubly_exponential()
        if grown is not None:
            return f"the exponential of an exponential of {grown} has no finite expectation"
        count = 0 if self._is_closed() else len(self.random_slots)
        if count not in MOST_NODES and count:
            return f"{count} random slots together"
        if self.spec.family is td.Laplace and self.random_slots not in ((), (RESIDUAL,)):
            return "a Laplace density with a random scale is not smooth"
        return None

    def _doubly_exponential(self) -> str | None:
        """A Gaussian condition whose exponential sits in the exponent of the density, or None.

        Nodes would settle on a finite value where there is none.
        """
        family = self.spec.family
        if family in BOUNDED:
            return None
        for kind, name in ((td.Gumbel, "scale"), (td.Weibull, "concentration")):
            if family is kind and name in self.random_slots:
                return f"its {name}"
        for name, slot in self.slots.items():
            if name not in POSITIVE:
                continue
            for c in self.random_conditions:
                parts: list[Local | Dense] = [*slot.locals.values(), *slot.denses.values()]
                rates = [part.rate[c] for part in parts if c in part.rate]
                rates += [slot.conditions[c].rate] if c in slot.conditions else []
                slopes = [part.slope[c] for part in parts if c in part.slope]
                if any(bool((values != 0).any()) for values in (*rates, *slopes)):
                    return c
        return None

    def expectation(self, moments: Moments) -> Tensor:
        """Sum over rows of weight * E[log p], in nats."""
        given, weights = self._grid(moments)
        mean, cov = self._slot_moments(moments, given)
        rows = self._integrate(mean, cov)
        if weights is not None:
            rows = (weights.unsqueeze(-1) * rows).sum(0)
        return (self.spec.weight * rows).sum()

    def refined(self, moments: Moments) -> "CompiledTerm | str":
        """The term with enough nodes at these moments; or why there are not enough."""
        with torch.no_grad():
            term = self
            for what in ("condition_nodes", "slot_nodes"):
                grown = term._doubled(moments, what)
                if isinstance(grown, str):
                    return grown
                term = grown
            return term

    def _doubled(self, moments: Moments, what: str) -> "CompiledTerm | str":
        if what == "condition_nodes":
            is_needed, most = bool(self.random_conditions), MOST_NODES["conditions"]
        else:
            count = 0 if self._is_closed() else len(self.random_slots)
            is_needed, most = count > 0, MOST_NODES.get(count, 0)
        if not is_needed:
            return self
        term, value = self, float(self.expectation(moments))
        while True:
            n = getattr(term, what)
            if n >= most or self._points(what, 2 * n) > MOST_POINTS:
                return f"{n} quadrature nodes are not enough: the expectation is rough, or infinite"
            finer = replace(term, **{what: 2 * n})
            now = float(finer.expectation(moments))
            if abs(now - value) <= SETTLED * (1 + abs(now)):
                return term
            term, value = finer, now

    def _points(self, what: str, nodes: int) -> int:
        """Evaluations of the density if one kind of nodes is changed."""
        counts = {"condition_nodes": self.condition_nodes, "slot_nodes": self.slot_nodes, what: nodes}
        slots = 0 if self._is_closed() else len(self.random_slots)
        each = counts["slot_nodes"] * (DENSITY if self.spec.family in BOUNDED else 1)
        grid = counts["condition_nodes"] ** len(self.random_conditions) * each**slots
        return int(grid * len(self.spec.weight))

    def _grid(self, moments: Moments) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values of the conditions by row, at nodes if they are random; and the nodes' weights."""
        index = self.conditions
        given = {name: moments.centre[name][i] for name, i in index.items()}
        names = self.random_conditions
        if not names:
            return given, None
        x, w = gauss_hermite(self.condition_nodes)
        grids = torch.meshgrid([x] * len(names), indexing="ij")
        weights = functools.reduce(torch.mul, torch.meshgrid([w] * len(names), indexing="ij")).reshape(-1)
        for name, nodes in zip(names, grids, strict=True):
            sd = moments.scale[name][index[name]]
            given[name] = given[name] + nodes.reshape(-1, 1) * sd
        return given, weights

    def _slot_moments(
        self, moments: Moments, given: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
        mean = {name: slot.mean(given, moments.centre) for name, slot in self.slots.items()}
        random = self.random_slots
        cov = {}
        for i, a in enumerate(random):
            for b in random[i:]:
                total: Tensor | float = 0.0
                for part in self._covariances(a, b, moments, given):
                    total = total + part
                cov[a, b] = torch.as_tensor(total, dtype=torch.float64)
        return mean, cov

    def _covariances(self, a: str, b: str, moments: Moments, given: dict[str, Tensor]) -> Iterator[Tensor]:
        one, other = self.slots[a], self.slots[b]
        for name in (*one.locals, *one.denses):
            if name not in self.latents or name in given:
                continue
            first, second = _part(one, name), _part(other, name)
            if first is None or second is None:
                continue
            variance = moments.scale[name] ** 2
            factor = one.factor(first, given) * other.factor(second, given)
            yield factor * self._product(a, b, name, first, second, variance)

    def _product(
        self, a: str, b: str, name: str, first: Local | Dense, second: Local | Dense, variance: Tensor
    ) -> Tensor:
        """Sum over elements of both coefficients times the variance, row by row."""
        if isinstance(first, Local) and isinstance(second, Local):
            together = first.coefficient * second.coefficient * (first.index == second.index)
            return together * variance[first.index]
        if isinstance(first, Dense) and isinstance(second, Dense):
            if (a, b, name) not in self._squares:
                self._squares[a, b, name] = first.matrix * second.matrix
            return self._squares[a, b, name] @ variance
        dense, local = (first, second) if isinstance(first, Dense) else (second, first)
        assert isinstance(dense, Dense)
        assert isinstance(local, Local)
        picked = dense.matrix.gather(1, local.index.unsqueeze(1)).squeeze(1)
        return picked * local.coefficient * variance[local.index]

    def _is_closed(self) -> bool:
        family, random = self.spec.family, self.random_slots
        if not random or family is td.Normal:
            return True
        if family is td.Laplace:
            return random == (RESIDUAL,)
        is_data = self.spec.latent is None
        return (is_data and family in (td.Poisson, td.Exponential)) or (
            is_data and family is td.Gamma and random == ("rate",)
        )

    def _integrate(self, mean: dict[str, Tensor], cov: dict[tuple[str, str], Tensor]) -> Tensor:
        random = self.random_slots
        if not random:
            return self.spec.log_density(mean)
        if self._is_closed():
            return self._closed(mean, cov)
        rule = trapezoid if self.spec.family in BOUNDED else gauss_hermite
        x, w = rule(self.slot_nodes)
        if self.spec.family in LOGIT and random == ("logits",):
            return self._logit(mean, mean_softplus_rows(mean["logits"], _root(cov["logits", "logits"]), x, w))
        lower = self._factor(cov)
        dims = max(t.dim() for t in (*mean.values(), *cov.values()))
        eta, weights = dict(mean), torch.ones((), dtype=torch.float64)
        for i, name in enumerate(random):
            for j in range(i + 1):  # one leading dimension of nodes for each random slot
                nodes = x.reshape(*(-1 if k == j else 1 for k in range(len(random))), *(1,) * dims)
                eta[name] = eta[name] + nodes * lower[i, j]
            shape = [-1 if k == i else 1 for k in range(len(random))] + [1] * dims
            weights = weights * w.reshape(shape)
        return (weights * self.spec.log_density(_aligned(eta))).sum(tuple(range(len(random))))

    def _logit(self, mean: dict[str, Tensor], above: Tensor) -> Tensor:
        """E log p of a family whose log density is linear in the logit and its softplus."""
        y, m, family = self.spec.value, mean["logits"], self.spec.family
        assert y is not None
        if family is td.Bernoulli:
            return y * m - above
        if family is td.Geometric:
            return m - (y + 1) * above
        count = self.spec.argument("total_count", mean["total_count"])
        if family is td.Binomial:
            choices = torch.lgamma(count + 1) - torch.lgamma(y + 1) - torch.lgamma(count - y + 1)
            return choices + y * m - count * above
        choices = torch.lgamma(count + y) - torch.lgamma(y + 1) - torch.lgamma(count)
        return choices + y * m - (count + y) * above

    def _factor(self, cov: dict[tuple[str, str], Tensor]) -> dict[tuple[int, int], Tensor]:
        """Cholesky factor of the slots' covariance, row by row."""
        names = self.random_slots
        lower: dict[tuple[int, int], Tensor] = {}
        for j, b in enumerate(names):
            rest: Tensor = cov[b, b]
            for k in range(j):
                rest = rest - lower[j, k] ** 2
            lower[j, j] = _root(rest)
            for i in range(j + 1, len(names)):
                part: Tensor = cov[b, names[i]]
                for k in range(j):
                    part = part - lower[i, k] * lower[j, k]
                lower[i, j] = part / lower[j, j]
        return lower

    def _closed(self, mean: dict[str, Tensor], cov: dict[tuple[str, str], Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        family, y = self.spec.family, self.spec.value
        if family is td.Normal:
            m_r, m_l = mean[RESIDUAL], mean["scale"]
            v_r, v_l = cov.get((RESIDUAL, RESIDUAL), zero), cov.get(("scale", "scale"), zero)
            c = cov.get((RESIDUAL, "scale"), zero)
            square = torch.exp(2 * v_l - 2 * m_l) * ((m_r - 2 * c) ** 2 + v_r)
            return -0.5 * math.log(2 * math.pi) - m_l - 0.5 * square
        if family is td.Laplace:
            m, v, log_b = mean[RESIDUAL], cov[RESIDUAL, RESIDUAL], mean["scale"]
            sd = _root(v)
            distance = sd * math.sqrt(2 / math.pi) * torch.exp(-0.5 * (m / sd) ** 2)
            distance = distance + m * torch.erf(m / (sd * math.sqrt(2)))
            return -math.log(2) - log_b - distance * torch.exp(-log_b)
        assert y is not None
        m, v = mean["rate"], cov["rate", "rate"]
        exponential = torch.exp(m + v / 2)
        if family is td.Poisson:
            return y * m - exponential - torch.lgamma(y + 1)
        if family is td.Exponential:
            return m - y * exponential
        log_shape = mean["concentration"]
        shape = log_shape.exp()
        return shape * m - torch.lgamma(shape) + (shape - 1) * y.log() - y * exponential

    @property
    def is_alone(self) -> bool:
        """True if the term depends on no latent but its own."""
        names = {k for slot in self.slots.values() for k in slot.variables}
        return self.spec.latent is not None and names & self.latents <= {self.spec.name}

    @property
    def method(self) -> str:
        """What the plan says: exact, or quadrature."""
        is_grid = bool(self.random_conditions) or not self._is_closed()
        return "quadrature" if is_grid else "closed form"

    @property
    def proof(self) -> str:
        """How the term depends on the variables, for the plan."""
        names = list(dict.fromkeys(k for slot in self.slots.values() for k in slot.variables))
        free = [k.removeprefix("$") for k in names if k not in self.conditions]
        held = [k.removeprefix("$") for k in self.conditions]
        if not free:
            return f"a function of {', '.join(held)}" if held else "a constant"
        given = f" given {', '.join(held)}" if held else ""
        return f"affine in {', '.join(free)}{given}, checked against the model"


def _part(slot: AffineSlot, name: str) -> Local | Dense | None:
    return slot.locals.get(name) or slot.denses.get(name)


def _root(v: Tensor) -> Tensor:
    return v.clamp_min(1e-300 if v.dtype == torch.float64 else 1e-30).sqrt()


def _aligned(eta: dict[str, Tensor]) -> dict[str, Tensor]:
    """All slots in one shape, so that a density may be rebuilt from them."""
    names = list(eta)
    return dict(zip(names, torch.broadcast_tensors(*eta.values()), strict=True))
