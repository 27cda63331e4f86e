"""E[log p] of a compiled term under a factorised Gaussian: closed forms, else quadrature over slots.

Given its conditions at quadrature nodes, a term's slots are jointly Gaussian, row by row: their
means, variances and covariances follow from the coefficients. Nodes are doubled until the value
stands still.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch import distributions as td

from .affine import AffineSlot, Dense, Local, pick, product
from .forms import BOUNDED, Form, form_of, gauss_hermite
from .moments import Moments
from .slots import POSITIVE, RATIO, RESIDUAL, Spec

FIRST_NODES = 8
MOST_NODES = {"conditions": 64, 1: 128, 2: 32, 3: 16}
MOST_POINTS = 4_000_000  # nodes times rows of one term
SETTLED = 1e-9  # change of a term, relative, on doubling its nodes


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

    @functools.cached_property
    def form(self) -> Form:
        """How its rows are integrated."""
        return form_of(self.spec, self.random_slots)

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
        if self.form.dims and self.form.dims not in MOST_NODES:
            return f"{self.form.dims} random slots together"
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
            if name not in (RATIO, *POSITIVE):
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
        rows = self.form.rows(mean, cov, self.slot_nodes)
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
            is_needed, most = self.form.dims > 0, MOST_NODES.get(self.form.dims, 0)
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
        grid = counts["condition_nodes"] ** len(self.random_conditions)
        return int(grid * self.form.points(counts["slot_nodes"]) * len(self.spec.weight))

    def _grid(self, moments: Moments) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values of the conditions by row, at nodes if they are random; and the nodes' weights."""
        index = self.conditions
        given = {name: pick(moments.centre[name], i) for name, i in index.items()}
        names = self.random_conditions
        if not names:
            return given, None
        x, w = gauss_hermite(self.condition_nodes)
        grids = torch.meshgrid([x] * len(names), indexing="ij")
        weights = functools.reduce(torch.mul, torch.meshgrid([w] * len(names), indexing="ij")).reshape(-1)
        for name, nodes in zip(names, grids, strict=True):
            sd = pick(moments.scale[name], index[name])
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
                parts = list(self._covariances(a, b, moments, given))
                cov[a, b] = (
                    functools.reduce(torch.add, parts) if parts else torch.zeros((), dtype=torch.float64)
                )
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
            factors = one.factors(first, given) + other.factors(second, given)
            yield product(self._product(a, b, name, first, second, variance), *factors)

    def _product(
        self, a: str, b: str, name: str, first: Local | Dense, second: Local | Dense, variance: Tensor
    ) -> Tensor:
        """Sum over elements of both coefficients times the variance, row by row."""
        key = a, b, name
        if isinstance(first, Dense) and isinstance(second, Dense):
            if key not in self._squares:
                self._squares[key] = first.matrix * second.matrix
            return self._squares[key] @ variance
        local = first if isinstance(first, Local) else second
        assert isinstance(local, Local)
        if key not in self._squares:
            self._squares[key] = _at(first, local.index) * _at(second, local.index)
        return self._squares[key] * pick(variance, local.index)

    @property
    def is_alone(self) -> bool:
        """True if the term depends on no latent but its own."""
        names = {k for slot in self.slots.values() for k in slot.variables}
        return self.spec.latent is not None and names & self.latents <= {self.spec.name}

    @property
    def method(self) -> str:
        """What the plan says: exact, or quadrature."""
        return "quadrature" if self.random_conditions or self.form.dims else "closed form"

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


def _at(part: Local | Dense, index: Tensor) -> Tensor:
    """Each row's coefficient of one element."""
    if isinstance(part, Dense):
        return part.matrix.gather(1, index.unsqueeze(1)).squeeze(1)
    return part.coefficient * (part.index == index)
