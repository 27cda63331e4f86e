"""Results on disk: one safetensors file with tensors and JSON, no pickled code."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..bound.elbo import AnalyticKL_ELBO
from ..bound.tables import ElboTerms, Plan, PlanRow, TermRow
from ..errors import ModelError
from ..model.data import named_values
from ..model.device import device_of
from ..model.parameters import PartlyHeld
from ..model.runtime import isolated
from .edges import Edge
from .exactness import compile_terms, settle
from .options import FitOptions
from .result import VEMResult
from .setup import Setup, partly_held, set_up
from .starts import Start
from .state import state_at
from .status import Status, Step

FORMAT = "pyro_vem.result.2"


def save(fit: VEMResult, path: str | Path) -> None:
    """Write aside, flush to disk, then replace: a crash leaves the old file or the new one."""
    path = Path(path)
    tensors = {f"param/{name}": value for name, value in fit.params.items()}
    tensors |= {f"guide/{name}": value for name, value in fit.guide_params.items()}
    draws = 0
    setup = fit._setup
    is_of_batch = setup is not None and setup.problem.model.is_batched
    if setup is not None:
        sites = [site for site in setup.prototype.latents if not setup.processes.has(site.plates)]
        tensors |= {f"init/{site.name}": site.init for site in sites if not is_of_batch}
        draws = setup.objective.num_draws
    summary = {
        "format": FORMAT,
        "elbo": fit.elbo,
        "elbo_se": fit.elbo_se,
        "status": fit.status.name,
        "n_iter": fit.n_iter,
        "seconds": fit.seconds,
        "seed": fit.seed,
        "num_draws": draws,
        "on_batches": fit._whole is not None or is_of_batch,
        "processes": setup.processes.count if setup is not None else 1,
        "held": sorted(setup.phi.held) if setup is not None and isinstance(setup.phi, PartlyHeld) else None,
        "compiled": setup is not None and setup.objective.exact is not None,
        "analytic": setup.analytic if setup is not None else "auto",
        "bounds": setup.bounds if setup is not None else False,
        "history": [asdict(row) for row in fit.history],
        "plan": {"rows": [asdict(row) for row in fit.plan.rows], "notes": fit.plan.notes},
        "terms": asdict(fit.terms),
        "boundary": [asdict(edge) for edge in fit.boundary],
        "starts": [{**asdict(start), "status": start.status.name} for start in fit.starts],
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        contiguous = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(contiguous, name, metadata={"pyro_vem": json.dumps(summary)})
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(
    path: str | Path,
    model: Callable[..., Any],
    data: Any,
    guide: Any,
    wanted: torch.device | str | None = None,
) -> VEMResult:
    """Read what `save` wrote; with data, the problem is set up again around the numbers."""
    tensors, summary = _read(Path(path))
    device = device_of(named_values(data), wanted)
    tensors = {key: value.to(device) for key, value in tensors.items()}
    params, guide_params = _group(tensors, "param/"), _group(tensors, "guide/")
    setup = None
    if data is not None:
        try:
            init = {**_group(tensors, "init/"), **params}
            setup = _set_up_again(model, data, guide, summary, init, params, guide_params, device)
        except ModelError as error:
            raise ModelError(f"{path} does not fit this model and data: {error}") from error
        _check_same(path, setup, params, guide_params)
        is_own = summary.get("processes", 1) == 1 or summary["elbo_se"] == 0  # else on draws of each process
        if is_own and not summary["on_batches"]:  # else the last row of history is an average over batches
            _check_bound(path, setup, params, guide_params, summary["history"], device)
    plan = summary["plan"]
    rows = tuple(_row(PlanRow, row) for row in plan["rows"])
    terms = summary["terms"]
    return VEMResult(
        params,
        guide_params,
        summary["elbo"],
        summary["elbo_se"],
        Status[summary["status"]],
        summary["n_iter"],
        tuple(Step(**row) for row in summary["history"]),
        summary["seconds"],
        Plan(rows, tuple(plan["notes"])),
        ElboTerms(tuple(_row(TermRow, row) for row in terms["rows"]), terms["elbo"], terms["elbo_se"]),
        summary["seed"],
        setup,
        boundary=tuple(_edge(edge) for edge in summary.get("boundary", ())),
        starts=tuple(Start(**{**start, "status": Status[start["status"]]}) for start in summary["starts"]),
    )


def _edge(values: dict[str, Any]) -> Edge:
    return Edge(values["name"], tuple(values["index"]), values["limit"])


def _row(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{**values, "plates": tuple(values["plates"])})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            summary = json.loads((file.metadata() or {})["pyro_vem"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not a saved pyro_vem result ({error})") from error
    if summary.get("format") != FORMAT:
        raise ModelError(f"{path} has format {summary.get('format')!r}, this version reads {FORMAT!r}")
    return tensors, summary


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _set_up_again(
    model: Callable[..., Any],
    data: Any,
    guide: Any,
    summary: dict[str, Any],
    init: dict[str, Tensor],
    params: dict[str, Tensor],
    guide_params: dict[str, Tensor],
    device: torch.device,
) -> Setup:
    options = FitOptions(num_draws=summary["num_draws"] or FitOptions.num_draws, compiled=summary["compiled"])
    with isolated(torch.float64, summary["seed"], device=device):
        elbo = AnalyticKL_ELBO(analytic=summary["analytic"], bounds=summary["bounds"])
        setup = set_up(model, data, guide, elbo, init, options, summary["seed"])
        if summary.get("held") is not None:  # the result of infer()
            held = {name: guide_params[name] for name in summary["held"]}
            setup = partly_held(setup, setup.phi.parameters, held, params)
        phi = setup.phi.constrained(setup.phi.initial())
        compile_terms(setup, options)
        setup.objective.prepare(phi, setup.theta_values(setup.theta.initial()))
    return setup


def _check_same(
    path: str | Path, setup: Setup, params: dict[str, Tensor], guide_params: dict[str, Tensor]
) -> None:
    theta = setup.theta_values(setup.theta.initial())
    phi = setup.phi.constrained(setup.phi.initial())
    for what, stored, here in (("model", params, theta), ("guide", guide_params, phi)):
        shapes = {name: tuple(value.shape) for name, value in stored.items()}
        expected = {name: tuple(value.shape) for name, value in here.items()}
        if shapes != expected:
            raise ModelError(
                f"{path} belongs to another {what}: it has parameters {shapes}, this {what} {expected}"
            )


def _check_bound(
    path: str | Path,
    setup: Setup,
    params: dict[str, Tensor],
    guide_params: dict[str, Tensor],
    history: Any,
    device: torch.device,
) -> None:
    """Other data of the same shape give another bound on the same draws."""
    if not history:
        return
    stored = history[-1]["after"]
    with isolated(torch.float64, device=device), torch.no_grad():
        settle(setup, state_at(setup, guide_params, params, stored))
        here = float(setup.objective.value(guide_params, params))
    if abs(here - stored) > 1e-6 * (1 + abs(stored)):
        raise ModelError(
            f"{path} was fitted to other data: its bound is {stored:.8g} nats on the fixed draws, and here "
            f"{here:.8g}; load it with the data of the fit, then ask fit.model for predictions of others"
        )
