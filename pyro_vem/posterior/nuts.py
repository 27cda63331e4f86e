"""A fit beside NUTS, on the same model, data and parameters."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from ..errors import ModelError
from ..fit.result import VEMResult
from ..model.runtime import isolated
from .arviz import nuts_data, to_arviz


@dataclass(frozen=True, repr=False)
class Comparison:
    """A fit and a NUTS run, scalar by scalar.

    Attributes:
        table: a row for each scalar: mean_diff_sd (VEM mean - NUTS mean, in NUTS sds), sd_ratio
            (VEM sd / NUTS sd), both means and sds, and NUTS's own r_hat and ess_bulk.
        idata_vem, idata_nuts: ArviZ data of the two.
        seconds_vem, seconds_nuts: wall time of the fit and of sampling (nan for draws brought along).
        note: what the comparison holds fixed.
    """

    table: pd.DataFrame
    idata_vem: Any
    idata_nuts: Any
    seconds_vem: float
    seconds_nuts: float
    note: str

    def plot(self, ax: Any = None, **kwargs: Any) -> Any:
        """Intervals of both, see `pyro_vem.posterior.plots.forest`."""
        from .plots import forest

        return forest(self, ax, **kwargs)

    def __repr__(self) -> str:
        text: str = self.table.to_string(float_format=lambda value: f"{value:.3f}", max_rows=40)
        return f"{text}\nVEM {self.seconds_vem:.1f} s, NUTS {self.seconds_nuts:.1f} s. {self.note}".rstrip()


def compare_nuts(
    fit: VEMResult,
    *,
    posterior: Any = None,
    num_chains: int = 4,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_draws: int = 4000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Comparison:
    """Hold a fit against NUTS on the same model, with theta at its estimate.

    Args:
        fit: the result.
        posterior: a Pyro ``MCMC`` object or ArviZ data that you already have; by default Pyro's
            NUTS is run, one chain after another, each started at a draw from the guide.
        num_chains: chains of the NUTS run.
        num_samples: draws kept of each chain.
        warmup_steps: adaptation steps of each chain.
        num_draws: draws from the guide.
        coords: as in ``fit.to_arviz``.
        dims: as in ``fit.to_arviz``.
        progress: NUTS's bars; None shows them in a terminal only.
        seed: of both.

    Returns:
        A `Comparison`.

    Raises:
        ModelError: if there is no latent to sample, or ``posterior`` has no scalar in common.

    References:
        Hoffman and Gelman (2014), The No-U-Turn sampler, JMLR 15.
    """
    if fit.setup.problem.guide is None:
        raise ModelError("nothing to compare: every latent is in map_sites, or there is none")
    idata_vem = to_arviz(fit, coords=coords, dims=dims, num_draws=num_draws, seed=seed)
    seconds = float("nan")
    if posterior is None:
        start = time.perf_counter()
        chains, stats = _run_nuts(fit, num_chains, num_samples, warmup_steps, progress, seed)
        seconds = time.perf_counter() - start
        posterior = nuts_data(fit, chains, stats, dims, coords)
    elif isinstance(posterior, MCMC):
        posterior = nuts_data(fit, posterior.get_samples(group_by_chain=True), {}, dims, coords)
    held = ", ".join(fit.params)
    note = f"Parameters held at their estimates in both: {held}." if held else ""
    table = _table(idata_vem, posterior)
    return Comparison(table, idata_vem, posterior, fit.seconds, seconds, note)


def _run_nuts(
    fit: VEMResult, num_chains: int, num_samples: int, warmup_steps: int, progress: bool | None, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import sys

    starts = fit.sample(num_chains, seed=seed + 1)
    is_shown = sys.stderr.isatty() if progress is None else progress
    runs: list[dict[str, Tensor]] = []
    diverging = []
    with isolated(torch.float64, seed):
        model = fit.setup.problem.bound_model(fit.params)
        for chain in range(num_chains):
            pyro.set_rng_seed(seed + chain)
            values = {name: value[chain] for name, value in starts.items()}
            kernel = NUTS(model, init_strategy=init_to_value(values=values))
            mcmc = MCMC(kernel, num_samples, warmup_steps=warmup_steps, disable_progbar=not is_shown)
            mcmc.run()
            runs.append(mcmc.get_samples())
            flags = torch.zeros(num_samples, dtype=torch.bool)
            flags[list(mcmc.diagnostics()["divergences"]["chain 0"])] = True
            diverging.append(flags)
        chains = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
        flat = {name: value.flatten(0, 1) for name, value in chains.items()}
        derived = fit.setup.objective.deterministic(fit.params, flat)
    for name, value in derived.items():
        chains[name] = value.unflatten(0, (num_chains, num_samples))
    return chains, {"diverging": torch.stack(diverging)}


def _table(idata_vem: Any, idata_nuts: Any) -> pd.DataFrame:
    import arviz as az

    shared = [name for name in idata_vem.posterior.data_vars if name in idata_nuts.posterior.data_vars]
    if not shared:
        raise ModelError(
            f"the NUTS draws have none of the fit's sites {list(idata_vem.posterior.data_vars)}; "
            f"they have {list(idata_nuts.posterior.data_vars)}"
        )
    vem = az.summary(idata_vem, var_names=shared, kind="stats", round_to="none")
    nuts = az.summary(idata_nuts, var_names=shared, round_to="none")
    index = [name for name in vem.index if name in nuts.index]
    vem, nuts = vem.loc[index], nuts.loc[index]
    return pd.DataFrame(
        {
            "mean_diff_sd": (vem["mean"] - nuts["mean"]) / nuts["sd"],
            "sd_ratio": vem["sd"] / nuts["sd"],
            "vem_mean": vem["mean"],
            "vem_sd": vem["sd"],
            "nuts_mean": nuts["mean"],
            "nuts_sd": nuts["sd"],
            "r_hat": nuts["r_hat"],
            "ess_bulk": nuts["ess_bulk"],
        }
    )
