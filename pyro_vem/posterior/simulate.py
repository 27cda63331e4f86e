"""Data sets drawn from a model itself, put where its observations stand."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Unit
from torch import Tensor

from ..errors import ModelError, check_names
from ..fit.result import VEMResult
from ..model.data import Arguments
from ..model.runtime import Execution, Program, Site, is_deterministic, isolated
from ..model.sites import Latent

Key: TypeAlias = int | str  # position or name of an argument


@dataclass(frozen=True)
class _Place:
    """Where the value of an observed site stands in the call.

    Attributes:
        key: the argument.
        layout: size, strides and offset of the value in it; None if it is a copy of the whole.
    """

    key: Key
    layout: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, site: str, value: Tensor, slots: Mapping[Key, Tensor]) -> "_Place":
        """The argument that a value is, is a view of, or is equal to."""
        for key, base in slots.items():
            is_shared = base.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            if is_shared and base.dtype == value.dtype and value.numel() and 0 not in value.stride():
                return cls(key, (value.shape, value.stride(), value.storage_offset()))
        equal = [key for key, base in slots.items() if torch.equal(base.double(), value.double())]
        if len(equal) == 1:
            return cls(equal[0])
        found = f"the arguments {equal} are all" if equal else "no argument (of numbers) is"
        raise ModelError(
            f"site {site!r}: {found} equal to its observed value, so that simulated data have no place: "
            "make that value an argument of the model and pass it as obs= unchanged"
        )

    def write(self, base: Tensor, value: Tensor) -> Tensor:
        """The argument with a value in its place."""
        new = base.clone()
        target = new if self.layout is None else new.as_strided(*self.layout)
        target.copy_(value.reshape(target.shape))
        return new


def _slots(call: Arguments) -> dict[Key, Tensor]:
    """The arguments that are tensors; arrays have become such."""
    pairs: list[tuple[Key, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return {key: value for key, value in pairs if isinstance(value, Tensor)}


def replaced(call: Arguments, values: Mapping[Key, Tensor]) -> Arguments:
    """The call with other values of some arguments."""
    args = tuple(values.get(i, value) for i, value in enumerate(call.args))
    return Arguments(args, {name: values.get(name, value) for name, value in call.kwargs.items()})


class _Generative(Execution):
    """A run that draws every site, the observed ones too, and keeps what was observed."""

    def __init__(
        self, params: Mapping[str, Tensor], held: Mapping[str, Tensor], idle: frozenset[str]
    ) -> None:
        super().__init__(
            params, lambda site: held[site["name"]] if site["name"] in held else _drawn(site, idle)
        )
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] and not is_deterministic(msg):
            self.observed[msg["name"]] = msg["value"]
            msg["value"] = _drawn(msg, frozenset())
        super()._pyro_sample(msg)


def _drawn(site: Site, idle: frozenset[str]) -> Tensor:
    """A value from a site's distribution, which must be the whole of its term in the density."""
    name, fn = site["name"], site["fn"]
    if isinstance(fn, Unit):
        raise ModelError(f"site {name!r} is a pyro.factor: data cannot be drawn from it; use pyro.sample")
    if bool((torch.as_tensor(site["scale"]) != 1).any()):
        raise ModelError(f"site {name!r} is scaled: its density is not that of the draws; take the scale off")
    hold = "" if site["is_observed"] else f", or hold it in the simulations with params={{{name!r}: ...}}"
    if not site["is_observed"] and name not in idle and _is_masked(site):
        raise ModelError(f"site {name!r} is masked: it has no proper prior; give it one{hold}")
    try:
        value: Tensor = fn()
    except NotImplementedError as error:
        raise ModelError(
            f"site {name!r}: {type(fn).__name__} cannot be drawn from; give it a proper distribution{hold}"
        ) from error
    except Exception as error:
        raise ModelError(f"site {name!r}: drawing from {fn} failed: {error}") from error
    return value


def _is_masked(site: Site) -> bool:
    masks, fn = [site["mask"]], site["fn"]
    while fn is not None:
        masks.append(getattr(fn, "_mask", None))
        fn = getattr(fn, "base_dist", None)
    return any(mask is not None and not bool(torch.as_tensor(mask).all()) for mask in masks)


@dataclass(frozen=True)
class Task:
    """A simulated data set: new values of arguments, and the latents that they come from.

    Attributes:
        seeds: of the fit and of its draws.
        failure: why there is no data set.
    """

    index: int
    values: Mapping[Key, Tensor]
    truth: Mapping[str, Tensor]
    seeds: tuple[int, int]
    failure: str = ""


