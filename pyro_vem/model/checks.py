"""Runs with every check on: whatever goes wrong names its site."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.util import check_site_shape
from torch import Tensor

from ..errors import ModelError, UnsupportedModelError
from .data import Arguments
from .density import lean_log_prob
from .dtypes import dtype_advice
from .runtime import Execution, Program, Site, is_summed_out
from .sites import Plate, plates_of

SingularMatrix: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What torch raises at a covariance that is singular; its type stubs do not know it."""


@contextmanager
def regular(where: str) -> Iterator[None]:
    """Say in our words that a matrix is singular, and where.

    Example:
        >>> with regular("the start"):
        ...     torch.linalg.cholesky(torch.zeros(2, 2))
        Traceback (most recent call last):
        ...
        pyro_vem.errors.ModelError: a matrix of the model is singular at the start ...
    """
    try:
        yield
    except SingularMatrix as error:
        raise ModelError(
            f"a matrix of the model is singular at {where} ({error}): add a small number to its diagonal"
        ) from error


def run_checked(
    program: Program, call: Arguments, params: Mapping[str, Tensor], choose: Any, what: str = "model"
) -> Execution:
    """One run with validation on; whatever goes wrong names the site."""
    execution = Execution(params, choose)
    try:
        with pyro.validation_enabled(True):
            program.under(execution, call.args, call.kwargs, params)
            first = program.first_available_dim
            nesting = float("inf") if first is None else -1 - first
            for name, site in execution.sites.items():
                _check_site(name, site, nesting)
    except (ModelError, UnsupportedModelError):
        raise
    except Exception as error:
        for name, param in execution.params.items():
            check_parameter(name, param["value"])
        visited = execution.visited
        where = f"at or after {visited[-1]!r}" if visited else "before its first site"
        hint = dtype_advice(error)
        if "can require gradients" in str(error):
            hint = " (give the parameter a floating value)"
        elif "inference tensor" in str(error).lower():
            hint = (
                " (pass tensors of inference mode that the model closes over in `data`, or clone them before)"
            )
        elif call.lists:
            hint += (
                f" (data {', '.join(map(repr, call.lists))} are lists: give arrays for what it computes with)"
            )
        raise ModelError(f"the {what} raised {type(error).__name__} {where}: {error}{hint}") from error
    return execution


def _check_site(name: str, site: Site, nesting: float | int) -> None:
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor):
        raise ModelError(f"site {name!r}: its value is a {type(value).__name__}: give an array or a tensor")
    if value.is_floating_point() and bool(torch.isnan(value).any()):
        raise ModelError(
            f"site {name!r}: its value has NaN in it; mask missing values with obs_mask=, and fill their "
            "places with a number (torch.nan_to_num)"
        )
    for plate in plates_of(site):
        if not is_summed_out(site):
            _check_plate(name, plate, value.shape[: value.dim() - fn.event_dim])
    with torch.no_grad():
        try:
            log_prob = lean_log_prob(fn, value)
        except Exception as error:
            observed = "observed value" if site["is_observed"] else "value"
            is_count = isinstance(error, RuntimeError) and not value.is_floating_point()
            hint = " (give it as floating numbers)" if is_count else ""
            raise ModelError(f"site {name!r}: its {observed} does not fit {fn}: {error}{hint}") from error
    site["log_prob"] = log_prob
    try:
        check_site_shape(site, max_plate_nesting=nesting)
    except ValueError as error:
        raise ModelError(
            f"site {name!r}: its log density has shape {tuple(log_prob.shape)}, which its plates do "
            f"not declare; put the site into a pyro.plate or use .to_event ({error})"
        ) from error
    keep = site["mask"] if isinstance(site["mask"], Tensor) else torch.tensor(site["mask"] is not False)
    if bool((torch.isnan(log_prob) & keep).any()) or (
        site["is_observed"] and bool((_is_infinite(log_prob, nesting) & keep).any())
    ):
        raise ModelError(
            f"site {name!r}: its log density is {'nan' if log_prob.isnan().any() else 'infinite'} at the "
            "initial values; look for NaN or infinite data there (mask missing values with obs_mask=), "
            "or give other initial values with init="
        )


def _is_infinite(log_prob: Tensor, nesting: float | int) -> Tensor:
    """Where a density is infinite, or zero whatever the discrete sites are that it depends on."""
    is_zero = log_prob == -torch.inf
    while is_zero.dim() > nesting:
        is_zero = is_zero.all(0)
    return (log_prob == torch.inf) | is_zero


def _check_plate(name: str, plate: Plate, batch: torch.Size) -> None:
    rows = batch[plate.dim] if len(batch) >= -plate.dim else 1
    if rows != plate.size:
        raise ModelError(
            f"site {name!r}: plate {plate.name!r} has size {plate.size}, "
            f"but the site has {rows} along its dimension {plate.dim}"
        )


def check_parameter(name: str, value: Tensor) -> None:
    """Raise `ModelError` for a value that is not floating or not finite."""
    if not value.is_floating_point():
        raise ModelError(f"parameter {name!r} has dtype {value.dtype}: give it a floating value")
    if not bool(torch.isfinite(value).all()):
        raise ModelError(f"parameter {name!r} starts at a non-finite value: {value.tolist()}")
