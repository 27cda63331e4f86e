"""A model, a guide and their data as one problem; its plan, from one checked run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ..errors import ModelError, UnsupportedModelError
from ..model.checks import run_checked
from ..model.data import Arguments
from ..model.modules import modules_called
from ..model.runtime import Execution, Program, repeatable
from ..model.sites import plates_of
from .dependence import Pair
from .draws import NoiseSpec
from .plans import make_plan
from .tables import Plan
from .transport import log_density_at, noise_event, transport

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and a guide with their data: everything that a bound needs but the parameters.

    Attributes:
        guide: None when no latent is left for it (maximum likelihood or MAP).
        map_sites: latents whose values are parameters of the M-step.
        names: of the sites that every run of the model must have, and no others.
    """

    model: Program
    guide: Program | None
    call: Arguments
    map_sites: tuple[str, ...]
    names: frozenset[str]

    def share(self, plates: Iterable[str]) -> float:
        """What a factor in some plates is scaled by where the data are a part of all rows."""
        around = (self.guide or self.model).around
        return 1.0 if around is None else around(self.call.args, self.call.kwargs).factor(plates)

    def run_guide(self, phi: Values, noise: Values) -> Execution | None:
        """One guide run at fixed noise."""
        if self.guide is None:
            return None

        def choose(site: dict[str, Any]) -> Tensor:
            name = site["name"]
            return transport(site["fn"], noise[name] if name in noise else torch.zeros(()))

        run = self.guide.run(self.call.args, self.call.kwargs, phi, choose)
        for name in noise.keys() & run.sites.keys():
            known = log_density_at(run.sites[name]["fn"], noise[name])
            if known is not None:
                run.sites[name]["unscaled_log_prob"] = known  # where Pyro's traces keep it
        return run

    def run_model(self, theta: Values, values: Values) -> Execution:
        """One model run at given values of its latents."""
        run = self.model.run(self.call.args, self.call.kwargs, theta, lambda site: values.get(site["name"]))
        for name in sorted(self.names ^ run.sites.keys()):
            raise UnsupportedModelError(f"site {name!r} appears in some runs of the model only")
        return run

    def run(self, phi: Values, theta: Values, noise: Values) -> tuple[dict[str, Any], Execution]:
        """Guide sites and the model run against them."""
        guide = self.run_guide(phi, noise)
        sites = guide.sites if guide else {}
        values = {name: site["value"] for name, site in sites.items()}
        values.update({name: theta[name] for name in self.map_sites})
        return sites, self.run_model(theta, values)


def plan_problem(
    problem: Problem, phi: Values, theta: Values, analytic: str, bounds: bool, is_lifted: bool
) -> tuple[Plan, tuple[NoiseSpec, ...]]:
    """The plan of a problem and the noise that its guide takes, from one checked run."""
    sites, specs = _centred(problem, phi)
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
            map_sites=problem.map_sites, analytic=analytic, bounds=bounds, is_lifted=is_lifted,
        )  # fmt: skip
    return plan, specs


def _centred(problem: Problem, phi: Values) -> tuple[dict[str, Any], tuple[NoiseSpec, ...]]:
    """Sites of one checked run of the guide, where its noise is zero, and that noise."""
    specs: list[NoiseSpec] = []
    if problem.guide is None:
        return {}, ()

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
    return sites, tuple(specs)


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
