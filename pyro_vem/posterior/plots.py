"""Plots of a fit: matplotlib axes in, matplotlib axes out; ArviZ draws what it can."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ModelError, check_names
from ..fit.exactness import values_of
from ..fit.result import VEMResult
from ..fit.status import Step
from ..model.device import on_its_device
from ..model.runtime import isolated
from .comparison import Comparison
from .diagnose import Diagnosis
from .importance import KHAT_LIMIT

MOST_ROWS = 40  # of a forest


def elbo(fit: VEMResult, ax: Any = None) -> Any:
    """Distance of the bound to its final value over the steps of a fit, on a log scale, in nats.

    Args:
        fit: the result.
        ax: matplotlib axes; new ones by default.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        ...     pyro.sample("y", dist.Poisson(z), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor(2.0)}, progress=False)
        >>> elbo(fit).get_xlabel()
        'step'
    """
    ax = _axes(ax)
    final = fit.history[-1].after
    floor = 1e-12 * (1 + abs(final))
    colours = {"start": "0.6", "E": "C0", "M": "C1", "joint": "C2"}
    gaps = [max(final - after, floor) for after in _on_last_draws(fit.history)]
    ax.semilogy(range(1, len(gaps) + 1), gaps, color="0.8", zorder=0)
    for block, colour in colours.items():
        points = [
            (i + 1, gap)
            for i, (gap, row) in enumerate(zip(gaps, fit.history, strict=True))
            if row.block == block
        ]
        if points:
            label = block if block in ("start", "joint") else f"{block}-step"
            ax.scatter(*zip(*points, strict=True), color=colour, s=18, label=label)
    ax.set_xlabel("step")
    ax.set_ylabel("final bound - bound (nats)")
    ax.legend(frameon=False)
    return ax


def _on_last_draws(history: Sequence[Step]) -> list[float]:
    """The bound after each step, without what changed where the fit went over to other draws."""
    shift, found = 0.0, []
    for row, before in zip(reversed(history), [*reversed(history[:-1]), history[0]], strict=True):
        found.append(row.after + shift)
        shift += row.gain if row.draws != before.draws else 0.0
    return found[::-1]


@on_its_device
def terms_over_steps(fit: VEMResult, ax: Any = None) -> Any:
    """Each term of the bound after every step of a fit, in nats from its final value.

    Args:
        fit: the result; its guide and parameters have at most 100,000 numbers.
        ax: matplotlib axes; new ones by default.

    Raises:
        ModelError: for a loaded or very large fit, whose points on the way were not kept.
    """
    if not fit._points:
        raise ModelError("the points on the way of this fit were not kept: it was loaded, or is too large")
    setup = fit.setup
    values: dict[str, list[float]] = {}
    with isolated(torch.float64), torch.no_grad():
        for point in fit._points:
            found = setup.objective.terms(*values_of(setup, point.phi, point.theta))
            for name, value in found.items():
                values.setdefault(name, []).append(float(value))
    ax = _axes(ax)
    steps = range(1, len(fit._points) + 1)
    for name, series in values.items():
        ax.plot(steps, [value - series[-1] for value in series], marker="o", markersize=3, label=name)
    ax.axhline(0.0, color="0.8", linewidth=1, zorder=0)
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_xlabel("step")
    ax.set_ylabel("term - its final value (nats)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def terms(fit: VEMResult, ax: Any = None) -> Any:
    """The terms of the bound as bars, in nats; exact ones in one colour, sampled ones in another.

    Args:
        fit: the result.
        ax: matplotlib axes; new ones by default.
    """
    rows = fit.terms.rows[::-1]
    ax = _axes(ax, height=1.2 + 0.3 * len(rows))
    is_exact = [row.method in ("closed form", "quadrature") for row in rows]
    ax.barh(
        [f"{row.site} ({row.kind})" for row in rows],
        [row.value for row in rows],
        xerr=[2 * row.se for row in rows],
        color=["C0" if exact else "C1" for exact in is_exact],
    )
    ax.axvline(0.0, color="0.3", linewidth=0.8)
    ax.set_xlabel("nats")
    kinds = "blue: exact" + ("" if all(is_exact) else "; orange: sampled, with 2 standard errors")
    ax.set_title(f"ELBO {fit.elbo:.3f} nats ({kinds})", fontsize=11)
    return ax


def khat_rows(diagnosis: Diagnosis, ax: Any = None) -> Any:
    """k-hat of each row of local latents, with the limit of reliable weights.

    Args:
        diagnosis: what ``fit.diagnose()`` returned.
        ax: matplotlib axes; new ones by default.

    Raises:
        ModelError: if the model has no rows that can be judged one by one.
    """
    rows = diagnosis.rows
    if rows is None:
        raise ModelError("the model has no plate of latents whose rows can be judged one by one")
    ax = _axes(ax)
    high = rows.khat > KHAT_LIMIT
    index = np.arange(len(rows.khat))
    ax.scatter(index[~high], rows.khat[~high], s=12, color="C0")
    ax.scatter(index[high], rows.khat[high], s=18, color="C3")
    ax.axhline(KHAT_LIMIT, color="C3", linewidth=1, linestyle="--")
    ax.set_xlabel(f"row of {rows.plate}")
    ax.set_ylabel("k-hat")
    ax.set_ylim(bottom=min(-0.05, float(np.nanmin(rows.khat)) - 0.05))
    return ax


def _axes(ax: Any, height: float = 3.5) -> Any:
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6, height), layout="constrained")
    return ax


def forest(
    comparison: Comparison, ax: Any = None, var_names: Sequence[str] | None = None, scaled: bool = False
) -> Any:
    """Intervals of the fit, its corrected draws and NUTS, one above the other.

    Points are medians; thick lines hold the central 50 %, thin ones the central 90 % of the draws.

    Args:
        comparison: what ``fit.compare_nuts()`` returned.
        ax: matplotlib axes; new ones by default.
        var_names: sites to show; by default all, of many scalars those that differ most.
        scaled: distances from NUTS's mean in NUTS's sds, so that sites of different scales fit one axis.

    Raises:
        ValueError: if ``var_names`` has a site that is not compared.
    """
    table = comparison.table.reset_index(names="scalar")
    sites = table["scalar"].str.replace(r"\[.*", "", regex=True)
    if var_names is None:
        table = table.loc[table["wasserstein_sd"].nlargest(MOST_ROWS).index.sort_values()]
    else:
        check_names("var_names", var_names, dict.fromkeys(sites), ValueError)
        table = table[sites.isin(var_names)]
    ax = _axes(ax, height=1.3 + 0.3 * len(table))
    at = np.arange(len(table))
    shift, unit = (table["nuts_mean"], table["nuts_sd"]) if scaled else (0.0, 1.0)
    draws = comparison.draws
    for i, (name, values) in enumerate(draws.items()):
        y = at + 0.24 * (i - (len(draws) - 1) / 2)
        low, lower, median, upper, high = (
            (values[table["scalar"]].quantile(p).to_numpy() - shift) / unit
            for p in (0.05, 0.25, 0.5, 0.75, 0.95)
        )
        colour = {"VEM": "C0", "NUTS": "0.25"}.get(name, "C1")
        ax.hlines(y, low, high, color=colour, linewidth=1)
        ax.hlines(y, lower, upper, color=colour, linewidth=3)
        ax.plot(median, y, "o", color=colour, markersize=4, label=name)
    ax.set_yticks(at, table["scalar"])
    ax.set_ylim(len(table) - 0.4, -0.6)  # the first row on top
    for edge in at[1:]:
        ax.axhline(edge - 0.5, color="0.93", linewidth=0.8, zorder=0)
    ax.set_xlabel("distance from NUTS's mean, in NUTS's sds" if scaled else "value")
    doubt = "" if comparison.is_reference else "\nNUTS is no reference here: see reasons"
    ax.set_title(f"Medians, 50 % and 90 % intervals{doubt}", fontsize=11)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax
