"""A fit as ArviZ data, and its leave-one-out cross-validation."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bound.lifted.marginal import Marginal
from ..errors import ModelError, check_names
from ..fit.result import VEMResult
from ..model.data import signature_of
from .checks import run_at
from .containers import Variables, approximate_loo, container, psis
from .importance import Correction, best_pool
from .predict import predict

# Groups of draws, and what `VEMResult.draw` calls them.
DRAWN = {"posterior": "values", "sample_stats": "densities", "log_likelihood": "log_likelihood"}
DEFAULT_GROUPS = (*DRAWN, "observed_data", "constant_data")
ALL_GROUPS = (*DEFAULT_GROUPS, "parameters", "posterior_predictive", "prior", "prior_predictive")
STATISTICS = ("estimate", "standard_error")


def to_arviz(
    fit: VEMResult,
    *,
    groups: str | Collection[str] = DEFAULT_GROUPS,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    num_draws: int = 2000,
    seed: int = 0,
    correction: Correction = None,
) -> Any:
    """The fitted posterior as ArviZ data, with dimensions named after plates.

    ArviZ 0.x has it in an ``arviz.InferenceData``, 1.x in an ``xarray.DataTree``; the groups are
    the same. By default:

    - posterior: one chain of independent draws of latents and deterministic sites. Attributes
      tell the ELBO, the status of the fit, the correction, and the parameters (as JSON).
    - sample_stats: ``lp`` (log joint density), ``log_q`` (density that the draws follow) and
      ``log_weight`` (Pareto-smoothed log importance weights, normalised), in nats; attribute
      pareto_k is the k-hat of the weights.
    - log_likelihood of each observed site, observed_data and constant_data. Where several sites
      share discrete ones, their joint density stands at the first, and the others are left out.

    On request, since they take longer:

    - parameters: a variable for each parameter, along the dimension ``statistic`` ("estimate",
      "standard_error"): one ``sel`` takes all errors, and no name can clash with another's. The
      errors of held parameters are nan; where there are none at all, attribute standard_error
      says why.
    - posterior_predictive, prior and prior_predictive, given the parameters.

    Args:
        fit: the result.
        groups: the groups to have, by name; or "all".
        coords: labels by dimension (plate) name.
        dims: names for the dimensions that are no plates, by site or parameter: of the event
            dimensions only, or of all.
        num_draws: draws in the chain.
        seed: of the draws.
        correction: as in ``fit.sample``. Draws corrected by "psis" have equal weights; pareto_k is
            that of the weights they were resampled by.

    Raises:
        ValueError: for an unknown group, or if ``dims`` does not fit a site.
        ModelError: if the correction or a predictive group cannot be had for this fit.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     with pyro.plate("school", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor([2.0, 3.0])}, progress=False)
        >>> idata = fit.to_arviz(coords={"school": ["A", "B"]})
        >>> idata.posterior["z"].dims
        ('chain', 'draw', 'school')
    """
    listed = (groups,) if isinstance(groups, str) else tuple(groups)
    wanted = ALL_GROUPS if listed == ("all",) else listed
    check_names("groups", wanted, ALL_GROUPS, ValueError)
    names = _Names(fit, dims or {})
    found, attrs = _drawn(fit, wanted, names, num_draws, seed, correction)
    found |= _predicted(fit, wanted, names, num_draws, seed, correction)
    if "observed_data" in wanted or "constant_data" in wanted:
        observed = _observed(fit)
        found["observed_data"] = names.of_values(observed)
        found["constant_data"] = names.of_data(_constant(fit, observed))
    if "parameters" in wanted:
        found["parameters"], attrs["parameters"] = _parameters(fit, names)
    chosen = {group: found[group] for group in ALL_GROUPS if group in wanted and group in found}
    return container(chosen, names.coords(coords or {}), attrs)


def nuts_data(
    fit: VEMResult,
    chains: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> Any:
    """NUTS draws, shaped (chain, draw, *site), as ArviZ data with the fit's dimension names."""
    names = _Names(fit, dims or {})
    groups = {"posterior": names.of_chains(chains), "sample_stats": _scalars(stats)}
    return container(groups, names.coords(coords or {}), {})


