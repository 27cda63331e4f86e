"""From a user's model, data and guide to a problem with its blocks of parameters."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bound.elbo import Analytic, AnalyticKL_ELBO
from ..bound.lifted.lifted import Lifted
from ..bound.lifted.terms import LiftedTerms
from ..bound.objective import Objective
from ..bound.problem import Problem, plan_problem
from ..errors import ModelError, UnsupportedModelError, check_names, warn
from ..guides.conjugate import MeanFieldConjugate
from ..guides.factorised import Factorised, FactorisedNormal
from ..guides.mean_field import MeanFieldNormal
from ..model.checks import run_checked
from ..model.data import Arguments, arguments
from ..model.modules import copied
from ..model.parameters import Block, Parameter, PartlyHeld
from ..model.prototype import Prototype, discover_modules, parameters_of, prototype
from ..model.roles import roles_of
from ..model.rows import Rows, Share
from ..model.runtime import Program
from ..model.sites import Latent, Strategy
from .capture import Captures, Compile
from .options import FitOptions
from .processes import Processes


@dataclass(frozen=True)
class Setup:
    """Everything that the driver moves and measures.

    Attributes:
        phi: block of the guide's parameters (E-step).
        theta: block of the model's parameters and MAP sites (M-step).
        held: parameters that no step moves, constrained.
        prototype: structure of the model.
        guide: the guide as a Pyro callable; None when no latent is left for it.
        analytic: what the caller's ELBO says of closed forms.
        bounds: what it says of upper bounds of a KL.
        captures: blocks that run as compiled graphs.
        processes: that share the fit.
    """

    problem: Problem
    objective: Objective
    phi: Block
    theta: Block
    held: Mapping[str, Tensor]
    prototype: Prototype
    guide: Callable[..., Any] | None
    analytic: Analytic
    bounds: bool
    captures: Captures
    processes: Processes = field(default_factory=Processes)

    @property
    def latents(self) -> tuple[Latent, ...]:
        """The latents with a posterior: all but MAP sites."""
        return tuple(s for s in self.prototype.latents if s.name not in self.problem.map_sites)

    def map_sites_in(self, plates: Container[str]) -> list[str]:
        """MAP sites inside one of these plates: each of its rows has a value of its own."""
        latents = (self.prototype.latent(name) for name in self.problem.map_sites)
        return [site.name for site in latents if site.is_in(plates)]

    @property
    def is_our_code(self) -> bool:
        """True if neither the model nor an encoder is run in an evaluation of the bound."""
        guide = self.guide
        is_free = guide is None or (isinstance(guide, Factorised) and not guide.encoded)
        is_free = is_free and (self.lifted is None or not self.lifted.lifted.runs_model)
        return is_free and self.objective.is_exact and not self.objective.rest.rows

    @property
    def is_small(self) -> bool:
        """True if an evaluation of the bound is a few operations on matrices of few numbers."""
        exact = self.objective.exact
        is_one_cpu = self.processes.count == 1 and torch.get_default_device().type == "cpu"
        return is_one_cpu and self.is_our_code and exact is not None and exact.is_small

    @property
    def lifted(self) -> LiftedTerms | None:
        """The terms in closed form of a conjugate guide, if the fit has one."""
        exact = self.objective.exact
        return exact if isinstance(exact, LiftedTerms) else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, those of all processes' rows among them, constrained."""
        found = {p.name: p.init for p in (*self.phi.parameters, *self.theta.parameters)} | dict(self.held)
        return {n: self.processes.whole_shape(n, tuple(value.shape)) for n, value in found.items()}

    def theta_values(self, flat: Tensor) -> dict[str, Tensor]:
        """Constrained model parameters by name, held ones included."""
        return {**self.theta.constrained(flat), **self.held}

    def elbo(self, phi: Tensor, theta: Tensor) -> Tensor:
        """The bound of this process's rows on the fixed draws, differentiable in both flat vectors."""
        exact = self.objective.exact
        if exact is not None and not self.objective.rest.rows:
            total = exact.flat_total(phi, theta)
            if total is not None:
                return total
        return self.objective.value(self.phi.constrained(phi), self.theta_values(theta))


