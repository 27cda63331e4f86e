"""What a few runs of the model tell: its sites, plates and parameters, and that it is static."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ..errors import ModelError, UnsupportedModelError, check_names
from .checks import check_parameter, regular, run_checked
from .data import Arguments
from .density import lean_log_prob
from .dtypes import default_dtype
from .modules import modules_called
from .parameters import Parameter, off_boundary
from .runtime import Execution, Program, Scout, Site, is_summed_out
from .sites import (
    Latent,
    Plate,
    Strategy,
    at_median,
    init_strategy,
    initial_values,
    latent_of,
    plates_of,
    support_and_bijector,
)

GOLDEN = 0.6180339887498949  # fractional parts of its multiples are all different

IMPOSSIBLE = -1e3  # log density of a number where a fit begins, nats: not the place to


@dataclass(frozen=True)
class Prototype:
    """The static structure of a model, from runs at its initial values.

    Attributes:
        latents: latent sites in program order, map sites included.
        observed: plates of each observed site by name, in program order.
        deterministic: plates of each deterministic site by name.
        event_dims: number of event dimensions of every site by name.
        parameters: parameters met in the program, in order.
        summed_out: plates of each discrete site that is enumerated, by name.
    """

    latents: tuple[Latent, ...]
    observed: Mapping[str, tuple[Plate, ...]]
    deterministic: Mapping[str, tuple[Plate, ...]]
    event_dims: Mapping[str, int]
    parameters: tuple[Parameter, ...]
    summed_out: Mapping[str, tuple[Plate, ...]] = field(default_factory=dict)

    @property
    def plates(self) -> tuple[tuple[Plate, ...], ...]:
        """Plates of every site."""
        latents = tuple(site.plates for site in self.latents)
        return (*latents, *self.observed.values(), *self.summed_out.values())

    @property
    def names(self) -> frozenset[str]:
        """Sites with a density, which every run of the model must have."""
        return frozenset(site.name for site in self.latents) | {*self.observed, *self.summed_out}

    def plate(self, name: str) -> Plate:
        """The plate called `name`.

        Raises:
            ModelError: if there is none.
        """
        known = {plate.name: plate for plates in self.plates for plate in plates}
        check_names("plate", (name,), known)
        return known[name]

    def latent(self, name: str) -> Latent:
        """The latent site called `name`."""
        return next(site for site in self.latents if site.name == name)


def discover_modules(program: Program, call: Arguments) -> Program:
    """The same program, knowing the modules that it calls.

    Modules may hold float32 or float64 weights. The run in float64 comes first, so that a lazy
    guide builds itself in it; an error here is left for the prototype run to report.
    """
    scout = Scout()
    first, failed = _modules_of_run(program.fn, call, torch.float64, scout)
    second = _modules_of_run(program.fn, call, torch.float32, scout)[0] if failed else []
    found = Program(program.fn, max(first, second, key=len))
    found.around, found.is_batched = program.around, program.is_batched
    if scout.summed_out:
        found.first_available_dim = -1 - scout.depth
    return found


def _modules_of_run(
    fn: Callable[..., Any], call: Arguments, dtype: torch.dtype, scout: Scout
) -> tuple[list[nn.Module], bool]:
    """The modules called, and whether the run ended in an error."""
    ready, failed = call.cast(dtype), True
    for _ in range(2):  # the first call of a lazy guide also runs the model, the second does not
        with (
            modules_called() as found,
            pyro.get_param_store().scope(),
            pyro.poutine.block(),
            default_dtype(dtype),
            contextlib.suppress(Exception),
            scout,
        ):
            fn(*ready.args, **ready.kwargs)
            failed = False
        if not (found or failed):
            break
    return found, failed


@regular("its initial values")
def prototype(
    program: Program, call: Arguments, init: Any = None, others: Strategy | None = None
) -> Prototype:
    """Learn a model's structure; refuse what is random or changes between runs.

    Args:
        program: the model. Weights of its modules are bound to parameter names on the way.
        call: its data.
        init: initial values: None, a dict on the constrained scale, or a Pyro init strategy.
        others: strategy for sites that have no value in a dict, instead of that of `init`.

    Raises:
        ModelError: where the model raises, a site has the wrong shape or no finite density.
        UnsupportedModelError: for discrete latents, subsampling, random or dynamic structure.
    """
    program.own_weights({}, torch.get_default_dtype() if program.modules else None)
    first = _first_run(program, call, init, others)
    if first.subsampled and not program.is_batched:
        raise UnsupportedModelError(
            f"plate {first.subsampled[0]!r} draws a subsample: give the plate all its rows, and fit_vem "
            "batch_size= (it owns the index and the scale)"
        )
    parameters = parameters_of(program, first)
    known = first.latents
    if isinstance(init, Mapping):
        check_names("init", init, [*known, *(p.name for p in parameters)])
        parameters = tuple(_with_init(p, init) for p in parameters)
    for parameter in parameters:
        off_boundary(parameter.name, transform_to(parameter.constraint), parameter.init)
    latents = tuple(latent_of(site) for site in known.values())
    latents = _check_static(program, call, latents, parameters)
    return Prototype(
        latents,
        {name: plates_of(s) for name, s in first.sites.items() if s["is_observed"]},
        {name: plates_of(s) for name, s in first.deterministic.items()},
        {name: s["fn"].event_dim for name, s in first.sites.items()}
        | {name: _event_dim(s) for name, s in first.deterministic.items()},
        parameters,
        {name: plates_of(s) for name, s in first.sites.items() if is_summed_out(s)},
    )


def _first_run(program: Program, call: Arguments, init: Any, others: Strategy | None) -> Execution:
    """A run at the initial values; at medians themselves where data are all but impossible beside them.

    A predictor that is 2,000 times a latent is far from zero at the quantiles next to the median.
    """
    is_enumerated = program.first_available_dim is not None

    def run(strategy: Strategy) -> Execution:
        return run_checked(program, call, {}, initial_values(strategy, is_enumerated))

    strategy = init_strategy(init, others)
    if others is not None or not (init is None or isinstance(init, Mapping)):
        return run(strategy)
    medians = init_strategy(init, rest=at_median)
    try:
        near = run(strategy)
    except ModelError as error:
        if isinstance(error.__cause__, ValueError | NoneType):  # an argument out of range, or no density
            with contextlib.suppress(ModelError):
                return run(medians)
        raise
    if _density(near) <= IMPOSSIBLE:
        with contextlib.suppress(ModelError):
            median = run(medians)
            if _density(median) > 0.1 * _density(near):
                return median
    return near


def _density(execution: Execution) -> float:
    """Log density of the data in nats, a number of them on average."""
    found = [s["log_prob"].detach().reshape(-1) for s in execution.sites.values() if s["is_observed"]]
    rows = torch.cat([row[torch.isfinite(row)] for row in found] or [torch.zeros(0)])
    return float(rows.double().mean()) if len(rows) else 0.0


def _event_dim(site: Site) -> int:
    """Event dimensions of a deterministic site; Pyro's default declares all of them, plates too."""
    declared: int = site["fn"].event_dim
    shape, plates = site["value"].shape, plates_of(site)
    in_plates = all(len(shape) >= -plate.dim and shape[plate.dim] == plate.size for plate in plates)
    return 0 if plates and in_plates and declared == len(shape) else declared