def loo(
    fit: VEMResult,
    *,
    var_name: str | Sequence[str] | None = None,
    num_draws: int = 4000,
    seed: int = 0,
    correction: Correction = None,
) -> Any:
    """Leave-one-out cross-validation of a fit, for ``arviz.compare``.

    The draws are the guide's, not the posterior's: row i has the weights
    exp(log p - log q) / p(y_i | draw), Pareto-smoothed. The parameters are held at their estimates,
    which have seen every row.

    Args:
        fit: the result.
        var_name: the observed site; may be left out if there is only one. Several sites in the same
            plates are added up row by row: a row is left out at all of them.
        num_draws: draws from the posterior.
        seed: of the draws.
        correction: as in ``fit.sample``: where k-hats are high, better draws lower them.

    Returns:
        ArviZ's ``ELPDData`` in nats, with pointwise values and k-hats (``pareto_k``) of the rows. Where
        discrete sites are summed out, rows are those of their plates: what a row has inside counts together.

    Raises:
        ValueError: if ``var_name`` is needed, or not an observed site.
        ModelError: if the fit has no observed site, or no latent with a posterior; for a site that
            shares discrete sites with another one, at which the likelihood of both stands; and
            where a discrete site ties the rows, which have one joint density then.

    References:
        Magnusson, Riis Andersen, Jonasson and Vehtari (2019), Bayesian leave-one-out
        cross-validation for large data, ICML. Vehtari, Gelman and Gabry (2017), Practical Bayesian
        model evaluation using leave-one-out cross-validation and WAIC, Stat. Comput. 27.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor([1.0, 2.0, 2.0, 3.0])}, progress=False)
        >>> loo(fit).pareto_k.dims
        ('rows',)
    """
    sites = list(fit.setup.prototype.observed)
    if not sites or fit.setup.problem.guide is None:
        raise ModelError("nothing to leave out: the fit has no observed site, or no latent with a posterior")
    if var_name is None and len(sites) > 1:
        raise ValueError(
            f"var_name: several sites are observed, choose one of {sites}, or several in the same plates "
            "whose rows are to be left out together (var_name=[...])"
        )
    names = sites if var_name is None else [var_name] if isinstance(var_name, str) else list(var_name)
    check_names("var_name", names, sites, ValueError)
    if not names:
        raise ValueError("var_name: no site is named")
    _check_rows(fit, names)
    needed = ("sample_stats", "log_likelihood")
    data = to_arviz(fit, groups=needed, num_draws=num_draws, seed=seed, correction=correction)
    return approximate_loo(data, names)


def _check_rows(fit: VEMResult, names: Sequence[str]) -> None:
    """Raise unless each site has rows of its own, and all of them the same ones."""
    marginal, plates = Marginal.of(run_at(fit)), fit.setup.prototype.observed
    places, tied = marginal.seats, marginal.tied
    for name in names:
        if name in tied:
            by, rest = ", ".join(map(repr, tied[name][:5])), len(tied[name]) - 5
            by += f" and {rest} more" if rest > 0 else ""
            raise ModelError(
                f"rows of site {name!r} hang together through what is summed out ({by}): they have one joint "
                "density, and none can be left out; fit.diagnose() and fit.predict() look at such models"
            )
        place = places.get(name, name)
        if place != name:
            raise ModelError(
                f"site {name!r} shares discrete sites with {place!r}, where the likelihood of both stands: "
                f"loo(var_name={place!r}) leaves out their rows together"
            )
        if {p.name for p in plates[name]} != {p.name for p in plates[names[0]]}:
            raise ValueError(
                f"var_name: sites {names[0]!r} and {name!r} are in different plates, their rows are not the "
                "same; name one of them"
            )


def _drawn(
    fit: VEMResult,
    wanted: Collection[str],
    names: "_Names",
    num_draws: int,
    seed: int,
    correction: Correction,
) -> tuple[dict[str, Variables], dict[str, dict[str, Any]]]:
    """The groups of draws from the posterior, and their attributes."""
    keep = [source for group, source in DRAWN.items() if group in wanted]
    drawn = fit.draw(num_draws, seed, *keep, correction=correction) if keep else {}
    found: dict[str, Variables] = {}
    attrs: dict[str, dict[str, Any]] = {}
    shared = {"correction": correction or "none"}  # files know no None
    if "posterior" in wanted:
        found["posterior"] = names.of_draws(drawn["values"])
        params = {name: value.tolist() for name, value in fit.params.items()}
        about = {"elbo": fit.elbo, "status": fit.status.name, "params": json.dumps(params)}
        attrs["posterior"] = {**about, **shared}
    if "sample_stats" in wanted:
        log_p, log_q = drawn["densities"]["log_p"], drawn["densities"]["log_q"]
        log_weight, khat = psis((log_p - log_q).numpy())
        if correction == "psis":
            khat = best_pool(fit).khat
        stats = {"lp": log_p, "log_q": log_q, "log_weight": torch.as_tensor(log_weight)}
        found["sample_stats"] = _scalars({name: value.unsqueeze(0) for name, value in stats.items()})
        attrs["sample_stats"] = {"pareto_k": khat, **shared}
    if "log_likelihood" in wanted:
        found["log_likelihood"] = names.of_draws(drawn["log_likelihood"], events=False)
    return found, attrs


