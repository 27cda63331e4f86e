"""The plan assembled into one differentiable function of (phi, theta)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError, UnsupportedModelError
from ..model.checks import run_checked
from ..model.data import Arguments
from ..model.runtime import Execution, Program, modules_called, repeatable
from ..model.sites import plates_of
from .dependence import Pair
from .deterministic import Deterministic
from .draws import NoiseSpec, independent_noise, matched_noise
from .plans import make_plan
from .tables import Plan
from .terms import log_density, site_terms
from .transport import noise_event, transport

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and a guide with their data: everything that a bound needs but the parameters.

    Attributes:
        guide: None when no latent is left for it (maximum likelihood or MAP).
        map_sites: latents whose values are parameters of the M-step.
    """

    model: Program
    guide: Program | None
    call: Arguments
    map_sites: tuple[str, ...]

    def run_guide(self, phi: Values, noise: Values) -> Execution | None:
        """One guide run at fixed noise."""
        if self.guide is None:
            return None

        def choose(site: dict[str, Any]) -> Tensor:
            name = site["name"]
            return transport(site["fn"], noise[name] if name in noise else torch.zeros(()))

        return self.guide.run(self.call.args, self.call.kwargs, phi, choose)

    def run_model(self, theta: Values, values: Values) -> Execution:
        """One model run at given values of its latents."""
        run = self.model.run(self.call.args, self.call.kwargs, theta, lambda site: values.get(site["name"]))
        for name, site in run.sites.items():
            if not site["is_observed"] and name not in values:
                raise UnsupportedModelError(f"site {name!r} appears in some runs of the model only")
        return run

    def bound_model(self, theta: Values) -> Callable[[], Any]:
        """The model with its data and parameters in place, all in float64, for NUTS."""
        points = {name: theta[name] for name in self.map_sites}
        params = {name: value for name, value in theta.items() if name not in points}

        def model() -> Any:
            with pyro.condition(data=points):
                return self.model.call(params, self.call.args, self.call.kwargs)

        return model

    def run(self, phi: Values, theta: Values, noise: Values) -> tuple[dict[str, Any], Execution]:
        """Guide sites and the model run against them."""
        guide = self.run_guide(phi, noise)
        sites = guide.sites if guide else {}
        values = {name: site["value"] for name, site in sites.items()}
        values.update({name: theta[name] for name in self.map_sites})
        return sites, self.run_model(theta, values)


def plan_problem(
    problem: Problem, phi: Values, theta: Values, analytic: str = "auto", bounds: bool = False
) -> tuple[Plan, tuple[NoiseSpec, ...]]:
    """The plan of a problem and the noise that its guide takes, from one checked run."""
    specs: list[NoiseSpec] = []
    sites = {}
    if problem.guide is not None:

        def centre(site: dict[str, Any]) -> Tensor:
            fn = site["fn"]
            if not fn.has_rsample:
                raise UnsupportedModelError(
                    f"guide site {site['name']!r} ({type(fn).__name__}) is not reparameterised: "
                    "score-function gradients are not supported yet; use a reparameterised distribution"
                )
            event = noise_event(site)
            if event is None:
                return transport(fn, torch.zeros(()))
            specs.append(NoiseSpec(site["name"], tuple(fn.batch_shape), event, plates_of(site)))
            return transport(fn, torch.zeros(specs[-1].shape))

        # With gradients, so that it shows what a Delta of the guide depends on.
        leaves = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
        sites = run_checked(problem.guide, problem.call, leaves, centre, "guide").sites
    values = {name: site["value"] for name, site in sites.items()}
    values.update({name: theta[name] for name in problem.map_sites})

    def replay(site: dict[str, Any]) -> Tensor:
        if site["name"] not in values:
            raise ModelError(
                f"site {site['name']!r} is latent in the model, but the guide does not sample it"
            )
        return values[site["name"]]

    model_sites = run_checked(problem.model, problem.call, theta, replay).sites
    guide = problem.guide.fn if problem.guide else None
    with repeatable(), modules_called():
        plan = make_plan(
            guide, sites, model_sites, _pair(problem, phi, theta),
            map_sites=problem.map_sites, analytic=analytic, bounds=bounds,
        )  # fmt: skip
    return plan, tuple(specs)


def _pair(problem: Problem, phi: Values, theta: Values) -> Pair:
    """Guide and model at fixed parameters, for the proof."""
    points = {name: theta[name] for name in problem.map_sites}
    call = problem.call

    def guide(execution: Execution) -> Execution:
        return problem.guide.under(execution, call.args, call.kwargs, phi) if problem.guide else execution

    def model(execution: Execution) -> Execution:
        with pyro.condition(data=points):
            return problem.model.under(execution, call.args, call.kwargs, theta)

    return Pair(guide, model)


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
        self.num_draws = num_draws
        self.plan = plan
        self.exact: Deterministic | None = None
        self._noise: dict[str, Tensor] | None = None
        self._vectorised = True
        self._is_steady = False  # the rest of the terms are the same at every draw
        self.is_twice = True  # second derivatives by autograd are right

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
        return self.exact is not None and (not self.rest.rows or self._is_steady)

    @property
    def shown_plan(self) -> Plan:
        """The plan with the compiled rows' methods and proofs."""
        if self.exact is None:
            return self.plan
        terms, refused = self.exact.compiled.terms, self.exact.compiled.refused
        rows = []
        for row in self.plan.rows:
            term = terms.get(row.site)
            if term is not None and not (row.kind == "KL" and row.method == "closed form" and term.is_alone):
                row = replace(row, method=term.method, proof=term.proof)
            elif term is None and row.method == "draws" and row.kind == "likelihood":
                row = replace(row, proof=refused.get(row.site, row.proof))
            rows.append(row)
        return replace(self.plan, rows=tuple(rows))

    def prepare(self, phi: Values, theta: Values) -> None:
        """Choose between vmap and a loop over the draws, and record it in the plan."""
        if not self.specs or not self.rest.rows:
            return
        if self.exact is not None:
            self._is_steady = self._same_at_all_draws(phi, theta)
        if not self._is_steady:
            with torch.no_grad():
                self.terms(phi, theta)

    def _same_at_all_draws(self, phi: Values, theta: Values) -> bool:
        """True if no draw enters the rest of the terms: a KL whose prior has no latent parent."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            found = [
                self._once(
                    phi, theta, {k: v[0] for k, v in independent_noise(self.specs, 1, generator).items()}
                )
                for _ in range(2)
            ]
        return all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def _once(self, phi: Values, theta: Values, noise: Values) -> dict[str, Tensor]:
        sites, model = self.problem.run(phi, theta, noise)
        return site_terms(self.rest, sites, model.sites)

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
            parts.append(self.exact.total(self.exact.moments(phi, theta)))
        return torch.stack(parts).sum()

    def _rest_terms(self, phi: Values, theta: Values) -> dict[str, Tensor]:
        """The terms that are not compiled."""
        if not self.rest.rows:
            return {}

        def one(noise: Values) -> dict[str, Tensor]:
            return self._once(phi, theta, noise)

        if not self.specs:
            return one({})
        if self._is_steady:
            zero = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in self.specs}
            return one(zero)
        return {name: values.mean(0) for name, values in self._each(one, self.noise).items()}

    def _each(self, one: Callable[[Any], dict[str, Tensor]], noise: Values) -> dict[str, Tensor]:
        if self._vectorised:
            try:
                result: dict[str, Tensor] = torch.func.vmap(one, randomness="same")(dict(noise))
                return result
            except Exception as error:  # an error of the model itself is raised again by the loop
                self._vectorised = False
                reason = str(error).strip().splitlines()[0][:120]
                self.add_note(f"one run a draw: torch.func.vmap refuses the model ({reason})")
        num = len(next(iter(noise.values())))
        rows = [one({name: value[i] for name, value in noise.items()}) for i in range(num)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def deterministic(self, theta: Values, values: Values) -> dict[str, Tensor]:
        """Deterministic sites at given draws of the latents, (draws, *site) each."""

        def one(draw: Values) -> dict[str, Tensor]:
            points = {name: theta[name] for name in self.problem.map_sites}
            run = self.problem.run_model(theta, {**draw, **points})
            return {name: site["value"] for name, site in run.deterministic.items()}

        with torch.no_grad():
            return self._each(one, values)

    def sample(
        self,
        phi: Values,
        theta: Values,
        num_draws: int,
        seed: int,
        keep: Collection[str] = ("values", "densities"),
        chunk: int = 1024,
    ) -> dict[str, dict[str, Tensor]]:
        """Independent draws from the guide, run through the ordinary model.

        Args:
            phi: the guide's parameters, constrained.
            theta: the model's parameters and MAP sites, constrained.
            num_draws: draws.
            seed: of the draws.
            keep: which groups to return: "values" (latents and deterministic sites by name),
                "densities" (log_p and log_q), "log_likelihood" (each observed site, by row),
                "terms" (each row of the plan), "observed" (values of the observed sites).
            chunk: draws evaluated at a time.

        Returns:
            The groups; each tensor's first dimension runs over the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        parts: list[dict[str, dict[str, Tensor]]] = []
        with torch.no_grad():
            for start in range(0, num_draws, chunk):
                size = min(chunk, num_draws - start)
                parts.append(self._sample(phi, theta, size, generator, keep))
        return {
            group: {name: torch.cat([part[group][name] for part in parts]) for name in parts[0][group]}
            for group in parts[0]
        }

    def _sample(
        self, phi: Values, theta: Values, size: int, generator: torch.Generator, keep: Collection[str]
    ) -> dict[str, dict[str, Tensor]]:
        plan = self.plan

        def one(noise: Values) -> dict[str, Tensor]:
            sites, model = self.problem.run(phi, theta, noise)
            flat: dict[str, Tensor] = {}
            for group, members in _groups(plan, sites, model, keep).items():
                if group in keep:
                    flat.update({f"{group}\0{name}": value for name, value in members.items()})
            return flat

        if self.specs:
            flat = self._each(one, independent_noise(self.specs, size, generator))
        else:
            flat = {name: value.expand(size, *value.shape) for name, value in one({}).items()}
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in keep}
        for key, value in flat.items():
            group, name = key.split("\0")
            groups[group][name] = value
        return groups


