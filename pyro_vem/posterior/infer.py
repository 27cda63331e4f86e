"""Factors of new rows, with all that was learnt held; and what an encoder loses against them."""

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ModelError
from ..fit.driver import climb
from ..fit.options import FitOptions
from ..fit.result import VEMResult
from ..fit.setup import Setup, encoded_moments, partly_held, set_up
from ..guides.amortized import AmortizedNormal
from ..guides.factorised import FactorisedNormal
from ..guides.mean_field import MeanFieldNormal
from ..model.batches import Source
from ..model.parameters import Parameter
from ..model.rows import rows_of
from ..model.runtime import isolated
from ..model.sites import Latent
from .sandwich import by_row

LOOKED_AT = 64  # rows on which plates are told apart
SHOWN = 5  # rows with the largest gaps
GAP_DRAWS = 64  # common to both sides of a gap, and more where they do not suffice
AT_ONCE = 16  # rows whose own factors are found together: more leave the processor's cache


def infer(fit: VEMResult, data: Any, *, refine: bool = False, seed: int = 0) -> VEMResult:
    """The posterior of new rows: an E-step with the parameters and the shared factors held.

    Shared are the factors of all latents outside the plates whose size is that of the data's arrays. (What
    rows see by an index, as ``theta[person]``, is shared.)

    Args:
        fit: the result, of a fit with `pyro_vem.MeanFieldNormal` or `pyro_vem.AmortizedNormal`.
        data: new rows, as `pyro_vem.fit_vem` takes them.
        refine: with an encoder, optimise each row's own factor from where the encoder puts it
            (semi-amortized inference); without, encoders answer alone.
        seed: of the fixed draws.

    Returns:
        A result on the new data: ``sample``, ``diagnose`` (with k-hat by row) and the rest work. Its
        ELBO is that of the new rows.

    Raises:
        ModelError: if the guide has no factors of rows, no plate follows the rows or no latent is in one
            that does, or what is held has another shape with the new data.

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-amortized variational autoencoders, ICML.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     mu = pyro.param("mu", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor([1.0, 2.0, 4.0, 5.0])}, progress=False)
        >>> new = fit.infer({"y": torch.tensor([3.0, 7.0, 9.0, 1.0])})
        >>> new.guide_params["guide.loc.z"].round(decimals=4)
        tensor([3., 5., 6., 2.], dtype=torch.float64)
    """
    begin = time.perf_counter()
    with isolated(torch.float64, seed, 1):
        setup = _held(fit, data, refine, seed, FitOptions())
        state, status, history, rounds = climb(setup, FitOptions(), begin)
        return VEMResult.of(setup, state, status, history, rounds, time.perf_counter() - begin, FitOptions())


def _held(fit: VEMResult, data: Any, refine: bool, seed: int, options: FitOptions) -> Setup:
    """The problem on new data, in which only factors of rows move."""
    model, guide = fit.setup.problem.model.fn, fit.setup.guide
    if not isinstance(guide, FactorisedNormal):
        raise _no_row_factors(fit.setup)
    fresh: Any = guide
    if refine and isinstance(guide, AmortizedNormal):
        fresh = MeanFieldNormal(model, init=guide.init, name=guide.name)
    setup = set_up(model, data, fresh, None, None, options, seed)
    rows = _row_plates(fit)
    assert isinstance(setup.guide, FactorisedNormal)
    inside = [s.name for s in setup.guide.latents() if s.is_in(rows)]
    for name in setup.map_sites_in(rows):
        raise ModelError(
            f"infer() holds values of map_sites, and {name!r} has one for each row: leave it out of "
            "map_sites, or fit anew from here: fit_vem(model, data, init=fit)"
        )
    if not inside:
        raise _nothing_moves(setup.guide.latents(), rows)
    moving = {n for s in inside for n in (setup.guide.loc_name(s), setup.guide.scale_name(s))}
    known = fit.guide_params
    _check_shapes(setup, {**known, **fit.params}, moving)
    held = {p.name: known[p.name] for p in setup.phi.parameters if p.name not in moving}
    parameters: tuple[Parameter, ...] = setup.phi.parameters
    if refine and isinstance(guide, AmortizedNormal):
        start = _encoded(fit, guide, data)
        parameters = tuple(replace(p, init=start.get(p.name, p.init)) for p in parameters)
    return partly_held(setup, parameters, held, fit.params)


def _no_row_factors(setup: Setup) -> ModelError:
    """The error under a guide without Gaussian factors of rows."""
    if setup.guide is not None:
        remedy = "fit with MeanFieldNormal(model) or AmortizedNormal, or anew: fit_vem(model, data, init=fit)"
    elif setup.prototype.summed_out:
        remedy = (
            "this model has discrete sites only. Hold its parameters, vem_model(fixed=tuple(fit.params)) on "
            "a function `held` that calls it, and fit_vem(held, data, init=fit.params).responsibilities()"
        )
    else:
        remedy = "this fit has no latents with a factor; fit.predict() and fit.log_likelihood() take new data"
    return ModelError(f"infer() needs Gaussian factors of rows: {remedy}")


