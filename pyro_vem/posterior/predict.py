"""Predictive draws and pointwise log likelihoods, at the fitted data or at new ones."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ..bound.groups import flattened, grouped
from ..bound.lifted.marginal import Marginal
from ..errors import ModelError
from ..fit.result import VEMResult
from ..guides.factorised import Factorised
from ..model.data import Arguments, arguments
from ..model.runtime import Site, is_deterministic, isolated
from ..model.sites import latent_of, plates_of
from ..model.together import one_by_one

Kind: TypeAlias = Literal["posterior", "prior"]
Draws: TypeAlias = dict[str, dict[str, Tensor]]
_Sites: TypeAlias = tuple[dict[str, Site], dict[str, Site], dict[str, Tensor]]


def predict(
    fit: VEMResult,
    num_draws: int = 1000,
    *,
    data: Any = None,
    kind: Kind = "posterior",
    correction: str | None = None,
    seed: int = 0,
) -> Draws:
    """Draws of the latents and of the data that they predict; arguments as in `pyro_vem.VEMResult.predict`.

    Returns:
        "latents" (deterministic sites included) and "observed" (draws of the observed sites), each
        shaped ``(num_draws, *site)``. Where a plate of the new data has another size than it had,
        the latents inside it are new ones: they are drawn from their prior given the others, or
        from the guide where that is a function of the data, as an encoder is. Discrete sites that
        the fit sums out are always new.

    Raises:
        ModelError: if the model does not run on the new data, or a correction is asked for there of
            a guide that is a function of the data.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws}: at least one draw is needed")
    if kind not in ("posterior", "prior"):
        raise ValueError(f"kind={kind!r}: choose 'posterior' or 'prior'")
    call = _call(fit, data)
    values: Mapping[str, Tensor] = {}
    if kind == "posterior":
        values = _latents(fit, call, num_draws, seed, correction)

    def one(draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        observed, latents, _ = _run(fit, call, draw, is_predicting=True)
        sites = {"latents": latents, "observed": observed}
        return flattened({group: {n: s["value"] for n, s in own.items()} for group, own in sites.items()})

    return grouped(_each(one, values, num_draws, _stream(seed, 1)), ("latents", "observed"))


def log_likelihood(
    fit: VEMResult,
    num_draws: int = 1000,
    *,
    data: Any = None,
    correction: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Log density of every observation under posterior draws.

    Args:
        fit: the result.
        num_draws: draws.
        data: new data, observations included; None for the data of the fit.
        correction: as in ``fit.sample``.
        seed: of the draws.

    Returns:
        A tensor shaped ``(num_draws, *rows)`` for each observed site, in nats. Where several sites
        share discrete ones (steps of a hidden Markov chain, say), their joint density stands at the
        first of them, and the others are left out.
    """
    if data is None:
        return fit.draw(num_draws, seed, "log_likelihood", correction=correction)["log_likelihood"]
    call = _call(fit, data)

    def one(draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        observed, _, rows = _run(fit, call, draw, is_predicting=False)
        for name, site in observed.items():
            if not site["is_observed"]:
                raise ModelError(
                    f"site {name!r} has no observation in the new data: there is no likelihood of it"
                )
        return rows

    values = _latents(fit, call, num_draws, seed, correction)
    return _each(one, values, num_draws, _stream(seed, 1))


class _Unobserved(UnconditionMessenger):  # type: ignore[misc]
    """Observed sites are drawn; deterministic ones, which are observed in Pyro's records, stay."""

    def _pyro_sample(self, msg: Site) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def _run(fit: VEMResult, call: Arguments, values: Mapping[str, Tensor], is_predicting: bool) -> _Sites:
    """One run of the model: sites of positive size, the observed ones apart, and their log densities."""
    setup = fit.setup
    program = copy.copy(setup.problem.model)
    if is_predicting:
        program.fn = _Unobserved()(program.fn)
        program.first_available_dim = None  # discrete sites are drawn, not summed out
    given = {**values, **{name: fit.params[name] for name in setup.problem.map_sites}}

    def choose(site: Site) -> Tensor | None:
        value = given.get(site["name"])
        if value is not None and value.shape != site["fn"].shape():
            shapes = f"{tuple(value.shape)} in the fit and {tuple(site['fn'].shape())} with these data"
            raise ModelError(
                f"site {site['name']!r} has shape {shapes}: put what grows with the data into a plate, so "
                "that new elements are new latents"
            )
        return value

    run = program.run(call.args, call.kwargs, fit.params, choose)
    sites = {name: site for name, site in (run.sites | run.deterministic).items() if site["value"].numel()}
    observed = {name: site for name, site in sites.items() if name in setup.prototype.observed}
    rows: dict[str, Tensor] = {}
    if not is_predicting:
        marginal = Marginal.of(run)
        rows = {name: marginal.density(sites[name]) for name in marginal.likelihood if name in sites}
    return observed, {name: site for name, site in sites.items() if name not in observed}, rows


def _call(fit: VEMResult, data: Any) -> Arguments:
    problem = fit.setup.problem
    if data is None:
        return problem.call
    return arguments(problem.model.fn, data).to(fit.device).cast(torch.float64)


def _latents(
    fit: VEMResult, call: Arguments, num_draws: int, seed: int, correction: str | None
) -> dict[str, Tensor]:
    """Posterior draws of the latents that a run on this call still has."""
    setup = fit.setup
    if setup.guide is None:
        return {}
    guide = setup.guide
    # A guide that is not ours may be a function of the data: it is run on the new ones.
    latents = [site.name for site in setup.latents]
    encoded = guide.encoded if isinstance(guide, Factorised) else tuple(latents)
    if encoded and correction is not None and call is not setup.problem.call:
        raise ModelError(
            f"correction={correction!r} is of the draws at the fitted data, and the guide makes new ones of "
            f"{', '.join(map(repr, encoded))} here: leave it out, or fit with MeanFieldNormal(model)"
        )
    drawn = fit.sample(num_draws, seed, correction)  # type: ignore[arg-type]
    values = {name: value for name, value in drawn.items() if name in latents}
    if call is setup.problem.call:
        return values
    sizes = _plate_sizes(fit, call)
    old = {plate.name: plate.size for site in setup.prototype.latents for plate in site.plates}
    changed = {name for name, size in sizes.items() if old.get(name, size) != size}
    for site in setup.prototype.latents:
        is_new = changed & {plate.name for plate in site.plates} or site.idle is not None
        if site.name in values and (is_new or site.name in encoded):
            del values[site.name]
    return values | _encoded(fit, call, tuple(encoded), num_draws, seed)


def _plate_sizes(fit: VEMResult, call: Arguments) -> dict[str, int]:
    """Sizes of the plates at new data, from one run without posterior draws."""
    try:
        with isolated(torch.float64, 0), torch.no_grad():
            observed, latents, _ = _run(fit, call, {}, is_predicting=True)
    except Exception as error:
        raise ModelError(
            f"the model does not run on the new data ({error}); give every argument that has no default, "
            "and None for observations that are to be predicted"
        ) from error
    sites = [*latents.values(), *observed.values()]
    return {plate.name: plate.size for site in sites for plate in plates_of(site)}


def _encoded(
    fit: VEMResult, call: Arguments, names: tuple[str, ...], num_draws: int, seed: int
) -> dict[str, Tensor]:
    """Draws of the sites that an encoder makes, from the new data."""
    if not names or fit.setup.problem.guide is None:
        return {}
    program, guide = copy.copy(fit.setup.problem.guide), fit.setup.guide
    if isinstance(guide, Factorised):  # its sites have the shapes of the fitted data
        with isolated(torch.float64, seed), torch.no_grad():
            sites = _run(fit, call, {}, is_predicting=True)[1]
        program.fn = guide.bind(tuple(latent_of(sites[name]) for name in names))

    def one(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            run = program.run(call.args, call.kwargs, fit.guide_params, lambda site: site["fn"].sample())
        except Exception as error:
            raise ModelError(f"the guide does not run on the new data: {error}") from error
        return {name: run.sites[name]["value"] for name in names}

    return _each(one, {}, num_draws, _stream(seed, 2))


def _stream(seed: int, number: int) -> int:
    """The seed of another stream than that of ``fit.sample``: else data have the noise of their latents."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _each(
    one: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    values: Mapping[str, Tensor],
    num_draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """`one` at every draw, one after another: many samplers of torch refuse vmap."""
    with isolated(torch.float64, seed), torch.no_grad():
        return one_by_one(one, values, num_draws)
