"""A fit beside NUTS, on the same model, data and parameters; NUTS starts where the fit ended."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor

from ..errors import ModelError
from ..fit.capture import WORTH
from ..fit.result import VEMResult
from ..model.runtime import isolated
from .arviz import nuts_data, to_arviz
from .comparison import Comparison
from .density import Density
from .engines import ENGINES, NUTSOptions

GRADIENTS = 10  # of one draw, about, in coordinates in which the posterior is round


def compare_nuts(
    fit: VEMResult,
    *,
    posterior: Any = None,
    sampler: str = "pyro",
    num_draws: int = 4000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Hold a fit against NUTS on the same model, with theta at its estimate.

    Chains start at draws of the fit, in coordinates in which its linear response (else its
    guide) is standard normal: NUTS has the fit's covariance as its metric. Up to 300 steps of
    warm-up this metric is kept by Pyro; nutpie adapts it further. The log density runs as a graph
    without Pyro, verified against the model; it is compiled where the run is long enough to pay
    for that.

    Args:
        fit: the result.
        posterior: draws that you have already: a Pyro ``MCMC`` object, an ``arviz.InferenceData`` or
            an ``xarray.DataTree``. By default NUTS is run.
        sampler: "pyro", or "nutpie" (``pip install "pyro-vem[nutpie]"``), which takes the same steps
            in a fraction of the time.
        num_draws: draws from the guide, and corrected ones.
        coords: as in ``fit.to_arviz``.
        dims: as in ``fit.to_arviz``.
        seed: of both.
        options: num_chains, num_samples, warmup_steps, target_accept_prob and progress, see
            `pyro_vem.posterior.engines.NUTSOptions`.

    Returns:
        A `pyro_vem.Comparison`.

    Raises:
        ModelError: if there is no latent to sample, ``posterior`` has no scalar in common, or nutpie
            is not installed.
        ValueError: for an unknown sampler, or options of a run beside ``posterior``.

    References:
        Hoffman and Gelman (2014), The No-U-Turn sampler, JMLR 15.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor(2.0)}, progress=False)
        >>> comparison = fit.compare_nuts(num_chains=2, num_samples=100, warmup_steps=50)
        >>> comparison.is_reference, comparison.reasons[-1]
        (False, 'bulk ESS is below 400 for z ...: raise num_samples')
    """
    if fit.setup.problem.guide is None:
        raise ModelError("nothing to compare: every latent is in map_sites, or there is none")
    if sampler not in ENGINES:
        raise ValueError(f"sampler={sampler!r}: choose one of {', '.join(map(repr, ENGINES))}")
    if posterior is not None and options:
        raise ValueError(f"posterior= brings its own draws: leave out {', '.join(options)}")
    settings = NUTSOptions(**options)
    seconds, notes = float("nan"), list[str]()
    if posterior is None:
        start = time.perf_counter()
        values, flags, notes = sample(fit, sampler, settings, seed)
        seconds = time.perf_counter() - start
        posterior = nuts_data(fit, values, {"diverging": flags}, dims, coords)
    elif isinstance(posterior, MCMC):
        values, flags = _of_mcmc(fit, posterior)
        posterior = nuts_data(fit, values, {"diverging": flags}, dims, coords)

    drawn = partial(
        to_arviz, fit, groups=("posterior", "sample_stats"), coords=coords, dims=dims, num_draws=num_draws,
        seed=seed,
    )  # fmt: skip
    correction, corrected = _corrected(fit, drawn)
    return Comparison.of(fit, drawn(), posterior, corrected, correction, seconds, notes)


def sample(
    fit: VEMResult, sampler: str, options: NUTSOptions, seed: int
) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Run NUTS on a fit's model, its parameters held.

    Returns:
        Latents and deterministic sites, ``(chain, draw, *site)``; flags of divergences, (chain,
        draw); and how it was run.

    Raises:
        ModelError: if nutpie is not installed.
    """
    engine = ENGINES[sampler]
    with isolated(torch.float64, seed):
        density = Density.of(fit)
        z = density.start(seed)
        start = time.perf_counter()
        density.gradient(z)
        num = options.num_chains * (options.warmup_steps + options.num_samples) * GRADIENTS
        is_long = num * (time.perf_counter() - start) > WORTH
        mode = fit.setup.captures.mode
        density = density.captured(mode is True or (mode == "auto" and is_long))
        run = engine(density, options, seed)
        values = _with_derived(fit, density.values(run.points))
    notes = [
        f"{sampler}: {options.num_chains} chains of {options.num_samples} draws after "
        f"{options.warmup_steps} steps of warm-up, from draws and with the metric of the "
        f"{density.origin}; modes that it misses are not looked for. Log density {density.told}."
    ]
    idle = [site.name for site in density.sites if site.idle is not None]
    if idle:
        notes.append(f"Elements of {', '.join(idle)} that the model never uses are held at the guide's mean.")
    return values, run.diverging, notes


def _with_derived(fit: VEMResult, chains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents ``(chain, draw, *site)`` and the deterministic sites that follow from them."""
    if not fit.setup.prototype.deterministic:
        return dict(chains)
    num = next(iter(chains.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in chains.items()}
    derived = fit.setup.objective.deterministic(fit.params, flat)
    return {**chains, **{name: value.unflatten(0, num) for name, value in derived.items()}}


def _of_mcmc(fit: VEMResult, mcmc: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Draws and flags of a run that the user made."""
    if mcmc._samples is None:
        raise ModelError("the MCMC object has no draws: call its run() first")
    chains = {
        name: value.double().to(fit.device) for name, value in mcmc.get_samples(group_by_chain=True).items()
    }
    flags = torch.zeros(next(iter(chains.values())).shape[:2], dtype=torch.bool)
    for chain, where in enumerate(mcmc.diagnostics().get("divergences", {}).values()):
        flags[chain, where] = True
    shapes = {name: value.shape[2:] for name, value in chains.items()}
    if all(shapes.get(site.name) == site.init.shape for site in fit.setup.latents):
        with isolated(torch.float64):
            chains = _with_derived(fit, chains)
    return chains, flags


def _corrected(fit: VEMResult, drawn: Callable[..., Any]) -> tuple[str | None, Any]:
    """Draws with the correction that the diagnosis recommends, else with linear response."""
    for correction in (fit._diagnosis.correction, "linear_response"):
        with suppress(ModelError):  # diagnose() says why there is none
            if correction is not None:
                return correction, drawn(correction=correction)
    return None, None
