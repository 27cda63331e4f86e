"""E[log p] of a compiled term under a factorised Gaussian: closed forms, else quadrature over slots.

Given its conditions, a term's slots are jointly Gaussian, row by row. What their means, variances
and covariances need of the guide is linear in its means and variances: the inputs of the term.
Random conditions are integrated at quadrature nodes, which are doubled until the value stands
still; where only the residual of a Normal is conditional, its second moment is closed.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from .affine import AffineSlot, Dense, Local, product
from .conditional import Group, conditional_normal, grouped, is_conditional_normal
from .forms import BOUNDED, FEW_ODDS, Form, form_of, gauss_hermite, root
from .inputs import covariance_inputs, covary_alike, local_input, mean_input
from .linear import Input, weighted_sum
from .links import grows
from .nodes import tensor_grid
from .slots import POSITIVE, RATIO, RESIDUAL, Spec
from .softmax import WIDE

Key: TypeAlias = tuple[str, ...]
Inputs: TypeAlias = Mapping[Key, Tensor]

FIRST_NODES, FREE_NODES = 8, 32  # to begin with; the second where they cost next to nothing: most end there
LEAST_NODES = 3  # to begin with where more take long: enough beside many rows, where factors are narrow
MOST_NODES = {"conditions": 64, 1: 128, 2: 32, 3: 16, 4: 8}
MOST_POINTS = 500_000  # nodes times rows of one term
MOST_KEPT = 50_000_000  # second derivatives of one term that are kept for Hessian products
SEEN = 32  # numbers that a draw takes as long for as for the density itself
MOST_CHECKED = 10_000_000  # values of the density, to see that its nodes are enough
FEW_POINTS = 256  # nodes of a row that are allowed regardless: as many as draws would be
# Slots whose exponential the log density grows with, where that is not plain from their names.
EXPONENTS: dict[type, tuple[str, ...]] = {
    td.Gumbel: (RESIDUAL, *POSITIVE),
    td.NegativeBinomial: ("total_count",),
    dist.ZeroInflatedNegativeBinomial: ("total_count",),
    dist.BetaBinomial: (),
}
SETTLED, ROUGHLY = 1e-9, 1e-8  # change of a term, relative, on doubling its nodes: at the end, and before
NEARLY = 1e-2  # nats that nodes may be off by where more take too long: draws of the bound are hardly better
FREE_POINTS = 4_000  # nodes times rows of a term that cost next to nothing
CHEAPER = "draws are cheaper"
TOO_FEW = "quadrature nodes are not enough: the expectation is rough, or infinite"
FINE = 1e-10  # change at which such a term is settled, from the start


@dataclass(frozen=True)
class CompiledTerm:
    """One term of the bound as a function of the guide's moments and the parameters.

    Attributes:
        spec: family, rows, data.
        slots: its compiled slots by name.
        latents: names of the variables that are random.
        is_alike: whether all pairs of slots covary alike, of categories.
        condition_nodes, slot_nodes: numbers of quadrature nodes.
        error: nats that twice as many would change, where they take too long.
    """

    spec: Spec
    slots: dict[str, AffineSlot]
    latents: frozenset[str]
    is_alike: bool = False
    condition_nodes: int = FIRST_NODES
    slot_nodes: int = FIRST_NODES
    error: float = 0.0

    @classmethod
    def of(cls, spec: Spec, slots: dict[str, AffineSlot], latents: frozenset[str]) -> "CompiledTerm":
        """A term of these slots."""
        term = cls(spec, slots, latents)
        rows, kept = len(spec.weight), (2 + 2 * len(slots)) ** 2
        if spec.family is not td.Categorical or len(term.random_slots) <= FEW_ODDS or rows * kept > MOST_KEPT:
            return term
        is_alike = covary_alike(slots, term.groups, term.conditions, latents, rows)
        return replace(term, is_alike=is_alike)

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
            if any(k in self.latents and k not in given for k in slot.variables)
        )

    @functools.cached_property
    def form(self) -> Form:
        """How its rows are integrated."""
        return form_of(self.spec, self.random_slots, self.is_alike)

    def begun(self) -> "CompiledTerm":
        """The term with the nodes to begin with."""
        grid = len(self.random_conditions) if self.has_grid else 0
        first = replace(self, condition_nodes=FIRST_NODES, slot_nodes=FIRST_NODES)
        if (
            grid + self.form.dims == 1
            and FREE_NODES * self.form.size(1) * len(self.spec.weight) <= FREE_POINTS
        ):
            kind = "condition_nodes" if grid else "slot_nodes"
            return first._with_nodes(kind, FREE_NODES)
        if first.is_costly:
            return replace(self, condition_nodes=LEAST_NODES, slot_nodes=LEAST_NODES)
        return first._with_nodes("slot_nodes", LEAST_NODES) if self.form.dims > 1 else first

    @property
    def nodes(self) -> tuple[int, int]:
        """Numbers of nodes: of conditions, and of slots."""
        return self.condition_nodes, self.slot_nodes

    def _with_nodes(self, kind: str, number: int) -> "CompiledTerm":
        if kind == "condition_nodes":
            return replace(self, condition_nodes=number)
        return replace(self, slot_nodes=number)

    def problem(self) -> str | None:
        """Why the term cannot be integrated, or None."""
        for slot in self.slots.values():
            for name, index in self.conditions.items():
                if name in slot.conditions and not torch.equal(slot.conditions[name].index, index):
                    return f"slots see {name} at two elements"
                if name in slot.denses:
                    return f"{name} is conditioned on and summed over"
                if name in slot.locals:
                    live = slot.locals[name].coefficient != 0
                    if not torch.equal(slot.locals[name].index[live], index[live]):
                        return f"rows see {name} at two elements"
        shared = self._shared()
        if shared is not None:
            return f"products of {shared}, which its scale depends on too"
        if self.grown is not None:
            return f"the exponential of an exponential of {self.grown} has no finite expectation"
        if "gap" in self.random_slots:
            return "the distance of its cutpoints is random"
        if self.form.dims and self.form.dims not in MOST_NODES:
            return f"{self.form.dims} random slots together"
        return None

    def _shared(self) -> str | None:
        """A latent in products that another slot sees: no two moments of the residual are enough."""
        products = {s: slot.products.variables for s, slot in self.slots.items() if slot.products is not None}
        for s, names in products.items():
            others = {k for other, slot in self.slots.items() if other != s for k in slot.variables}
            for name in names:
                if name in self.latents and name in others:
                    return name
        return None

    @property
    def grown(self) -> str | None:
        """A Gaussian condition whose exponential sits in the exponent of the density, or None.

        Nodes would settle on a finite value where there is none.
        """
        family = self.spec.family
        for kind, name in ((td.Gumbel, "scale"), (td.Weibull, "concentration")):
            if family is kind and not self.latents.isdisjoint(self.slots[name].variables):
                return f"its {name}"
        exponents = EXPONENTS.get(family, () if family in BOUNDED else (RATIO, *POSITIVE))
        for name, slot in self.slots.items():
            if name not in exponents and not grows(name):
                continue
            for c in self.random_conditions:
                parts: list[Local | Dense] = [*slot.locals.values(), *slot.denses.values()]
                rates = [part.rate[c] for part in parts if c in part.rate]
                rates += [slot.conditions[c].rate] if c in slot.conditions else []
                slopes = [part.slope[c] for part in parts if c in part.slope]
                if any(bool((values != 0).any()) for values in (*rates, *slopes)):
                    return c
        return None

    @functools.cached_property
    def groups(self) -> dict[str, list[Group]]:
        """The unconditioned parts of each slot, those with the same factors together."""
        return {name: grouped(slot, self.conditions) for name, slot in self.slots.items()}

    @functools.cached_property
    def is_second_moment(self) -> bool:
        """True if the conditions enter the residual of a Normal only, so that no nodes are needed."""
        return is_conditional_normal(self.spec, self.slots, self.groups, self.conditions, self.latents)

    @functools.cached_property
    def inputs(self) -> dict[Key, Input]:
        """What the term needs of the guide, by key: linear in its means, or in its variances."""
        rows, found = len(self.spec.weight), dict[Key, Input]()
        for name, index in self.conditions.items():
            found["condition", name] = local_input(name, index, torch.ones(len(index)).double(), False)
            if name in self.latents:
                found["spread", name] = local_input(name, index, torch.ones(len(index)).double(), True)
        for slot, groups in self.groups.items():
            for g, group in enumerate(groups):
                found["mean", slot, str(g)] = mean_input(group, rows)
            products = self.slots[slot].products
            for (side, key), entry in products.inputs(self.latents).items() if products else ():
                found["product", slot, side, key] = entry
        for a, b in self.form.pairs:
            for (g, h), entry in covariance_inputs(
                self.groups[a], self.groups[b], self.latents, rows
            ).items():
                found["cov", a, str(g), b, str(h)] = entry
        return found

    def expectation(self, x: Inputs) -> Tensor:
        """Sum over rows of weight * E[log p], in nats, given the values of the inputs."""
        if self.is_second_moment:
            rows = conditional_normal(self.spec, self.slots, self.groups, x)
            return weighted_sum(self.spec.weight, rows)
        given, weights = self._grid(x)
        mean, cov = self._slot_moments(x, given)
        rows = self.form.rows(mean, cov, self.slot_nodes)
        if weights is not None:
            rows = (weights.unsqueeze(-1) * rows).sum(0)
        return weighted_sum(self.spec.weight, rows)

    def refined(self, x: Inputs, settled: float) -> "CompiledTerm | str":
        """The term with enough nodes at these moments; or why there are not enough."""
        most = {
            "condition_nodes": MOST_NODES["conditions"] if self.has_grid else 0,
            "slot_nodes": int(self.form.doubled * MOST_NODES.get(self.form.dims, 0)),
        }
        if self.is_costly:
            return self._too_costly
        with torch.no_grad():
            widest = self._widest(x) if self.is_alike else 0.0
            if widest > WIDE:
                grid = replace(self, is_alike=False)
                return grid.begun() if grid.form.dims in MOST_NODES else f"sds of {widest:.0f}: {CHEAPER}"
            term = self
            for what in (name for name, number in most.items() if number):
                grown = term._doubled(x, what, most[what], settled)
                if isinstance(grown, str):
                    return grown
                term = grown
            return term

    def _widest(self, x: Inputs) -> float:
        """The largest standard deviation of a slot."""
        _, cov = self._slot_moments(x, self._grid(x)[0])
        return max(float(cov[name, name].max()) for name in self.random_slots) ** 0.5

    def _doubled(self, x: Inputs, what: str, most: int, settled: float) -> "CompiledTerm | str":
        rows = len(self.spec.weight)
        term, value, gap = self, float(self.expectation(x)), np.inf
        while True:
            n = getattr(term, what)
            finer = term._with_nodes(what, 2 * n)
            if n >= most or finer.work > MOST_CHECKED * self._draw:
                if term is self and n > 1:
                    gap = abs(float(term._with_nodes(what, n // 2).expectation(x)) - value)
                reason = f"{n} {TOO_FEW}" if n >= most else finer._too_costly
                break
            now = float(finer.expectation(x))  # without derivatives: as much as one or two evaluations
            gap, is_free = abs(now - value), finer.points * rows <= FREE_POINTS
            if gap <= (FINE if is_free else settled) * (1 + abs(now)):
                return term
            if finer.is_costly:
                reason = finer._too_costly
                break
            term, value = finer, now
        return replace(term, error=gap) if gap <= NEARLY else reason

    @property
    def _too_costly(self) -> str:
        nodes = max(self.condition_nodes, self.slot_nodes)
        return f"{nodes} nodes a dimension for {len(self.spec.weight):,} rows: {CHEAPER}"

    @property
    def is_costly(self) -> bool:
        """True if draws take less time and memory."""
        points = self.points
        return points > FEW_POINTS and points * len(self.spec.weight) > MOST_POINTS * self._draw

    @functools.cached_property
    def _draw(self) -> float:
        """What a draw of a row takes, a density being one: slots of many latents are sums."""
        seen = [
            len(slot.locals) + sum(part.matrix.shape[1] for part in slot.denses.values())
            for slot in self.slots.values()
        ]
        return 1 + max(seen, default=0) / SEEN

    @property
    def work(self) -> int:
        """Values of the density at nodes that one evaluation takes, if they take long."""
        if self.form.is_light and not self.has_grid:
            return 0
        grid = self.condition_nodes ** len(self.random_conditions) if self.has_grid else 1
        return grid * self.form.size(self.slot_nodes) * len(self.spec.weight)

    @property
    def points(self) -> int:
        """Points of a row that derivatives are taken at, or as many as cost what they do."""
        grid = self.condition_nodes ** len(self.random_conditions) if self.has_grid else 1
        return int(grid * self.form.points(self.slot_nodes))

    @property
    def has_grid(self) -> bool:
        """True if conditions are integrated at nodes."""
        return bool(self.random_conditions) and not self.is_second_moment

    def _grid(self, x: Inputs) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values of the conditions by row, at nodes if they are random; and the nodes' weights."""
        given = {name: x["condition", name] for name in self.conditions}
        names = self.random_conditions
        if not names:
            return given, None
        nodes, weights = tensor_grid(gauss_hermite(self.condition_nodes), len(names))
        for i, name in enumerate(names):
            given[name] = given[name] + nodes[:, i : i + 1] * root(x["spread", name])
        return given, weights

    def _slot_moments(
        self, x: Inputs, given: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
        factors = {
            s: [slot.factors(group, given) for group in self.groups[s]] for s, slot in self.slots.items()
        }
        mean: dict[str, Tensor] = {}
        for s, slot in self.slots.items():
            total = slot.alone(given)
            for g in range(len(self.groups[s])):
                total = total + product(x["mean", s, str(g)], *factors[s][g])
            mean[s] = total
        cov: dict[tuple[str, str], Tensor] = {}
        for key, value in x.items():
            if key[0] == "cov":
                _, a, one, b, other = key
                part = product(value, *factors[a][int(one)], *factors[b][int(other)])
                cov[a, b] = cov[a, b] + part if (a, b) in cov else part
        for s, slot in self.slots.items():
            if slot.products is not None:
                mine = {(key[2], key[3]): v for key, v in x.items() if key[:2] == ("product", s)}
                more, spread = slot.products.moments(mine)
                mean[s] = mean[s] + more
                if spread is not None:
                    cov[s, s] = cov[s, s] + spread if (s, s) in cov else spread
        return mean, cov

    @property
    def is_alone(self) -> bool:
        """True if the term depends on no latent but its own."""
        names = {k for slot in self.slots.values() for k in slot.variables}
        return self.spec.latent is not None and names & self.latents <= {self.spec.name}

    @property
    def method(self) -> str:
        """What the plan says: exact, or quadrature."""
        return "quadrature" if self.has_grid or self.form.dims else "closed form"

    @property
    def proof(self) -> str:
        """How the term depends on the variables, for the plan."""
        names = list(dict.fromkeys(k for slot in self.slots.values() for k in slot.variables))
        free = [k.removeprefix("$") for k in names if k not in self.conditions]
        held = [k.removeprefix("$") for k in self.conditions]
        if not free:
            return f"a function of {', '.join(held)}" if held else "a constant"
        given = f" given {', '.join(held)}" if held else ""
        multiplied = [k for k in free if k in self._multiplied]
        parts = [", ".join(k for k in free if k not in multiplied)]
        parts += [f"products of {', '.join(multiplied)}"] if multiplied else []
        error = f", nodes to {self.error:.0e} nats" if self.error else ""
        return f"affine in {' and '.join(filter(None, parts))}{given}, checked against the model{error}"

    @property
    def _multiplied(self) -> set[str]:
        """Variables in products, as a plan names them."""
        products = [slot.products for slot in self.slots.values() if slot.products is not None]
        return {k.removeprefix("$") for one in products for k in one.variables}
