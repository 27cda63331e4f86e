"""A fit and NUTS, scalar by scalar: the table, and whether NUTS is a reference at all."""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from ..errors import ModelError
from ..fit.result import VEMResult

RHAT_LIMIT, ESS_LIMIT = 1.01, 400  # Vehtari et al. (2021)
PROBS = {"q5_error": 0.05, "q50_error": 0.5, "q95_error": 0.95}
CLEAR = 4.0  # standard errors at which a scalar is named
CONSTANT = 1e-12  # relative sd of a scalar that does not move
WIDTH, MOST_ROWS, MOST_NAMES = 100, 30, 3
SHORT = {
    "mean_diff_sd": "mean diff", "mean_diff_mcse": "+-", "sd_ratio": "sd ratio",
    "sd_ratio_corrected": "corrected", "wasserstein_sd": "W1", "q5_error": "q5", "q50_error": "q50",
    "q95_error": "q95", "r_hat": "R-hat", "ess_bulk": "ESS",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Comparison:
    """A fit and a NUTS run, scalar by scalar.

    Attributes:
        table: a row for each scalar that moves; see `pyro_vem.posterior.comparison.table_of`.
        idata_vem, idata_nuts: ArviZ data of the two.
        idata_corrected: ArviZ data of the fit's corrected draws; None where there are none.
        correction: which draws these are: "linear_response" or "psis".
        divergences: of the NUTS run; None if they are not known.
        reasons: why NUTS is no reference, and what to do, one sentence each.
        seconds_vem, seconds_nuts: wall time of the fit and of sampling (nan for draws brought along).
        note: how NUTS was run, and what is held fixed.
    """

    table: pd.DataFrame
    idata_vem: Any
    idata_nuts: Any
    idata_corrected: Any
    correction: str | None
    divergences: int | None
    reasons: tuple[str, ...]
    seconds_vem: float
    seconds_nuts: float
    note: str

    @classmethod
    def of(
        cls,
        fit: VEMResult,
        vem: Any,
        nuts: Any,
        corrected: Any,
        correction: str | None,
        seconds: float,
        notes: Sequence[str],
    ) -> "Comparison":
        """Compare, and judge NUTS; arguments as in the attributes."""
        table = table_of(vem, nuts, corrected, _idle_scalars(fit, vem))
        flags = getattr(getattr(nuts, "sample_stats", None), "diverging", None)
        divergences, reasons = None, _unconverged(table)
        if flags is not None:
            known = flags.transpose("chain", "draw").values.astype(bool).ravel()
            divergences = int(known.sum())
            reasons += _diverged(frame(nuts, like=vem)[table.index], known) if divergences else []
        held = f"Parameters held at their estimates in both: {', '.join(fit.params)}."
        note = " ".join([*notes, held] if fit.params else notes)
        return cls(
            table, vem, nuts, corrected, correction, divergences, tuple(reasons), fit.seconds, seconds, note
        )

    @property
    def is_reference(self) -> bool:
        """Whether NUTS can be believed (R-hat at most 1.01, bulk ESS at least 400, no divergence)."""
        return not self.reasons

    @property
    def headline(self) -> str:
        """Whether NUTS is a reference, in a sentence."""
        if not self.is_reference:
            return "NUTS IS NO REFERENCE HERE: differences in the table may be its own errors."
        told = "no divergences" if self.divergences == 0 else "divergences not known"
        return (
            f"NUTS is a reference: R-hat at most {self.table['r_hat'].max():.3f}, "
            f"bulk ESS at least {self.table['ess_bulk'].min():,.0f}, {told}."
        )

    @property
    def draws(self) -> dict[str, pd.DataFrame]:
        """Draws of the fit, of its correction and of NUTS, with a row a draw and a column a scalar."""
        named = {
            "VEM": self.idata_vem,
            f"VEM, {self.correction}": self.idata_corrected,
            "NUTS": self.idata_nuts,
        }
        return {
            name: frame(data, self.idata_vem)[self.table.index]
            for name, data in named.items()
            if data is not None
        }

    def plot(self, ax: Any = None, **kwargs: Any) -> Any:
        """Intervals of all, see `pyro_vem.posterior.plots.forest`."""
        from .plots import forest

        return forest(self, ax, **kwargs)

    def __repr__(self) -> str:
        told = (
            "In NUTS sds: mean diff, +- (its Monte Carlo error), W1 (Wasserstein distance), q5 to q95 "
            "(errors of quantiles)."
        )
        if self.correction:
            told += f" corrected: sd ratio of draws with correction={self.correction!r}."
        seconds = f"VEM {self.seconds_vem:.1f} s"
        seconds += f", NUTS {self.seconds_nuts:.1f} s." if np.isfinite(self.seconds_nuts) else "."
        lines = [self.headline, *(f"- {reason}" for reason in self.reasons)]
        parts = [*map(_filled, lines), _shown(self.table), _filled(told), seconds, _filled(self.note)]
        return "\n".join(parts).rstrip()


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  " if text.startswith("- ") else "")


def _shown(table: pd.DataFrame) -> str:
    """The table in `WIDTH` columns; of many scalars those that differ most."""
    rows = table
    if len(table) > MOST_ROWS:
        worst = table["wasserstein_sd"].nlargest(MOST_ROWS).index
        rows = table.loc[table.index.isin(worst)]
    columns = [name for name in SHORT if not rows[name].isna().all()]
    styles = {"r_hat": "{:.3f}", "ess_bulk": "{:,.0f}"}
    cells = {SHORT[name]: [styles.get(name, "{:.2f}").format(x) for x in rows[name]] for name in columns}
    index = [textwrap.shorten(str(name), 24, placeholder="...") for name in rows.index]
    text: str = pd.DataFrame(cells, index=index).to_string(line_width=WIDTH)
    if len(rows) < len(table):
        text += f"\n{len(rows)} of {len(table)} scalars, those that differ most; all are in .table"
    return text


def table_of(vem: Any, nuts: Any, corrected: Any, idle: Sequence[str]) -> pd.DataFrame:
    """Draws of a fit beside draws of NUTS.

    Args:
        vem: ArviZ data of the fit; independent draws.
        nuts: ArviZ data of NUTS.
        corrected: ArviZ data of corrected draws, or None.
        idle: scalars that are left out.

    Returns:
        A row for each scalar that moves in NUTS, labelled as by ArviZ. In sds of NUTS:
        mean_diff_sd (VEM mean - NUTS mean) and its Monte Carlo standard error mean_diff_mcse,
        wasserstein_sd (1-Wasserstein distance), q5_error, q50_error and q95_error (VEM quantile -
        NUTS quantile). sd_ratio (VEM sd / NUTS sd) and sd_ratio_corrected (nan without a
        correction). vem_mean, vem_sd, nuts_mean and nuts_sd in the site's own units. NUTS's
        r_hat (rank-normalised split R-hat) and ess_bulk.

    Raises:
        ModelError: if there is no scalar in common.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
        localization: an improved R-hat, Bayesian Analysis 16(2).
    """
    ours, theirs = dataset(vem), dataset(nuts)
    y = frame(nuts, vem)
    y = y.loc[:, (y.std() > CONSTANT * (1 + y.mean().abs())) & ~y.columns.isin(idle)]
    if y.empty:
        raise ModelError(
            f"the NUTS draws have none of the fit's sites {list(ours.data_vars)}; "
            f"they have {list(theirs.data_vars)}"
        )
    x, mean, sd = frame(vem, vem)[y.columns], y.mean(), y.std()
    other = frame(corrected, vem)[y.columns].std() if corrected is not None else np.nan
    table = diagnostics(y, theirs.sizes["chain"])
    return pd.DataFrame(
        {
            "mean_diff_sd": (x.mean() - mean) / sd,
            "mean_diff_mcse": np.sqrt(table["mcse"] ** 2 + x.var() / len(x)) / sd,
            "sd_ratio": x.std() / sd,
            "sd_ratio_corrected": other / sd,
            "wasserstein_sd": [wasserstein_distance(x[name], y[name]) / sd[name] for name in y],
            **{key: (x.quantile(p) - y.quantile(p)) / sd for key, p in PROBS.items()},
            "vem_mean": x.mean(),
            "vem_sd": x.std(),
            "nuts_mean": mean,
            "nuts_sd": sd,
            "r_hat": table["r_hat"],
            "ess_bulk": table["ess_bulk"],
        }
    )


def diagnostics(draws: pd.DataFrame, num_chains: int) -> pd.DataFrame:
    """R-hat, bulk ESS and the Monte Carlo error of the mean of each scalar, by ArviZ.

    Args:
        draws: a column for each scalar, chains one after another.
        num_chains: how many there are.
    """
    import arviz as az
    import xarray as xr

    values = draws.to_numpy().reshape(num_chains, -1, draws.shape[1])
    data = xr.Dataset({"x": (("chain", "draw", "scalar"), values)})
    found = {
        "r_hat": az.rhat(data),
        "ess_bulk": az.ess(data, method="bulk"),
        "mcse": az.mcse(data, method="mean"),
    }
    return pd.DataFrame({name: value["x"].values for name, value in found.items()}, index=draws.columns)


def dataset(data: Any) -> Any:
    """The posterior group of an InferenceData or DataTree as an ``xarray.Dataset``.

    Raises:
        ModelError: if there is none.
    """
    group = getattr(data, "posterior", None)
    if group is None:
        raise ModelError(
            f"posterior is a {type(data).__name__} without draws: give a Pyro MCMC object that has run, or "
            "ArviZ data with a posterior group"
        )
    group = group.to_dataset() if hasattr(group, "to_dataset") else group
    return group.transpose("chain", "draw", ...)


def frame(data: Any, like: Any) -> pd.DataFrame:
    """Draws as rows, chains one after another; the scalars of sites that `like` has too as columns.

    Args:
        data: ArviZ data.
        like: ArviZ data whose labels are used: ``theta[A]``, as ArviZ writes them.

    Raises:
        ModelError: if a site has another shape.
    """
    ours, theirs = dataset(like), dataset(data)
    columns: dict[str, NDArray[np.float64]] = {}
    for name in (name for name in ours.data_vars if name in theirs.data_vars):
        shape = ours[name].shape[2:]
        if theirs[name].shape[2:] != shape:
            raise ModelError(
                f"site {name!r} is shaped {shape} in the fit and {theirs[name].shape[2:]} in the NUTS draws: "
                "give draws of the same model and data"
            )
        scalars = _labels(ours[name])
        values = theirs[name].values.astype(np.float64).reshape(-1, len(scalars))
        columns |= dict(zip(scalars, values.T, strict=True))
    return pd.DataFrame(columns)


def _labels(draws: Any) -> list[str]:
    """Names of the scalars of a site as ArviZ writes them; positions where two would be the same."""
    found = []
    names = [draws[dim].values for dim in draws.dims[2:]]
    names = [labels if len(set(labels)) == len(labels) else range(len(labels)) for labels in names]
    for at in itertools.product(*names):
        where = ", ".join(map(str, at))
        found.append(f"{draws.name}[{where}]" if where else str(draws.name))
    return found


def _unconverged(table: pd.DataFrame) -> list[str]:
    """What R-hat and ESS say against a run; nan counts as bad."""
    found = []
    if table["r_hat"].isna().all():
        return ["a single chain has no R-hat: run four of them (num_chains)"]
    unmixed = table.loc[~(table["r_hat"] <= RHAT_LIMIT), "r_hat"].sort_values(ascending=False)
    if len(unmixed):
        found.append(
            f"R-hat is above {RHAT_LIMIT} for {_listed(unmixed, '.3f')}: the chains have not mixed; raise "
            "num_samples and warmup_steps"
        )
    few = table.loc[~(table["ess_bulk"] >= ESS_LIMIT), "ess_bulk"].sort_values()
    if len(few):
        found.append(f"bulk ESS is below {ESS_LIMIT} for {_listed(few, '.0f')}: raise num_samples")
    return found


def _listed(values: pd.Series, style: str) -> str:
    shown = ", ".join(f"{name} ({value:{style}})" for name, value in values.head(MOST_NAMES).items())
    return shown + (f" and {len(values) - MOST_NAMES} more" if len(values) > MOST_NAMES else "")


def _diverged(draws: pd.DataFrame, known: NDArray[np.bool_]) -> list[str]:
    """How many divergences there are, and where, if one scalar tells."""
    num = int(known.sum())
    shift = draws.rank(pct=True)[known].mean() - 0.5
    worst = shift.abs().idxmax()
    is_clear = abs(shift[worst]) * (12 * num) ** 0.5 > CLEAR
    where = f", mostly where {worst} is {'high' if shift[worst] > 0 else 'low'}" if is_clear else ""
    return [
        f"{num} divergences{where}: draws are missing there; raise target_accept_prob towards 1, or "
        "reparameterise the model (pyro.infer.reparam)"
    ]


def _idle_scalars(fit: VEMResult, vem: Any) -> list[str]:
    """The elements that the model never uses."""
    found, ours = list[str](), dataset(vem)
    for site in fit.setup.prototype.latents:
        if site.idle is not None and site.name in ours:
            found += itertools.compress(_labels(ours[site.name]), site.idle_in(site.init).tolist())
    return found
