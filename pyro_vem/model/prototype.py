"""What a few runs of the model tell: its sites, plates and parameters, and that it is static."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from pyro.util import check_site_shape
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
)

from ..errors import ModelError, UnsupportedModelError, unknown_names
from .data import Arguments
from .parameters import Parameter
from .runtime import Execution, Program, Site, modules_called


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: its name, its dimension (negative, from the right) and its size.

    Example:
        >>> Plate("pump", -1, 10).name
        'pump'
    """

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Latent:
    """A latent site of the model.

    Attributes:
        init: initial value, shaped batch + event, on the constrained scale.
        transform: bijector from the unconstrained scale to the site's support.
        plates: the vectorised plates round it, outermost first.
        event_dim: number of event dimensions of the value.
        idle: elements (batch shape) that the model masks out and never uses; None if none.
    """

    name: str
    init: Tensor
    transform: Transform
    support: Any
    plates: tuple[Plate, ...]
    event_dim: int
    idle: Tensor | None = None

    @property
    def unconstrained(self) -> Tensor:
        """The initial value on the unconstrained scale."""
        return self.transform.inv(self.init)


@dataclass(frozen=True)
class Prototype:
    """The static structure of a model, from runs at its initial values.

    Attributes:
        latents: latent sites in program order, map sites included.
        observed: plates of each observed site by name, in program order.
        deterministic: plates of each deterministic site by name.
        event_dims: number of event dimensions of every site by name.
        parameters: parameters met in the program, in order.
    """

    latents: tuple[Latent, ...]
    observed: Mapping[str, tuple[Plate, ...]]
    deterministic: Mapping[str, tuple[Plate, ...]]
    event_dims: Mapping[str, int]
    parameters: tuple[Parameter, ...]

    def latent(self, name: str) -> Latent:
        """The latent site called `name`."""
        return next(site for site in self.latents if site.name == name)


def bijector(support: Any) -> Transform:
    """The bijector from the unconstrained scale onto a support, without idle affine parts.

    Example:
        >>> bijector(constraints.nonnegative)  # torch adds AffineTransform(0, 1)
        ExpTransform()
    """
    transform = biject_to(support)
    if isinstance(transform, IndependentTransform):
        base = bijector(support.base_constraint)
        return IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        parts = [part for part in transform.parts if not _is_idle(part)]
        return parts[0] if len(parts) == 1 else ComposeTransform(parts)
    return transform


def _is_idle(transform: Transform) -> bool:
    if not isinstance(transform, AffineTransform):
        return False
    return bool((torch.as_tensor(transform.loc) == 0).all() and (torch.as_tensor(transform.scale) == 1).all())


