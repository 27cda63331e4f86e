"""Plots of a fit: matplotlib axes in, matplotlib axes out; ArviZ draws what it can."""

from typing import Any

from ..fit.result import VEMResult


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
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
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