def _groups(
    plan: Plan, guide_sites: Mapping[str, Any], model: Execution, keep: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """What one run tells, by group."""
    latents = {n: s["value"] for n, s in model.sites.items() if not s["is_observed"]}
    deterministic = {n: s["value"] for n, s in model.deterministic.items()}
    groups = {"values": {**latents, **deterministic}}
    known: dict[int, Tensor] = {}  # by site: several groups need the same densities

    def density(site: dict[str, Any]) -> Tensor:
        if id(site) not in known:
            known[id(site)] = log_density(site)
        return known[id(site)]

    if "densities" in keep:
        log_p = [density(site).sum() for site in model.sites.values()]
        log_q = [density(site).sum() for site in guide_sites.values()] or [torch.zeros(())]
        groups["densities"] = {"log_p": torch.stack(log_p).sum(), "log_q": torch.stack(log_q).sum()}
    if "log_likelihood" in keep:
        observed = {n: s for n, s in model.sites.items() if s["is_observed"]}
        groups["log_likelihood"] = {n: density(s) for n, s in observed.items()}
    if "observed" in keep:
        groups["observed"] = {n: s["value"] for n, s in model.sites.items() if s["is_observed"]}
    if "terms" in keep:
        groups["terms"] = site_terms(plan, guide_sites, model.sites, density)
    return groups
