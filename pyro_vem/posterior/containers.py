"""ArviZ's two generations: InferenceData (0.x) and xarray's DataTree (1.x, Python 3.12 and later)."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from ..errors import warn

Array: TypeAlias = npt.NDArray[Any]
Vector: TypeAlias = npt.NDArray[np.float64]
Variables: TypeAlias = Mapping[str, tuple[Sequence[str], Array]]  # names of the dimensions, values


FEWEST = 25  # draws of which a tail can be fitted


def has_trees() -> bool:
    """Whether the installed ArviZ keeps its data in DataTrees."""
    import arviz as az

    return int(az.__version__.split(".")[0]) >= 1


def container(
    groups: Mapping[str, Variables],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, Mapping[str, Any]],
) -> Any:
    """Groups of named arrays in the container of the installed ArviZ.

    Args:
        groups: variables by group; empty groups are left out.
        coords: labels by dimension; 0, 1, ... for the others.
        attrs: attributes by group.

    Returns:
        An ``arviz.InferenceData`` or ``xarray.DataTree`` with equal groups.

    Raises:
        ValueError: if sizes or labels of a dimension disagree.

    Example:
        >>> x = np.zeros((1, 5, 2))
        >>> data = container({"posterior": {"a/x": (["chain", "draw", "row"], x)}}, {"row": "AB"}, {})
        >>> data.posterior["a.x"].sel(row="B").dims
        ('chain', 'draw')
    """
    import arviz as az
    import xarray as xr

    common = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "pyro_vem",
        "creation_library": "ArviZ",
        "creation_library_version": az.__version__,
    }
    given = {_plain(dim): list(labels) for dim, labels in coords.items()}
    datasets = {}
    for group, variables in groups.items():
        if not variables:
            continue
        named = {
            _plain(name): ([_plain(dim) for dim in dims], value) for name, (dims, value) in variables.items()
        }
        sizes = {
            dim: size for dims, value in named.values() for dim, size in zip(dims, value.shape, strict=True)
        }
        labels = {dim: given.get(dim, np.arange(size)) for dim, size in sizes.items()}
        datasets[group] = xr.Dataset(named, labels, {**common, **attrs.get(group, {})})
    return xr.DataTree.from_dict(datasets) if has_trees() else az.InferenceData(**datasets)


def _plain(name: str) -> str:
    """Names of ``pyro.poutine.scope`` have slashes, which separate groups in files and trees."""
    return name.replace("/", ".")


def psis(log_ratio: Vector) -> tuple[Vector, float]:
    """Pareto-smoothed importance weights of independent draws, and their k-hat.

    Args:
        log_ratio: log density of the target less that of the draws, in nats, (draws,).

    Returns:
        Log weights, (draws,), whose exponentials sum to one; and the Pareto tail index. Constant
        ratios have equal weights and 0. Where no tail can be fitted (fewer than 25 draws, or one
        value in all of the tail) weights are as they are and the index is infinite; it is so
        too if a ratio is nan or infinite, and no draw has a weight then (nan). Draws of density zero
        (log ratio -inf) have weight zero.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
        JMLR 25(72).

    Example:
        >>> log_weights, khat = psis(np.zeros(200))
        >>> float(np.exp(log_weights).sum().round(12)), khat
        (1.0, 0.0)
    """
    if np.isnan(log_ratio).any() or log_ratio.max() in (np.inf, -np.inf):
        return np.full(len(log_ratio), np.nan), np.inf
    plain = log_ratio - logsumexp(log_ratio)
    # A guide that is the posterior has constant ratios: no tail to fit.
    if np.ptp(log_ratio) < 1e-6 * (1 + abs(log_ratio[0])):
        return plain, 0.0
    if np.isfinite(log_ratio).sum() < FEWEST:
        return plain, np.inf
    if has_trees():
        from arviz_stats.base import array_stats

        try:
            log_weights, khat = array_stats.psislw(-plain)  # takes log likelihoods: the sign is another
        except ValueError:  # no tail
            return plain, np.inf
    else:
        import arviz as az

        with np.errstate(over="ignore"):  # its fit of a very long tail overflows to the right answer
            log_weights, khat = az.psislw(plain)
    return np.asarray(log_weights, dtype=np.float64), float(khat)


def approximate_loo(data: Any, names: Sequence[str]) -> Any:
    """Leave-one-out predictive densities from draws of an approximate posterior.

    Row i has the weights exp(log p - log q) / p(y_i | draw), Pareto-smoothed. ArviZ 1.x has a
    function for it; for 0.x it is here, and gives what its ``loo`` would with these weights.

    Args:
        data: what `container` made, with ``sample_stats`` (``lp``, ``log_q``) and ``log_likelihood``.
        names: the observed sites; rows of several are added up (in `data`, at the first).

    Returns:
        ArviZ's ``ELPDData`` with pointwise values and k-hats.
    """
    import arviz as az

    stats, (variable, *others) = data.sample_stats, map(_plain, names)
    for other in others:
        data.log_likelihood[variable] = data.log_likelihood[variable] + data.log_likelihood[other]
    if has_trees():
        return az.loo_approximate_posterior(data, stats["lp"], stats["log_q"], True, variable)
    rows = data.log_likelihood[variable].stack(__sample__=("chain", "draw"))
    ratio = (stats["lp"] - stats["log_q"]).stack(__sample__=("chain", "draw"))
    log_weights, khat = az.psislw(-rows + ratio)
    elpd = (log_weights + rows).reduce(logsumexp, "__sample__").rename("loo_i")
    num, count = rows.sizes["__sample__"], elpd.size
    # Of the draws as they are, as ArviZ 1.x and R's loo have it.
    in_sample = rows.reduce(logsumexp, "__sample__") - np.log(num)
    good_k = min(1 - 1 / np.log10(num), 0.7)
    is_bad = bool((khat > good_k).any())
    if is_bad:
        warn(
            f"Estimated shape parameter of Pareto distribution is greater than {good_k:.2f} for one or "
            "more rows: their leave-one-out posteriors are too far from the draws"
        )
    total = float(elpd.sum())
    return az.stats.ELPDData({
        "elpd_loo": total,
        "se": float((count * elpd.var()) ** 0.5),
        "p_loo": float(in_sample.sum()) - total,
        "n_samples": num,
        "n_data_points": count,
        "warning": is_bad,
        "loo_i": elpd,
        "pareto_k": khat,
        "scale": "log",
        "good_k": good_k,
    })  # fmt: skip