@dataclass(frozen=True)
class Simulator:
    """Draws data sets from a model at fixed parameters.

    Attributes:
        call: the user's data; every tensor owns its memory.
        params: parameters of the model.
        held: latents that are not drawn.
        latents: those that are drawn and ranked.
        idle: sites with elements that the model masks out and never uses.
        places: where values of observed sites stand.
        notes: what is held, in words.
    """

    program: Program
    call: Arguments
    params: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    latents: tuple[Latent, ...]
    idle: frozenset[str]
    seed: int
    notes: tuple[str, ...]
    places: Mapping[str, _Place] = field(default_factory=dict)

    @classmethod
    def of(cls, fit: VEMResult, params: Mapping[str, Any], seed: int) -> "Simulator":
        """A simulator that has simulated once, and found a place for every observed value."""
        setup, proto, call = fit.setup, fit.setup.prototype, fit.setup.problem.call
        own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in _slots(call).items()}
        given, names = _given(fit, params), [p.name for p in proto.parameters]
        points = setup.problem.map_sites
        latents = tuple(s for s in proto.latents if s.name not in points and s.name not in given)
        if not latents:
            raise ModelError("nothing to calibrate: no latent is left that is drawn and has a posterior")
        program = copy.copy(setup.problem.model)
        program.first_available_dim = None  # discrete sites are drawn, not summed out
        simulator = cls(
            program,
            replaced(call, own),
            {name: given.get(name, fit.params[name]) for name in names},
            {name: value for name, value in given.items() if name not in names},
            latents,
            frozenset(site.name for site in proto.latents if site.idle is not None),
            seed,
            tuple(_notes(fit, given)),
        )
        run = simulator._run(simulator._seeds(0)[0])
        if not run.observed:
            raise ModelError("the model has no observed site: give data with values for obs=")
        places = {name: _Place.of(name, value, own) for name, value in run.observed.items()}
        simulator = replace(simulator, places=places)
        simulator._check(run)
        return simulator

    def task(self, index: int) -> Task:
        """Data set number `index`; the same whichever others are drawn."""
        first, *others = self._seeds(index)
        seeds = others[0], others[1]
        try:
            run = self._run(first)
        except Exception as error:  # what is wrong with every data set was raised before
            text = f"the data could not be simulated: {type(error).__name__}: {error}"
            return Task(index, {}, {}, seeds, text)
        truth = {site.name: run.sites[site.name]["value"].detach() for site in self.latents}
        return Task(index, self._values(run), truth, seeds)

    def scalars(self) -> tuple[list[str], NDArray[np.bool_]]:
        """Names of the scalars that are ranked, and which of all they are."""
        names, kept = [], []
        for site in self.latents:
            indices = np.ndindex(*site.init.shape)
            names += [f"{site.name}{list(index) if index else ''}" for index in indices]
            kept.append((~site.idle_in(site.init)).numpy())
        keep = np.concatenate(kept)
        return [name for name, is_kept in zip(names, keep, strict=True) if is_kept], keep

    def _seeds(self, index: int) -> list[int]:
        """Of the data, the fit and its draws."""
        return [int(s) >> 1 for s in np.random.SeedSequence(self.seed, spawn_key=(index,)).generate_state(3)]

    def _run(self, seed: int) -> _Generative:
        run = _Generative(self.params, self.held, self.idle)
        with isolated(torch.float64, seed, threads=1), torch.no_grad():
            self.program.under(run, self.call.args, self.call.kwargs, self.params)
        return run

    def _values(self, run: _Generative) -> dict[Key, Tensor]:
        """New values of the arguments that hold observations; several sites may share one."""
        values = _slots(self.call)
        for name, place in self.places.items():
            values[place.key] = place.write(values[place.key], run.sites[name]["value"])
        return {place.key: values[place.key] for place in self.places.values()}

    def _check(self, run: _Generative) -> None:
        """Simulated data must reach their sites unchanged, and change nothing else."""
        call = replaced(self.call, self._values(run))
        values = {name: site["value"] for name, site in run.sites.items()}
        with isolated(torch.float64, threads=1), torch.no_grad():
            again = self.program.run(
                call.args, call.kwargs, self.params, lambda site: values.get(site["name"])
            ).sites
            for name in [name for name in run.observed if name in again]:
                if not torch.equal(again[name]["value"].double(), values[name].double()):
                    raise ModelError(
                        f"site {name!r}: simulated values do not come back from the argument "
                        f"{self.places[name].key!r} as they were: pass obs= the argument itself, a different "
                        "one for each site"
                    )
            for name in {**run.sites, **again}:
                if not (name in values and name in again and _is_same(run.sites[name], again[name])):
                    raise ModelError(
                        f"site {name!r}: its distribution depends on observed values that are not drawn "
                        "before it, so that data cannot be simulated; for a series, draw one site a step "
                        "and go on from the drawn value"
                    )


def _is_same(first: Site, second: Site) -> bool:
    """True if two runs give a site the same density, at the first's value."""
    one, other = (site["fn"].log_prob(first["value"]) for site in (first, second))
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)


def _given(fit: VEMResult, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The caller's values for parameters and latents, checked."""
    setup, proto = fit.setup, fit.setup.prototype
    known = {p.name: p.init for p in proto.parameters} | {site.name: site.init for site in proto.latents}
    check_names("params", params, known)
    given = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in params.items()}
    for name, value in given.items():
        shapes = tuple(value.shape), tuple(known[name].shape)
        if shapes[0] != shapes[1]:
            raise ModelError(f"params[{name!r}] has shape {shapes[0]}, not {shapes[1]}")
        if name in setup.held and not torch.equal(value, setup.held[name]):
            raise ModelError(f"params[{name!r}] is not the value of fixed=: give that value with init=")
    open_names = [p.name for p in proto.parameters if p.name not in given and p.name not in setup.held]
    if open_names and not fit.converged:
        raise ModelError(
            f"no estimates to simulate at: the fit to the data ended with {fit.status.name}; give values "
            f"of {', '.join(open_names)} with params="
        )
    return given


def _notes(fit: VEMResult, given: Mapping[str, Tensor]) -> Iterator[str]:
    """What is not drawn or not ranked."""
    setup, proto = fit.setup, fit.setup.prototype
    free = [p.name for p in proto.parameters if p.name not in setup.held]
    for origin, names in (
        ("given values", [name for name in free if name in given]),
        ("their estimates from the data", [name for name in free if name not in given]),
    ):
        if names:
            yield f"simulated with parameters at {origin}, estimated anew in every fit: {', '.join(names)}"
    points = [name for name in setup.problem.map_sites if name not in given]
    if points:
        yield f"MAP sites, drawn from their prior and not ranked: {', '.join(points)}"
    held = [site.name for site in proto.latents if site.name in given]
    if held:
        yield f"held at given values in the simulations and not ranked: {', '.join(held)}"
