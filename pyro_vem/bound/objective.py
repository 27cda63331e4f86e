"""The plan assembled into one differentiable function of (phi, theta)."""

import copy
import functools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.checks import SingularMatrix, regular
from ..model.data import Arguments
from ..model.together import Together, one_by_one
from .draws import NOT_MATCHED, NoiseSpec, independent_noise, matched_noise
from .exact import ExactTerms
from .grids import Batch, Rows, grid, split
from .groups import flattened, grouped, groups_of
from .lifted.marginal import Marginal
from .problem import Problem
from .tables import Plan
from .terms import Part, site_terms, term_parts

Values = Mapping[str, Tensor]
MOST_AT_ONCE = 1024  # draws that are worked on together
PER_PART = 4_000_000  # numbers that fixed draws work on together: 32 MB, beyond which time doubles
AT_ONCE = 1_000_000  # numbers that independent draws work on together: 8 MB, which stay near the processor


class Objective:
    """The ELBO on fixed noise: a smooth deterministic function of phi and theta.

    Args:
        problem: model, guide and data.
        plan: the method of each term.
        specs: the noise that the guide takes.
        num_draws: even number of fixed draws.
        seed: of the draws.
    """

    def __init__(
        self, problem: Problem, plan: Plan, specs: tuple[NoiseSpec, ...], num_draws: int, seed: int
    ) -> None:
        self.problem, self.specs, self.seed = problem, specs, seed
        self.num_draws = self.full_draws = num_draws  # `full_draws` where fewer are as good
        self.plan = plan
        self.exact: ExactTerms | None = None
        self._noise: dict[str, Tensor] | None = None
        self._together = Together()
        self.is_vectorised = True  # until torch.func.vmap has refused the model
        self.is_gridded = False  # whether terms with few numbers may go on a grid
        self.drawn: set[str] = set()  # those that may not
        self._batches: tuple[Batch, ...] | None = None  # of the terms that run the model
        self.elsewhere: Values = {}  # other parameters of the model, to see what rows depend on
        self.is_twice = True  # second derivatives by autograd are right
        self.has_kinks = False  # and say nothing of kinks, which terms have at the draws

    @property
    def noise(self) -> dict[str, Tensor]:
        """The fixed draws, made when a term first needs them."""
        if self._noise is None:
            generator = torch.Generator().manual_seed(self.seed)
            self._noise, note = (
                matched_noise(self.specs, self.num_draws, generator) if self.specs else ({}, None)
            )
            if note:
                self.add_note(note)
        return self._noise

    @property
    def is_random(self) -> bool:
        """False if the guide takes no noise: the bound is then a plain function."""
        return bool(self.specs)

    @property
    def rest(self) -> Plan:
        """The rows that are not compiled."""
        if self.exact is None:
            return self.plan
        names = self.exact.names
        return replace(self.plan, rows=tuple(row for row in self.plan.rows if row.site not in names))

    @property
    def is_exact(self) -> bool:
        """True if no term is evaluated on draws."""
        if not self.rest.rows:
            return self.exact is not None
        return bool(self._batches) and not any(batch.scope and not batch.nodes for batch in self.batches)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The terms that run the model, by how they do."""
        everything = (Batch(self.rest, tuple(spec.name for spec in self.specs)),)
        return everything if self._batches is None else self._batches

    @property
    def shown_plan(self) -> Plan:
        """The plan with the compiled rows' methods and proofs."""
        refused = self.exact.refused if self.exact is not None else {}
        exact = self.exact.names if self.exact is not None else frozenset()
        on_grid = {name: batch for batch in self._batches or () if batch.nodes for name in batch.names}
        is_summed = any(row.method == "enumeration" for row in self.plan.rows)
        still = {
            name for batch in self._batches or () if not batch.scope for name in batch.names if is_summed
        }
        rows = []
        for row in self.plan.rows:
            if not self.is_random and row.method == "draws":
                row = replace(row, method="point", proof="no latent is random: one run of the model")
            elif row.site in on_grid:
                batch = on_grid[row.site]
                proof = f"sees {', '.join(batch.scope)} only: a grid of {batch.nodes} nodes each"
                proof += f" ({refused[row.site]})" if row.site in refused else ""
                row = replace(row, method="quadrature", proof=proof)
            elif row.site in still - refused.keys() and row.method == "draws":
                row = replace(row, method="closed form", proof="summed out together with another site")
            if self.exact is not None and row.site in exact:
                row = self.exact.shown(row)
            elif row.method == "draws" and row.kind == "likelihood":
                row = replace(row, proof=refused.get(row.site, row.proof))
            rows.append(row)
        return replace(self.plan, rows=tuple(rows))

    def prepare(self, phi: Values, theta: Values, drawn: Collection[str] = ()) -> None:
        """Choose grids, draws (of these rows for sure), and between vmap and a loop over them."""
        self._batches = None
        if not self.specs or not self.rest.rows:
            return
        if self.exact is not None or self.is_gridded:
            self._batches = self._split(phi, theta, drawn)
        if not self.is_exact:
            with torch.no_grad():
                self.terms(phi, theta)

    def _split(self, phi: Values, theta: Values, more: Collection[str] = ()) -> tuple[Batch, ...]:
        def at(theta: Values) -> Rows:
            def rows(plan: Plan, noise: dict[str, Tensor]) -> dict[str, Tensor]:
                return self._each(lambda one: self._once(plan, phi, theta, one), noise)

            return rows

        places = [at(theta), *([at(self.elsewhere)] if self.elsewhere else [])]
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = self.drawn.union(more) if self.is_gridded else {row.site for row in self.rest.rows}
        if self.exact is not None:
            drawn |= set(self.exact.rough)
        with torch.no_grad():
            return split(places, self.rest, self.specs, generator, drawn)

    @property
    def nodes(self) -> dict[str, int]:
        """Nodes of each row that runs the model, 0 for draws; without rows that no noise enters."""
        return _nodes(self._batches or ())

    def nodes_at(self, phi: Values, theta: Values) -> dict[str, int]:
        """`nodes` as they would be chosen at a point."""
        return _nodes(self._split(phi, theta))

    def _once(self, plan: Plan, phi: Values, theta: Values, noise: Values) -> dict[str, Tensor]:
        sites, model = self.problem.run(phi, theta, noise)
        return site_terms(plan, sites, model.sites, Marginal.of(model).density)

    def add_note(self, note: str) -> None:
        """Record in the plan what is not as usual."""
        self.plan = self.plan.with_notes(note)

    def terms(self, phi: Values, theta: Values) -> dict[str, Float[Tensor, ""]]:
        """Every term of the plan in nats: compiled, or averaged over the draws."""
        found = self.exact.terms(phi, theta) if self.exact is not None else {}
        return found | self._rest_terms(phi, theta)

    def value(self, phi: Values, theta: Values) -> Float[Tensor, ""]:
        """The ELBO on the fixed draws, in nats."""
        parts = list(self._rest_terms(phi, theta).values())
        if self.exact is not None:
            parts.append(self.exact.value(phi, theta))
        return torch.stack(parts).sum()

    @torch.no_grad()
    def exact_terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """The terms that no draw enters, in nats."""
        found = self.exact.terms(phi, theta) if self.exact is not None else {}
        if self.specs:
            for batch in self._batches or ():
                if batch.nodes or not batch.scope:
                    found |= self._evaluated(batch, phi, theta)
        return found

    def drawn_terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """The terms that the draws enter, in nats."""
        found: dict[str, Tensor] = {}
        for batch in self.batches:
            if batch.scope and not batch.nodes:
                found |= self._evaluated(batch, phi, theta)
        return found

    def _rest_terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """The terms that are not compiled."""
        if not self.rest.rows:
            return {}
        if not self.specs:
            return self._once(self.rest, phi, theta, {})
        found: dict[str, Tensor] = {}
        for batch in self.batches:
            found |= self._evaluated(batch, phi, theta)
        return found

    def _evaluated(self, batch: Batch, phi: Values, theta: Values) -> dict[str, Tensor]:
        def one(noise: Values) -> dict[str, Tensor]:
            return self._once(batch.plan, phi, theta, noise)

        if not batch.scope:
            return one({spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in self.specs})
        if not batch.nodes:
            parts = [self._each(one, noise) for noise in self._in_parts(self.noise)]
            return {name: torch.cat([part[name] for part in parts]).mean(0) for name in parts[0]}
        noise, weights = grid(self.specs, batch.scope, batch.nodes)
        return {name: weights @ values for name, values in self._each(one, noise).items()}

    def _in_parts(self, noise: Values) -> list[Values]:
        """Noise by so many draws as make no tensors that the allocator maps anew each time."""
        size = self.draws_for(PER_PART)
        num = max((len(value) for value in noise.values()), default=0)
        return [{name: value[i : i + size] for name, value in noise.items()} for i in range(0, num, size)]

    def slopes(
        self, phi: Values, theta: Values, noise: Values
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Each term that runs the model, at each draw of given noise, and its derivatives in the noise."""
        for batch in self.batches if self.specs else ():
            if not batch.scope:
                continue
            leaves = {name: value.clone().requires_grad_() for name, value in noise.items()}
            once = functools.partial(self._once, batch.plan, phi, theta)
            for name, values in self._each(once, leaves).items():
                if not values.requires_grad:
                    yield name, values, {site: torch.zeros_like(leaf) for site, leaf in leaves.items()}
                    continue
                slopes = torch.autograd.grad(
                    values.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
                )
                yield name, values.detach(), dict(zip(leaves, slopes, strict=True))

    def row_parts(self, phi: Values, theta: Values, of: Callable[[list[Part]], Tensor]) -> Tensor:
        """Something made of the pieces of one draw's terms, at each of the fixed draws: (draws, ...)."""

        def one(noise: Values) -> dict[str, Tensor]:
            sites, model = self.problem.run(phi, theta, noise)
            return {"": of(term_parts(self.plan, sites, model.sites, Marginal.of(model).density))}

        return self._each(one, self.noise)[""] if self.specs else one({})[""].unsqueeze(0)

    def on(self, call: Arguments, noise: Values | None) -> "Objective":
        """The same bound on other data of the same shapes, and on given noise."""
        twin = copy.copy(self)
        twin.problem = replace(self.problem, call=call)
        if noise is not None:
            twin._noise = dict(noise)
        return twin

    def twin(self) -> "Objective":
        """The same bound, whose draws stay as they are when this one's change."""
        return copy.copy(self)

    def with_other_draws(self, num_draws: int) -> "Objective":
        """The same bound on draws of another seed, and another number of them."""
        twin = copy.copy(self)
        twin.seed, twin._noise = self.seed + 15_485_863, None
        twin.take_draws(num_draws)
        return twin

    def take_draws(self, num_draws: int) -> None:
        """Another number of fixed draws from here on."""
        if num_draws != self.num_draws:
            self.num_draws, self._noise = num_draws, None
            kept = tuple(note for note in self.plan.notes if not note.endswith(NOT_MATCHED))
            self.plan = replace(self.plan, notes=kept)  # said anew where it is true of the new ones

    def take_full_draws(self) -> None:
        """The number of draws that was asked for, or has been found necessary, where fewer have served."""
        self.take_draws(max(self.num_draws, self.full_draws))

    def _each(
        self, one: Callable[[Any], dict[str, Tensor]], noise: Values, most_runs: int | None = None
    ) -> dict[str, Tensor]:
        """Something at all draws together, or at the first of them if each takes a run of its own."""
        if self.is_vectorised:
            try:
                return self._together(one, noise)
            except SingularMatrix:  # at this point; vmap is not to blame
                raise
            except Exception as error:  # an error of the model itself is raised again by the loop
                self.is_vectorised = False
                reason = str(error).strip().splitlines()[0][:120]
                self.add_note(f"one run a draw: torch.func.vmap refuses the model ({reason})")
        num = min(len(next(iter(noise.values()))), most_runs or sys.maxsize)
        return one_by_one(one, noise, num)

    def deterministic(self, theta: Values, values: Values) -> dict[str, Tensor]:
        """Deterministic sites at given draws of the latents, (draws, *site) each."""

        def one(draw: Values) -> dict[str, Tensor]:
            points = {name: theta[name] for name in self.problem.map_sites}
            run = self.problem.run_model(theta, {**draw, **points})
            return {name: site["value"] for name, site in run.deterministic.items()}

        with torch.no_grad():
            return self._each(one, values)

    def draws_for(self, numbers: int) -> int:
        """How many draws work on so many numbers, data and latents; at least 16, at most `MOST_AT_ONCE`."""
        call = self.problem.call
        data = sum(v.numel() for v in call.named.values() if isinstance(v, Tensor))
        size = max(1, data + sum(math.prod(spec.shape) for spec in self.specs))
        return max(16, min(MOST_AT_ONCE, numbers // size))

    def sample(
        self,
        phi: Values,
        theta: Values,
        num_draws: int,
        seed: int,
        keep: Collection[str] = ("values", "densities"),
        noise: Values | None = None,
        most_runs: int | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Independent draws from the guide (or the points that given noise makes), run through the model.

        Args:
            phi: the guide's parameters, constrained.
            theta: the model's parameters and MAP sites, constrained.
            num_draws: draws.
            seed: of the draws.
            keep: which groups to return: "values" (latents and deterministic sites by name),
                "densities" (log_p and log_q), "log_likelihood" (each observed site with rows of its own),
                "terms" (each row of the plan), "observed" (values of the observed sites),
                "model_rows" and "guide_rows" (log densities by site, not summed over plates).
            noise: standard normal noise of each guide site, (draws, *noise), instead of fresh one.
            most_runs: draws that will do where each takes a run of the model of its own.

        Returns:
            The groups; each tensor's first dimension runs over the draws.

        Raises:
            ModelError: if a matrix of the model is singular at a draw.
        """
        generator, chunk = torch.Generator().manual_seed(seed), self.draws_for(AT_ONCE)

        def one(noise: Values) -> dict[str, Tensor]:
            return flattened(groups_of(self.plan, *self.problem.run(phi, theta, noise), keep))

        parts: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for start in range(0, num_draws, chunk):
                size = min(chunk, num_draws - start)
                if noise is None:
                    drawn = independent_noise(self.specs, size, generator)
                else:
                    drawn = {name: value[start : start + size] for name, value in noise.items()}
                with regular("a draw of the guide"):
                    if self.specs:
                        parts.append(self._each(one, drawn, most_runs))
                    else:
                        parts.append({name: v.expand(size, *v.shape) for name, v in one({}).items()})
                if not self.is_vectorised and start + size >= (most_runs or num_draws):
                    break
        return grouped({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, keep)


def _nodes(batches: Iterable[Batch]) -> dict[str, int]:
    return {name: batch.nodes for batch in batches for name in batch.names if name not in batch.steady}