def partly_held(
    setup: Setup, parameters: Iterable[Parameter], held: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> Setup:
    """The problem in which only parameters of the guide that are not held move.

    Args:
        setup: the problem.
        parameters: all of the guide's.
        held: values of those that stand still.
        params: values of all of the model's, which stand still.
    """
    held_params = {**setup.held, **params}
    return replace(setup, phi=PartlyHeld(parameters, held), theta=Block(()), held=held_params)


def encoded_moments(
    setup: Setup, phi: Mapping[str, Tensor], call: Arguments
) -> dict[str, tuple[Tensor, Tensor]]:
    """What encoders say of rows: mean and sd of each site's factor, on the unconstrained scale.

    Args:
        setup: the problem, whose guide has encoders, set up for as many rows.
        phi: the guide's parameters, constrained.
        call: the rows.
    """
    guide, program = setup.guide, setup.problem.guide
    assert isinstance(guide, FactorisedNormal)
    assert program is not None
    sites = [site for site in guide.latents() if site.name in guide.encoded]
    with torch.no_grad():
        return program.apply(
            phi, lambda: {site.name: guide.moments(site, call.args, call.kwargs) for site in sites}
        )


def set_up(
    model: Callable[..., Any],
    data: Any,
    guide: Any,
    elbo: AnalyticKL_ELBO | None,
    init: Any,
    options: FitOptions,
    seed: int,
    compile: Compile = "auto",
    rows: Rows | None = None,
    others: Strategy | None = None,
) -> Setup:
    """Run the model a few times, check everything, and choose the method of each term.

    With `rows` the data are a batch, which stands for all rows (of this process). Sites without a value
    in `init` start where `others` says, if it is given.
    """
    if not callable(model):
        raise ModelError(f"model={model!r}: give a Pyro model, a function or a PyroModule")
    raw = arguments(model, data).to(torch.get_default_device())
    call = raw.cast(torch.float64)
    guide = _check_guide(guide)
    processes = Processes.of(options.sharded)
    part = rows or processes.share
    program = discover_modules(_program(model, part), raw)
    own_init = guide.init if init is None and isinstance(guide, Factorised) else init
    proto = processes.agreed(
        prototype(program, call, processes.start(own_init), others), roles_of(model).map_sites
    )
    theta, held, map_sites = _model_block(model, proto)
    _check_found(proto)
    latents = tuple(site for site in proto.latents if site.name not in map_sites)
    _check_modules_apart(guide, program)
    lifted, why_not = None, ""
    is_chosen = guide == "auto" or (guide is None and len(proto.summed_out) > 0)
    if is_chosen or isinstance(guide, MeanFieldConjugate):
        try:
            lifted = _lifted(program, call, proto, theta, map_sites, held, seed)
        except UnsupportedModelError as error:  # of discrete sites: they are summed out at draws then
            if not (is_chosen and latents):
                raise
            guide, why_not = MeanFieldNormal(model), str(error)
    guide = _bound_guide(_chosen(guide, model, lifted), model, latents, call)
    if lifted is not None and isinstance(guide, MeanFieldConjugate):
        guide.blocks, guide.singles = lifted.blocks, lifted.singles
    guide_program = _guide_program(guide, part, raw) if guide is not None else None
    problem = Problem(program, guide_program, call, map_sites, proto.names)
    found = _guide_parameters(guide_program, call)
    processes, found = processes.laid_out(guide, latents, found, theta.size)
    phi = Block(found)
    _check_shared(problem, phi, proto)
    values = {p.name: p.init for p in theta.parameters} | held
    elbo = elbo or AnalyticKL_ELBO()
    analytic, bounds = elbo.analytic, elbo.bounds
    start = {p.name: p.init for p in phi.parameters}
    is_conjugate = guide is None or isinstance(guide, MeanFieldConjugate)
    is_lifted = lifted is not None and is_conjugate and lifted.is_complete
    plan, specs = plan_problem(problem, start, values, analytic, bounds, is_lifted)
    objective = Objective(problem, plan, specs, options.num_draws, seed + processes.seed)
    objective.elsewhere = _elsewhere(theta, held)
    if lifted is not None and is_conjugate:
        shares = {site.name: problem.share(p.name for p in site.plates) for site in latents}
        objective.exact = LiftedTerms(lifted, guide, _draws_of(objective), shares)
    if lifted is not None and isinstance(guide, MeanFieldNormal):
        why_not = lifted.why_not()
    if why_not:
        objective.add_note(f"MeanFieldNormal was taken: not conjugate: {why_not}")
    return Setup(
        problem, objective, phi, theta, held, proto, guide, analytic, bounds, Captures(compile), processes
    )


def _check_found(proto: Prototype) -> None:
    """That there is something to fit, and something to fit it to."""
    if not proto.latents and not proto.parameters:
        raise ModelError(
            "the model has neither latent sites nor parameters: nothing to fit; add pyro.sample sites "
            "without obs=, or pyro.param statements"
        )
    if not proto.observed:
        warn(
            "the model has no observed site: the fit returns its prior; did you forget obs= or a "
            "data argument?"
        )


def _program(fn: Callable[..., Any], part: Rows | Share | None) -> Program:
    if isinstance(part, Rows) and isinstance(fn, Factorised):
        part = part.all_unscaled
    program = Program(fn)
    program.around = part.around if part is not None else None
    program.is_batched = isinstance(part, Rows)
    return program


def _guide_program(guide: Any, part: Rows | Share | None, raw: Arguments) -> Program:
    program = _program(guide, part)
    has_modules = not isinstance(guide, FactorisedNormal) or bool(guide.encoded)
    return discover_modules(program, raw) if has_modules else program


def _lifted(
    program: Program,
    call: Arguments,
    proto: Prototype,
    theta: Block,
    map_sites: tuple[str, ...],
    held: Mapping[str, Tensor],
    seed: int,
) -> Lifted:
    plain = Problem(program, None, call, map_sites, proto.names)
    parameters = [p for p in theta.parameters if p.name not in map_sites]
    depths = [-plate.dim for plates in proto.plates for plate in plates]
    return Lifted(plain.run_model, proto, parameters, map_sites, held, max(depths, default=0), seed)


def _chosen(guide: Any, model: Callable[..., Any], lifted: Lifted | None) -> Any:
    """What None and "auto" stand for: conjugate factors if every term has a closed form in them."""
    if guide is None and lifted is not None:  # it has discrete sites
        return MeanFieldConjugate(model)
    if guide != "auto":
        return guide
    assert lifted is not None
    return MeanFieldConjugate(model) if lifted.is_complete else MeanFieldNormal(model)


def _elsewhere(theta: Block, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Generic parameters: where they start, what they multiply may vanish."""
    start = theta.initial()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {**theta.constrained(start + 0.3 * noise), **held} if theta.size else {}


def _draws_of(objective: Objective) -> Callable[..., list[Mapping[str, Tensor]]]:
    """Values of all latents and parameters at draws of the guide."""

    def draw(phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], n: int, seed: int) -> Any:
        values = objective.sample(phi, theta, n, seed, ("values",))["values"]
        return [{**theta, **{k: v[i] for k, v in values.items() if k not in theta}} for i in range(n)]

    return draw


def _check_guide(guide: Any) -> Any:
    if isinstance(guide, type):
        raise ModelError(f"guide={guide.__name__}: give an instance, {guide.__name__}(model)")
    if guide is not None and guide != "auto" and not callable(guide):
        raise ModelError(f"guide={guide!r}: give a Pyro guide, 'auto', or None for MeanFieldNormal")
    return guide


def _bound_guide(guide: Any, model: Callable[..., Any], latents: tuple[Any, ...], call: Arguments) -> Any:
    if not latents and not isinstance(guide, Factorised):
        return guide  # None: maximum likelihood or MAP
    if guide is None:
        guide = MeanFieldNormal(model)
    if isinstance(guide, Factorised):
        return guide.bind(latents, call) if latents else None
    # A lazy guide builds itself at its first call; the user's own object stays as it is.
    return copied(guide) if isinstance(guide, nn.Module) else guide


def _model_block(
    model: Callable[..., Any], proto: Prototype
) -> tuple[Block, dict[str, Tensor], tuple[str, ...]]:
    roles = roles_of(model)
    latents = [site.name for site in proto.latents]
    names = [p.name for p in proto.parameters]
    modules = sorted({name.split("$$$")[0] for name in names if "$$$" in name})
    check_names("vem_model(map_sites=)", roles.map_sites, latents)
    check_names("vem_model(fixed=)", roles.fixed, [*names, *modules])
    fixed = {name for name in names if name in roles.fixed or name.split("$$$")[0] in roles.fixed}
    moved = [p for p in proto.parameters if p.name not in fixed]
    for name in roles.map_sites:
        site = proto.latent(name)
        moved.append(Parameter(name, site.support, site.init))
    held = {p.name: p.init for p in proto.parameters if p.name in fixed}
    return Block(moved), held, roles.map_sites


def _guide_parameters(program: Program | None, call: Arguments) -> tuple[Parameter, ...]:
    if program is None:
        return ()
    program.own_weights({}, torch.float64)
    if type(program.fn) is MeanFieldNormal:  # known without a run
        sites = program.fn.latents(*call.args, **call.kwargs)
        return tuple(p for site in sites for p in program.fn.free_parameters(site))
    run = run_checked(program, call, {}, lambda site: None, "guide")
    return parameters_of(program, run)


def _check_modules_apart(guide: Any, program: Program) -> None:
    """Before the guide is copied: one module in both would silently become two."""
    owned = program.owned_weights
    for weight in guide.parameters() if isinstance(guide, nn.Module) else ():
        if id(weight) in owned:
            raise _shared(owned[id(weight)])


def _shared(name: str) -> ModelError:
    return ModelError(
        f"parameter {name!r} is used by both model and guide, so that no step owns it: "
        "give the guide parameters (and modules) of its own"
    )


def _check_shared(problem: Problem, phi: Block, proto: Prototype) -> None:
    shared = set(phi.names) & {p.name for p in proto.parameters}
    if problem.guide is not None and not shared:
        weights = set(problem.guide.owned_weights) & set(problem.model.owned_weights)
        shared = {name for i in weights for name in (problem.model.owned_weights[i],)}
    if shared:
        raise _shared(sorted(shared)[0])