def plates_of(site: Site) -> tuple[Plate, ...]:
    """The vectorised plates round a site, outermost (leftmost dimension) first."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    return tuple(Plate(f.name, f.dim, f.size) for f in sorted(frames, key=lambda f: f.dim))


def init_strategy(init: Any) -> Callable[[Site], Tensor]:
    """A Pyro init strategy from None (prior median), a dict of values, or a strategy itself."""
    if init is None:
        return init_to_median(num_samples=15)
    if isinstance(init, Mapping):
        values = {name: torch.as_tensor(value) for name, value in init.items()}
        dtype = torch.get_default_dtype()
        floats = {k: v.to(dtype) if v.dtype != torch.bool else v for k, v in values.items()}
        return init_to_value(values=floats, fallback=init_to_median(num_samples=15))
    if callable(init):
        return init
    raise ModelError(f"init={init!r}: give a dict of values, or a Pyro strategy like init_to_median")


def discover_modules(program: Program, call: Arguments) -> Program:
    """The same program, knowing the modules that it calls.

    The run is in the caller's own dtype, so that modules of any dtype work; an error here is
    left for the prototype run to report.
    """
    fn = program.fn
    ready = call.cast(torch.get_default_dtype())
    for _ in range(2):  # the first call of a lazy guide also runs the model, the second does not
        with (
            modules_called() as found,
            pyro.get_param_store().scope(),
            pyro.poutine.block(),
            contextlib.suppress(Exception),
        ):
            fn(*ready.args, **ready.kwargs)
    return Program(fn, found)


def _choose_initial(strategy: Callable[[Site], Tensor]) -> Callable[[Site], Tensor]:
    def choose(site: Site) -> Tensor:
        if site["fn"].support is constraints.dependent or _is_discrete(site):
            raise UnsupportedModelError(
                f"site {site['name']!r} is discrete ({type(site['fn']).__name__}): discrete latents "
                "cannot be fitted yet; sum it out in the model (for a mixture, "
                "dist.MixtureSameFamily does it)"
            )
        try:
            with torch.no_grad():
                value = strategy(site)
        except Exception as error:
            raise ModelError(
                f"site {site['name']!r} has no initial value ({error}): "
                f"give one with init={{{site['name']!r}: ...}}"
            ) from error
        shape = site["fn"].batch_shape + site["fn"].event_shape
        try:
            value = value.expand(shape)
        except RuntimeError as error:
            raise ModelError(
                f"init[{site['name']!r}] has shape {tuple(value.shape)}, the site {tuple(shape)}"
            ) from error
        if not bool(site["fn"].support.check(value).all()):
            raise ModelError(f"init[{site['name']!r}] lies outside the site's support {site['fn'].support}")
        return value.detach().clone()

    return choose


def _is_discrete(site: Site) -> bool:
    fn = site["fn"]
    return bool(fn.support.is_discrete) or bool(getattr(fn, "has_enumerate_support", False))


def run_checked(
    program: Program, call: Arguments, params: Mapping[str, Tensor], choose: Any, what: str = "model"
) -> Execution:
    """One run with validation on; whatever goes wrong names the site."""
    last: list[str] = []

    def noting(site: Site) -> Tensor | None:
        last.append(site["name"])
        value: Tensor | None = choose(site)
        return value

    try:
        with pyro.validation_enabled(True):
            execution = program.run(call.args, call.kwargs, params, noting)
            for name, site in execution.sites.items():
                _check_site(name, site)
    except (ModelError, UnsupportedModelError):
        raise
    except Exception as error:
        where = f"after latent site {last[-1]!r}" if last else "before its first latent site"
        hint = ""
        if "dtype" in str(error) or "scalar type" in str(error):
            hint = (
                " (fits run in float64: pass float32 tensors that the model closes over in `data`, "
                "or make them with torch.get_default_dtype())"
            )
        raise ModelError(f"the {what} raised {type(error).__name__} {where}: {error}{hint}") from error
    return execution


def _check_site(name: str, site: Site) -> None:
    fn, value = site["fn"], site["value"]
    with torch.no_grad():
        try:
            log_prob = fn.log_prob(value)
        except Exception as error:
            observed = "observed value" if site["is_observed"] else "value"
            raise ModelError(f"site {name!r}: its {observed} does not fit {fn}: {error}") from error
    site["log_prob"] = log_prob
    for plate in plates_of(site):
        rows = log_prob.shape[plate.dim] if log_prob.dim() >= -plate.dim else 1
        if rows != plate.size:
            raise ModelError(
                f"site {name!r}: plate {plate.name!r} has size {plate.size}, "
                f"but the site has {rows} along its dimension {plate.dim}"
            )
    try:
        check_site_shape(site, max_plate_nesting=float("inf"))
    except ValueError as error:
        raise ModelError(
            f"site {name!r}: its log density has shape {tuple(log_prob.shape)}, which its plates do "
            f"not declare; put the site into a pyro.plate or use .to_event ({error})"
        ) from error
    keep = site["mask"] if isinstance(site["mask"], Tensor) else torch.tensor(site["mask"] is not False)
    if bool((torch.isnan(log_prob) & keep).any()) or (
        site["is_observed"] and bool((torch.isinf(log_prob) & keep).any())
    ):
        raise ModelError(
            f"site {name!r}: its log density is {'nan' if log_prob.isnan().any() else 'infinite'} at the "
            "initial values; look for NaN or infinite data there (mask missing values with obs_mask=), "
            "or give other initial values with init="
        )


def prototype(program: Program, call: Arguments, init: Any = None) -> Prototype:
    """Learn a model's structure; refuse what is random or changes between runs.

    Args:
        program: the model. Weights of its modules are bound to parameter names on the way.
        call: its data.
        init: initial values: None, a dict on the constrained scale, or a Pyro init strategy.

    Raises:
        ModelError: where the model raises, a site has the wrong shape or no finite density.
        UnsupportedModelError: for discrete latents, subsampling, random or dynamic structure.
    """
    strategy = init_strategy(init)
    program.own_weights({}, torch.get_default_dtype() if program.modules else None)
    first = run_checked(program, call, {}, _choose_initial(strategy))
    if first.subsampled:
        raise UnsupportedModelError(
            f"plate {first.subsampled[0]!r} draws a subsample: minibatches are not supported yet; "
            "give the plate all its rows"
        )
    parameters = parameters_of(program, first)
    known = [name for name, site in first.sites.items() if not site["is_observed"]]
    if isinstance(init, Mapping):
        message = unknown_names("init", init, [*known, *(p.name for p in parameters)])
        if message:
            raise ModelError(message)
        parameters = tuple(_with_init(p, init) for p in parameters)
    values = {name: first.sites[name]["value"] for name in known}
    latents = tuple(_latent(first.sites[name]) for name in known)
    params = {p.name: p.init for p in parameters}
    latents = _check_static(program, call, latents, values, params)
    return Prototype(
        latents,
        {name: plates_of(s) for name, s in first.sites.items() if s["is_observed"]},
        {name: plates_of(s) for name, s in first.deterministic.items()},
        {name: s["fn"].event_dim for name, s in {**first.sites, **first.deterministic}.items()},
        parameters,
    )


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
    return Parameter(parameter.name, parameter.constraint, value)


def parameters_of(program: Program, run: Execution) -> tuple[Parameter, ...]:
    """Parameters met in a run, weights of modules bound to their names on the way."""
    declared = pyro.get_param_store().get_state()["constraints"]
    paths: dict[str, str] = {}
    found = []
    for name, site in run.params.items():
        given = site["args"][1] if len(site["args"]) > 1 else None
        value = site["value"].detach().clone()
        if not value.is_floating_point():
            raise ModelError(f"parameter {name!r} has dtype {value.dtype}: give it a floating value")
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"parameter {name!r} starts at a non-finite value: {value}")
        if id(given) in program.weight_paths:
            paths[name] = program.weight_paths[id(given)]
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


def _latent(site: Site) -> Latent:
    fn = site["fn"]
    try:
        transform = bijector(fn.support)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"site {site['name']!r}: no bijector onto the support {fn.support} of {type(fn).__name__}"
        ) from error
    return Latent(site["name"], site["value"], transform, fn.support, plates_of(site), fn.event_dim)


def _check_static(
    program: Program,
    call: Arguments,
    latents: tuple[Latent, ...],
    values: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
) -> tuple[Latent, ...]:
    """Run again at the same values, then at others: what must not change, must not change."""

    def at(shift: float, only: Mapping[str, Tensor] | None = None) -> Execution:
        moved = {
            s.name: s.transform(s.unconstrained + shift * (1 if only is None else only.get(s.name, 0)))
            for s in latents
        }
        with torch.no_grad():
            return program.run(call.args, call.kwargs, params, lambda site: moved[site["name"]])

    try:
        base, again, moved = at(0.0), at(0.0), at(0.1)
    except KeyError as error:
        raise UnsupportedModelError(f"site {error} appears in some runs of the model only") from error
    for other in (again, moved):
        if [*other.sites] != [*base.sites]:
            changed = set(other.sites) ^ set(base.sites)
            raise UnsupportedModelError(f"sites {sorted(changed)} appear in some runs of the model only")
    for name in base.sites:
        if not torch.equal(_log_prob(base, name), _log_prob(again, name)):
            raise UnsupportedModelError(
                f"site {name!r} changes between runs at the same values: the model draws randomness "
                "that is no pyro.sample site"
            )
    for latent in latents:
        support = bijector(moved.sites[latent.name]["fn"].support)
        probe = latent.unconstrained + 0.1
        if not torch.equal(support(probe), latent.transform(probe)):
            raise UnsupportedModelError(
                f"site {latent.name!r}: its support {latent.support} depends on other sites or parameters; "
                "sample it on a fixed support and move it there with pyro.deterministic"
            )
    return tuple(_with_idle(latent, base, at) for latent in latents)


def _log_prob(run: Execution, name: str) -> Tensor:
    site = run.sites[name]
    value: Tensor = site["fn"].log_prob(site["value"])
    return value


def _with_idle(latent: Latent, base: Execution, at: Callable[..., Execution]) -> Latent:
    """Find masked elements that nothing else uses (as obs_mask= makes them)."""
    mask = base.sites[latent.name]["mask"]
    if mask is None or (isinstance(mask, bool) and mask):
        return latent
    off = ~torch.as_tensor(mask)
    off = off.expand(base.sites[latent.name]["fn"].batch_shape)
    if not bool(off.any()):
        return latent
    shape = off.shape + (1,) * (latent.unconstrained.dim() - off.dim())
    run = at(0.1, {latent.name: off.reshape(shape).to(latent.init.dtype)})
    used = any(not torch.equal(_masked(base, name), _masked(run, name)) for name in base.sites)
    if used:
        return latent
    return Latent(
        latent.name, latent.init, latent.transform, latent.support, latent.plates, latent.event_dim, off
    )


def _masked(run: Execution, name: str) -> Tensor:
    mask = run.sites[name]["mask"]
    log_prob = _log_prob(run, name)
    return log_prob if mask is None else torch.where(torch.as_tensor(mask), log_prob, 0.0)
