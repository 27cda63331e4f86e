"""A fit as ArviZ data: the one module that knows ArviZ's containers."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fit.result import VEMResult


def to_arviz(
    fit: VEMResult,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    num_draws: int = 2000,
    seed: int = 0,
) -> Any:
    """The fitted posterior as an ``arviz.InferenceData``.

    Groups: posterior (one chain of independent draws; latents and deterministic sites),
    sample_stats (``lp`` is the log joint density, ``log_q`` the guide's), log_likelihood by
    observed site, observed_data and constant_data. Dimensions are named after plates. Point
    estimates of the parameters are in ``posterior.attrs["params"]`` as JSON.

    Args:
        fit: the result.
        coords: labels by dimension (plate) name.
        dims: names for the dimensions that are no plates, by site: of the event dimensions
            only, or of all.
        num_draws: draws in the chain.
        seed: of the draws.

    Raises:
        ValueError: if ``dims`` does not fit a site.

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
    import arviz as az

    groups = fit.draw(num_draws, seed, "values", "densities", "log_likelihood")
    observed = _observed(fit)
    constant = _constant(fit, observed)
    names = _dim_names(fit, groups["values"], observed, constant, dims or {})
    idata = az.from_dict(
        posterior=_chain(groups["values"]),
        sample_stats=_chain({"lp": groups["densities"]["log_p"], "log_q": groups["densities"]["log_q"]}),
        log_likelihood=_chain(groups["log_likelihood"]) or None,
        observed_data={name: value.numpy() for name, value in observed.items()} or None,
        constant_data={name: value.numpy() for name, value in constant.items()} or None,
        coords={_dim(fit, name): list(labels) for name, labels in (coords or {}).items()},
        dims=names,
    )
    params = {name: value.tolist() for name, value in fit.params.items()}
    idata.posterior.attrs.update(
        inference_library="pyro_vem", elbo=fit.elbo, status=fit.status.name, params=json.dumps(params)
    )
    return idata


def nuts_data(
    fit: VEMResult,
    chains: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> Any:
    """NUTS draws, shaped (chain, draw, *site), as ArviZ data with the fit's dimension names."""
    import arviz as az

    flat = {name: value[0] for name, value in chains.items()}
    return az.from_dict(
        posterior={name: value.numpy() for name, value in chains.items()},
        sample_stats={name: value.numpy() for name, value in stats.items()},
        coords={_dim(fit, name): list(labels) for name, labels in (coords or {}).items()},
        dims=_dim_names(fit, flat, {}, {}, dims or {}),
    )


def _chain(values: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.unsqueeze(0).numpy() for name, value in values.items()}


def _observed(fit: VEMResult) -> dict[str, Tensor]:
    """Values of the observed sites (factors have none)."""
    setup = fit.setup
    one = setup.objective.sample(fit.guide_params, fit.params, 1, 0, ("observed",))
    return {name: value[0] for name, value in one["observed"].items() if value[0].numel()}


def _constant(fit: VEMResult, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numeric arguments of the model that are not observed values themselves."""
    problem = fit.setup.problem
    fn = problem.model.fn
    signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    given = signature.bind(*problem.call.args, **problem.call.kwargs).arguments
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {
        name: value
        for name, value in tensors.items()
        if not any(value.shape == o.shape and torch.equal(value, o) for o in observed.values())
    }


def _dim_names(
    fit: VEMResult,
    values: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    constant: Mapping[str, Tensor],
    given: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    proto = fit.setup.prototype
    plates = {site.name: site.plates for site in proto.latents}
    plates = {**plates, **proto.deterministic, **proto.observed}
    names = {}
    for name, value in {**values, **{n: v.unsqueeze(0) for n, v in observed.items()}}.items():
        batch = value.dim() - 1 - proto.event_dims[name]
        by_dim = {plate.dim: plate.name for plate in plates[name]}
        labels = [
            _dim(fit, by_dim[i - batch]) if i - batch in by_dim else f"{name}_dim_{i}" for i in range(batch)
        ]
        names[name] = _completed(name, labels, value.dim() - 1, given.get(name))
    sizes = [(p.size, p.name) for p in {p for group in plates.values() for p in group}]
    for name, value in constant.items():
        matching = [plate for size, plate in sizes if value.dim() and size == value.shape[0]]
        if len(matching) == 1:
            rest = [f"{name}_dim_{i}" for i in range(1, value.dim())]
            names[name] = list(given.get(name, [_dim(fit, matching[0]), *rest]))
    return names


def _completed(name: str, labels: list[str], rank: int, given: Sequence[str] | None) -> list[str]:
    """Plate names, then the user's names for the rest."""
    if given is None:
        return labels + [f"{name}_dim_{i}" for i in range(len(labels), rank)]
    if len(given) == rank:
        return list(given)
    if len(labels) + len(given) == rank:
        return labels + list(given)
    raise ValueError(
        f"dims[{name!r}] has {len(given)} names: the site has {rank} dimensions, "
        f"of which {len(labels)} are plates ({', '.join(labels) or 'none'})"
    )


def _dim(fit: VEMResult, plate: str) -> str:
    """The plate's name; xarray cannot hold a dimension and a variable of one name."""
    proto = fit.setup.prototype
    taken = {site.name for site in proto.latents} | set(proto.observed) | set(proto.deterministic)
    taken |= set(fit.setup.problem.call.names)
    return f"{plate}_plate" if plate in taken else plate
