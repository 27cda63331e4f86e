"""
Eight schools: plain variational inference, held against NUTS
=============================================================

Eight schools tried coaching (Rubin 1981); each reports an effect and its standard error. Everything
is latent here: the mean effect ``mu``, the spread ``tau`` and the schools' own effects. Without
parameters in the model there is no M-step, and ``fit_vem`` is plain variational inference.

This is also the place to see what a diagonal Gaussian cannot do, and how the fit says so.
"""

# %%
# Data and model
# --------------
# The non-centred form: ``theta = mu + tau t``.

import os
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import torch

import pyro_vem as vem

OUT = Path(os.environ.get("PYRO_VEM_OUT", "build/demo"))
OUT.mkdir(parents=True, exist_ok=True)
SMOKE = bool(os.environ.get("PYRO_VEM_SMOKE"))  # a short NUTS run, for the test suite

y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
schools = list("ABCDEFGH")
print(f"{'school':8}{'effect':>8}{'se':>6}")
for name, effect, se in zip(schools, y.tolist(), sigma.tolist(), strict=True):
    print(f"{name:8}{effect:8.0f}{se:6.0f}")


@vem.vem_model
def model(sigma, y=None):
    """Eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * t)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %%
# The fit
# -------
# The best diagonal Gaussian for this model has an ELBO of -31.597; the log evidence is -31.311.

fit = vem.fit_vem(model, {"sigma": sigma, "y": y}, progress=not SMOKE)
print(fit)

# %%
# The plan says how each term of the bound was computed, and why.

print(fit.plan)

# %%
# In ArviZ
# --------

idata = fit.to_arviz(coords={"school": schools})
print(az.summary(idata, var_names=["mu", "tau", "theta"], kind="stats", round_to=2))

# %%
# Beside NUTS
# -----------
# ``mean_diff_sd`` is the error of the mean in posterior standard deviations, ``sd_ratio`` the guide's
# spread over NUTS's. The schools' effects are right; ``tau``, which the true posterior couples to all
# of them, is too narrow and a little low, as the verdict said without having seen NUTS.

budget = {"num_samples": 50, "warmup_steps": 50} if SMOKE else {"num_samples": 500, "warmup_steps": 500}
comparison = fit.compare_nuts(num_chains=4, coords={"school": schools}, progress=not SMOKE, **budget)
print(comparison)

# %%

ax = comparison.plot(var_names=["mu", "tau", "theta"])
ax.figure.savefig(OUT / "eight_schools_forest.png", dpi=150)

# %%
# The correction
# --------------
# The verdict was to take draws with ``correction="psis"``: resampled by Pareto-smoothed importance
# weights. The weights of the guide's own draws are in ``sample_stats``.

corrected = fit.sample(20_000, correction="psis")["tau"]
print(
    f"mean of tau: guide {fit.sample(20_000)['tau'].mean():.2f}, corrected {corrected.mean():.2f}, ", end=""
)
print(f"NUTS {comparison.table.loc['tau', 'nuts_mean']:.2f}")

# %%
# Both posteriors are kept as files that ArviZ reads.

saved = comparison.idata_vem.to_netcdf(OUT / "eight_schools_vem.nc")
saved = comparison.idata_nuts.to_netcdf(OUT / "eight_schools_nuts.nc")
