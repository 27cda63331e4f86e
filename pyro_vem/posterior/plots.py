"""Plots of a fit: matplotlib axes in, matplotlib axes out; ArviZ draws what it can."""

from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from ..fit.result import VEMResult
from ..model.runtime import isolated
from .diagnose import Diagnosis
from .importance import KHAT_LIMIT


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
    gaps = [max(final - row.after, floor) for row in fit.history]
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
            phi = setup.phi.constrained(torch.from_numpy(point.phi))
            found = setup.objective.terms(phi, setup.theta_values(torch.from_numpy(point.theta)))
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


def forest(comparison: Any, ax: Any = None, **kwargs: Any) -> Any:
    """Intervals of the fit and of NUTS side by side, by ``arviz.plot_forest``.

    Points are medians; thick bars hold 50 %, thin ones 90 % of the draws (highest density).

    Args:
        comparison: what ``fit.compare_nuts()`` returned.
        ax: matplotlib axes; new ones by default.
        kwargs: passed on, for example ``var_names``.
    """
    import arviz as az
    import matplotlib.pyplot as plt

    if ax is None:
        names = kwargs.get("var_names", list(comparison.idata_vem.posterior.data_vars))
        rows = sum(comparison.idata_vem.posterior[name][0, 0].size for name in names)
        _, ax = plt.subplots(figsize=(7, 1.2 + 0.32 * rows), layout="constrained")
    defaults = {"combined": True, "hdi_prob": 0.9, "colors": ["C0", "C1"], "textsize": 10}
    axes = az.plot_forest(
        [comparison.idata_vem, comparison.idata_nuts],
        model_names=["VEM", "NUTS"],
        ax=ax,
        **{**defaults, **kwargs},
    )
    ax = axes.ravel()[0]
    ax.set_title("Median, 50 % and 90 % intervals", fontsize=11)
    return ax