def _predicted(
    fit: VEMResult,
    wanted: Collection[str],
    names: "_Names",
    num_draws: int,
    seed: int,
    correction: Correction,
) -> dict[str, Variables]:
    """Draws of new observations, and of latents from the prior."""
    found: dict[str, Variables] = {}
    if "posterior_predictive" in wanted:
        made = predict(fit, num_draws, kind="posterior", seed=seed, correction=correction)
        found["posterior_predictive"] = names.of_draws(made["observed"])
    if "prior" in wanted or "prior_predictive" in wanted:
        made = predict(fit, num_draws, kind="prior", seed=seed)
        found["prior"] = names.of_draws(made["latents"])
        found["prior_predictive"] = names.of_draws(made["observed"])
    return found


def _observed(fit: VEMResult) -> dict[str, Tensor]:
    """Values of the observed sites (factors have none)."""
    one = fit.draw(1, 0, "observed")["observed"]
    return {name: value[0] for name, value in one.items() if value[0].numel()}


def _constant(fit: VEMResult, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numeric arguments of the model that are not observed values themselves."""
    problem = fit.setup.problem
    given = signature_of(problem.model.fn).bind(*problem.call.args, **problem.call.kwargs).arguments
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {
        name: value
        for name, value in tensors.items()
        if not any(value.shape == o.shape and torch.equal(value, o) for o in observed.values())
    }


def _parameters(fit: VEMResult, names: "_Names") -> tuple[Variables, dict[str, str]]:
    """Estimates and standard errors, and why there are none."""
    errors: dict[str, Tensor] = {}
    attrs = {}
    try:
        errors = fit.standard_errors()
    except ModelError as error:
        attrs["standard_error"] = str(error)
    found = {}
    for name, value in fit.params.items():
        rows = [value, errors.get(name, torch.full_like(value, torch.nan))]
        found[name] = (["statistic", *names.of(name, value.dim())], torch.stack(rows).numpy())
    return found, attrs


def _scalars(values: Mapping[str, Tensor]) -> Variables:
    """One number a draw, (chain, draw) each."""
    return {name: (["chain", "draw"], value.numpy()) for name, value in values.items()}


class _Names:
    """Names of dimensions: those of plates, then what the user calls the rest."""

    def __init__(self, fit: VEMResult, given: Mapping[str, Sequence[str]]) -> None:
        proto = fit.setup.prototype
        self.plates = {site.name: site.plates for site in proto.latents}
        self.plates |= {**proto.deterministic, **proto.observed}
        self.event_dims = proto.event_dims
        self.taken = {*self.plates, *fit.setup.problem.call.names, "chain", "draw", "statistic"}
        self.given = given

    def plate(self, name: str) -> str:
        """The plate's name; xarray cannot hold a dimension and a variable of one name."""
        return f"{name}_plate" if name in self.taken else name

    def coords(self, given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        return {self.plate(name): labels for name, labels in given.items()} | {"statistic": STATISTICS}

    def of(self, name: str, rank: int) -> list[str]:
        """The dimensions of a site or parameter that has `rank` of them.

        Raises:
            ValueError: if the user's names do not fit.
        """
        batch = rank - self.event_dims.get(name, rank)
        by_dim = {plate.dim: self.plate(plate.name) for plate in self.plates.get(name, ())}
        labels = [by_dim.get(i - batch, f"{name}_dim_{i}") for i in range(batch)]
        given = self.given.get(name)
        if given is None:
            return labels + [f"{name}_dim_{i}" for i in range(batch, rank)]
        if len(given) == rank:
            return list(given)
        if len(labels) + len(given) == rank:
            return labels + list(given)
        raise ValueError(
            f"dims[{name!r}] has {len(given)} names: the site has {rank} dimensions, "
            f"of which {len(labels)} are plates ({', '.join(labels) or 'none'})"
        )

    def of_chains(self, values: Mapping[str, Tensor], *, events: bool = True) -> Variables:
        """Draws by site, (chain, draw, *site); without `events` they are log densities of the rows."""
        found = {}
        for name, value in values.items():
            rank = value.dim() - 2
            full = rank if events else rank + self.event_dims[name]
            found[name] = (["chain", "draw", *self.of(name, full)[:rank]], value.numpy())
        return found

    def of_draws(self, values: Mapping[str, Tensor], *, events: bool = True) -> Variables:
        return self.of_chains({name: value.unsqueeze(0) for name, value in values.items()}, events=events)

    def of_values(self, values: Mapping[str, Tensor]) -> Variables:
        return {name: (self.of(name, value.dim()), value.numpy()) for name, value in values.items()}

    def of_data(self, values: Mapping[str, Tensor]) -> Variables:
        """Arguments of the model: the first dimension is the plate of its size, if there is one such."""
        plates = {plate for group in self.plates.values() for plate in group}
        found = {}
        for name, value in values.items():
            labels = [f"{name}_dim_{i}" for i in range(value.dim())]
            matching = [plate.name for plate in plates if labels and plate.size == value.shape[0]]
            if len(matching) == 1:
                labels = list(self.given.get(name, [self.plate(matching[0]), *labels[1:]]))
            found[name] = (labels, value.numpy())
        return found