def _nothing_moves(latents: tuple[Latent, ...], rows: frozenset[str]) -> ModelError:
    """The error where all latents are shared."""
    held = [f"{s.name!r}" + "".join(f" in plate {p.name!r}" for p in s.plates) for s in latents]
    return ModelError(
        f"infer() has nothing to move: plate {', '.join(map(repr, sorted(rows)))} follows the rows of the "
        f"data, and no latent is in it; held are {', '.join(held)}. Give each member of a latent's plate "
        "one row of the data (an array of members x observations, and pyro.plate('members', len(y))), or fit "
        "anew from here: fit_vem(model, data, init=fit)"
    )


def _check_shapes(setup: Setup, known: Mapping[str, Tensor], moving: Container[str]) -> None:
    """That whatever is held has the shape that it had in the fit."""
    guide = setup.guide
    assert isinstance(guide, FactorisedNormal)
    for parameter in (*setup.phi.parameters, *setup.theta.parameters):
        name = parameter.name
        if name in moving or known[name].shape == parameter.init.shape:
            continue
        held = next(
            (f"the factor of {s.name!r}" for s in guide.latents() if guide.is_of(name, s.name)), repr(name)
        )
        old, new = tuple(known[name].shape), tuple(parameter.init.shape)
        raise ModelError(
            f"infer() holds {held}, which has shape {old} in the fit and {new} with these data: of plates "
            "only those that follow the rows of the data may change size. Give the others the sizes that "
            "they had, or fit anew from here: fit_vem(model, data, init=fit)"
        )


def _row_plates(fit: VEMResult) -> frozenset[str]:
    """Plates that follow the rows of the data, seen on some rows of those of the fit."""
    model, call = fit.setup.problem.model.fn, fit.setup.problem.call
    return rows_of(Source.of(model, dict(call.kwargs) or call.args, LOOKED_AT, 0)).all_plates


def _encoded(fit: VEMResult, guide: AmortizedNormal, data: Any) -> dict[str, Tensor]:
    """What encoders say of new rows, as parameters of factors of their own."""
    encoder = set_up(fit.setup.problem.model.fn, data, guide, None, None, FitOptions(), 0)
    found: dict[str, Tensor] = {}
    for name, (loc, scale) in encoded_moments(encoder, fit.guide_params, encoder.problem.call).items():
        found |= {guide.loc_name(name): loc.detach(), guide.scale_name(name): scale.detach()}
    return found


@dataclass(frozen=True, eq=False)
class AmortizationGap:
    """What an encoder's factors lose against each row's own best ones, in nats.

    Attributes:
        plate: over the rows.
        rows: gap of each row, (rows,).
    """

    plate: str
    rows: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats a row."""
        return float(self.rows.mean())

    @property
    def worst(self) -> tuple[int, ...]:
        """Rows with the largest gaps, largest first."""
        return tuple(int(i) for i in np.argsort(-self.rows)[:SHOWN])

    def __str__(self) -> str:
        worst = ", ".join(f"{i} ({self.rows[i]:.2g})" for i in self.worst)
        return f"amortization gap {self.mean:.3g} nats a row of plate {self.plate!r}; largest: {worst}"


def amortization_gap(fit: VEMResult, data: Any = None, seed: int = 0) -> AmortizationGap:
    """How much higher the bound of each row would be with a factor of its own.

    Args:
        fit: the result, of a fit with `pyro_vem.AmortizedNormal`.
        data: rows to look at; None for those of the fit.
        seed: of the fixed draws, common to both.

    Raises:
        ModelError: if the guide has no encoder, or its sites are in different plates.

    References:
        Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders, ICML.
    """
    guide = fit.setup.guide
    if not isinstance(guide, AmortizedNormal):
        raise ModelError("the guide has no encoder: nothing is amortized")
    model, call = fit.setup.problem.model.fn, fit.setup.problem.call
    data = (dict(call.kwargs) or call.args) if data is None else data
    (plate,) = {p.name for s in guide.latents() if s.name in guide.encoded for p in s.plates[:1]}
    with isolated(torch.float64, seed, 1):
        source = Source.of(model, data, AT_ONCE, seed)
        if max(source.lengths, default=0) <= AT_ONCE:
            return AmortizationGap(plate, _gaps(fit, data, plate, seed))
        rows = rows_of(source)
        parts = source.epoch(rows.names, rows.total, 0, is_shuffled=False)
        gaps = [_gaps(fit, dict(part.kwargs), plate, seed) for _, part in parts]
    return AmortizationGap(plate, np.concatenate(gaps))


def _gaps(fit: VEMResult, data: Any, plate: str, seed: int) -> NDArray[np.float64]:
    own, draws = _bounds(fit, data, plate, True, seed, GAP_DRAWS)
    encoded, _ = _bounds(fit, data, plate, False, seed, draws)
    return own - encoded


def _bounds(
    fit: VEMResult, data: Any, plate: str, refine: bool, seed: int, draws: int
) -> tuple[NDArray[np.float64], int]:
    """The bound of each row, in nats, under an encoder or factors of their own; and on how many draws."""
    options = FitOptions(num_draws=draws)
    with pyro.get_param_store().scope():  # other numbers of rows have parameters of the same names
        setup = _held(fit, data, refine, seed, options)
        state, *_ = climb(setup, options, time.perf_counter())
    with torch.no_grad():
        phi = setup.phi.constrained(torch.as_tensor(state.phi))
        parts = setup.objective.row_parts(phi, setup.held, lambda p: by_row(p, plate))
    return parts.mean(0).numpy(), setup.objective.num_draws