def _with_init(parameter: Parameter, init: Mapping[str, Any]) -> Parameter:
    if parameter.name not in init:
        return parameter
    value = torch.as_tensor(init[parameter.name]).to(parameter.init.dtype)
    if value.shape != parameter.init.shape:
        raise ModelError(
            f"init[{parameter.name!r}] has shape {tuple(value.shape)}, "
            f"the parameter {tuple(parameter.init.shape)}"
        )
    if not bool(parameter.constraint.check(value).all()):
        raise ModelError(f"init[{parameter.name!r}] violates its constraint {parameter.constraint}")
    return replace(parameter, init=value)


def parameters_of(program: Program, run: Execution) -> tuple[Parameter, ...]:
    """Parameters met in a run, weights of modules bound to their names on the way."""
    declared = pyro.get_param_store().get_state()["constraints"]
    paths: dict[str, str] = {}
    found = []
    for name, site in run.params.items():
        given = site["args"][1] if len(site["args"]) > 1 else None
        value = site["value"].detach().clone()
        check_parameter(name, value)
        path = program.path_of(given)
        if path is not None:
            paths[name] = path
        elif isinstance(given, torch.nn.Parameter):
            raise ModelError(
                f"parameter {name!r} is the weight of a module that is registered but never called: "
                "call the module itself in the model, not its methods"
            )
        found.append(
            Parameter(name, declared.get(name, constraints.real), value.to(torch.get_default_dtype()))
        )
    _check_owned(program, set(paths.values()))
    program.own_weights(paths, torch.get_default_dtype())
    return tuple(found)


def _check_owned(program: Program, owned: set[str]) -> None:
    by_path = {path: p for m in [program.shell] for path, p in m.named_parameters()}
    for path, weight in by_path.items():
        if weight.requires_grad and path not in owned and not path.endswith("_unconstrained"):
            raise ModelError(
                f"weight {path.split('.', 2)[-1]!r} of a module that the model calls belongs to no step: "
                "register the module with pyro.module(name, module), or hold it with "
                "module.requires_grad_(False)"
            )


def _check_static(
    program: Program, call: Arguments, latents: tuple[Latent, ...], parameters: tuple[Parameter, ...]
) -> tuple[Latent, ...]:
    """Run again at the same values, then at others: what must not change, must not change."""
    at = _runs(program, call, latents, parameters)
    generic = generic_moves((*latents, *parameters))
    try:
        base, again, moved = at({}), at({}), at(generic)
    except KeyError as error:
        raise UnsupportedModelError(f"site {error} appears in some runs of the model only") from error
    for other in (again, moved):
        if [*other.sites] != [*base.sites]:
            changed = set(other.sites) ^ set(base.sites)
            raise UnsupportedModelError(f"sites {sorted(changed)} appear in some runs of the model only")
    for name in base.sites:
        if not _same(_log_prob(base, name), _log_prob(again, name)):
            raise UnsupportedModelError(
                f"site {name!r} changes between runs at the same values: the model draws randomness "
                "that is no pyro.sample site"
            )
    for latent in latents:
        _, transform = support_and_bijector(moved.sites[latent.name])
        probe = latent.unconstrained + 0.1
        if not torch.equal(transform(probe), latent.transform(probe)):
            raise UnsupportedModelError(
                f"site {latent.name!r}: its support {latent.support} depends on other sites or parameters; "
                "sample it on a fixed support and move it there with pyro.deterministic"
            )
    return tuple(_with_idle(latent, (base, moved), ({}, generic), at) for latent in latents)


def _runs(
    program: Program, call: Arguments, latents: Sequence[Latent], parameters: Sequence[Parameter]
) -> Callable[[Mapping[str, Tensor]], Execution]:
    """Runs the model with some variables moved from where they start, on the unconstrained scale."""

    def at(by: Mapping[str, Tensor]) -> Execution:
        moved = {s.name: s.transform(s.unconstrained + by.get(s.name, 0.0)) for s in latents}
        params = {p.name: p.moved(by.get(p.name, 0.0)) for p in parameters}
        with torch.no_grad():
            return program.run(call.args, call.kwargs, params, lambda site: moved[site["name"]])

    return at


def on_other_data(program: Program, call: Arguments, latents: tuple[Latent, ...]) -> tuple[Latent, ...]:
    """The same latents on other data of the same shapes: their supports, and what the model masks there.

    A latent that the model does not have here, or has in another shape, stays as it is.
    """
    known = {site.name: site for site in latents}

    def start(site: Site) -> Tensor | None:
        latent, fn = known.get(site["name"]), site["fn"]
        if latent is None or latent.init.shape != fn.batch_shape + fn.event_shape:
            return None
        return support_and_bijector(site)[1](latent.unconstrained)

    with torch.no_grad():
        first = program.run(call.args, call.kwargs, {}, start)
    met = {name: latent_of(site) for name, site in first.latents.items()}
    here = {n: site for n, site in met.items() if n in known and site.init.shape == known[n].init.shape}
    if any(_off(first, name) is not None for name in here):
        every, parameters = tuple(met.values()), parameters_of(program, first)
        at, generic = _runs(program, call, every, parameters), generic_moves((*every, *parameters))
        runs = (at({}), at(generic))
        here = {name: _with_idle(site, runs, ({}, generic), at) for name, site in here.items()}
    return tuple(here.get(site.name, site) for site in latents)


def generic_moves(variables: Sequence[Latent | Parameter]) -> dict[str, Tensor]:
    """Moves of up to 0.1, all different: at the start a coefficient, or a sum of them, may be zero."""
    found, start = {}, 1
    for variable in variables:
        value = variable.unconstrained
        count = torch.arange(start, start + value.numel(), dtype=value.dtype, device=value.device)
        found[variable.name] = 0.1 * torch.frac(GOLDEN * count).reshape(value.shape)
        start += value.numel()
    return found


def _log_prob(run: Execution, name: str) -> Tensor:
    site = run.sites[name]
    return lean_log_prob(site["fn"], site["value"])


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit by bit; to rounding on another device, whose sums may be in any order."""
    if first.device.type == "cpu" or first.shape != second.shape:
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-9, atol=0.0, equal_nan=True)


def _with_idle(
    latent: Latent,
    runs: Sequence[Execution],
    moves: Sequence[Mapping[str, Tensor]],
    at: Callable[..., Execution],
) -> Latent:
    """Find masked elements that nothing else uses (as obs_mask= makes them), at the start and elsewhere."""
    base, off = runs[0], _off(runs[0], latent.name)
    if off is None:
        return latent
    shape = off.shape + (1,) * (latent.unconstrained.dim() - off.dim())
    step = 0.1 * off.reshape(shape).to(latent.init.dtype)
    for before, by in zip(runs, moves, strict=True):
        after = at({**by, latent.name: by.get(latent.name, 0.0) + step})
        if any(not torch.equal(_masked(before, name), _masked(after, name)) for name in base.sites):
            return latent
    return replace(latent, idle=off)


def _off(run: Execution, name: str) -> Tensor | None:
    """The elements of a site that are masked out, whatever discrete sites are; None if there are none."""
    site = run.sites[name]
    mask, fn = site["mask"], site["fn"]
    if mask is None or (isinstance(mask, bool) and mask):
        return None
    off = (~torch.as_tensor(mask)).expand(fn.batch_shape)
    while off.dim() > max(0, site["value"].dim() - fn.event_dim):
        off = off.all(0)
    return off if bool(off.any()) else None


def _masked(run: Execution, name: str) -> Tensor:
    mask = run.sites[name]["mask"]
    log_prob = _log_prob(run, name)
    return log_prob if mask is None else torch.where(torch.as_tensor(mask), log_prob, 0.0)
