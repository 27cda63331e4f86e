"""
Pump failures: EM with a posterior for every pump
=================================================

Ten pumps of a power plant (Gaver and O'Muircheartaigh 1987) each failed a few times in some
thousand hours of work. Their failure rates vary. How high is the typical rate, and how different
are the pumps?

The rates are latent: the E-step finds a Gaussian for each log rate. The mean ``mu`` and the spread
``tau`` of the log rates are parameters: the M-step finds them. No learning rate, no number of
steps.
"""

# %%
# Data and model
# --------------
# Whatever is a ``pyro.param`` in the model belongs to the M-step, whatever is a latent
# ``pyro.sample`` belongs to the E-step. The decorated model stays an ordinary Pyro model.

import os
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, stats

import pyro_vem as vem

OUT = Path(os.environ.get("PYRO_VEM_OUT", "build/demo"))
OUT.mkdir(parents=True, exist_ok=True)
SMOKE = bool(os.environ.get("PYRO_VEM_SMOKE"))  # a short NUTS run, for the test suite

failures = torch.tensor([5, 1, 5, 14, 3, 19, 1, 1, 4, 22])
hours = torch.tensor([94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5])  # thousands
pumps = [f"pump {i}" for i in range(1, 11)]
print(f"{'':8}{'failures':>9}{'1000 h':>9}")
for name, x, t in zip(pumps, failures.tolist(), hours.tolist(), strict=True):
    print(f"{name:8}{x:9d}{t:9.2f}")


@vem.vem_model
def model(hours, failures=None):
    """Log-normal failure rates; Poisson counts."""
    mu = pyro.param("mu", torch.tensor(0.0))
    tau = pyro.param("tau", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("pump", len(hours)):
        rate = pyro.sample("rate", dist.LogNormal(mu, tau))
        pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)


# %%
# The fit
# -------
# One call. ``print(fit)`` is the verdict card: did it converge, what is the bound, does the guide
# cover the posterior, which terms were exact.

fit = vem.fit_vem(model, {"hours": hours, "failures": failures}, progress=not SMOKE)
print(fit)

# %%
# The bound is a table: the divergence of each log rate from its population is in closed form, the
# expected log likelihood is an average over fixed draws.

print(fit.terms)

# %%
# How far from maximum likelihood?
# --------------------------------
# This model is small enough for the exact likelihood: one integral for each pump. The best diagonal
# Gaussian cannot follow the skewed posteriors of the pumps with few failures; the gap between the
# likelihood and the bound says what that costs.


def log_likelihood(mu, tau):
    """Exact log likelihood, by adaptive quadrature over each pump's log rate."""
    total = 0.0
    for x, t in zip(failures.tolist(), hours.tolist(), strict=True):
        peak = np.log((x + 0.5) / t)
        value, _ = integrate.quad(
            lambda u, x=x, t=t: stats.poisson(t * np.exp(u)).pmf(x) * stats.norm(mu, tau).pdf(u),
            peak - 8,
            peak + 8,
            points=[peak],
        )
        total += np.log(value)
    return total


mu, tau = (float(fit.params[name]) for name in ("mu", "tau"))
exact = log_likelihood(-1.1768, 1.2881)
print(f"exact maximum likelihood: mu -1.1768, tau 1.2881, log likelihood {exact:.4f}")
print(f"variational EM:           mu {mu:.4f}, tau {tau:.4f}")
print(f"gap: {exact - fit.elbo:.4f} nats")

# %%
# In ArviZ
# --------
# Dimensions are named after plates; ``coords`` labels them.

idata = fit.to_arviz(coords={"pump": pumps})
print(az.summary(idata, kind="stats", round_to=3))

# %%
# Beside NUTS
# -----------
# Pyro's NUTS on the same decorated model, with ``mu`` and ``tau`` held at their estimates: the rates
# given the parameters are what the guide claims to know.

budget = {"num_samples": 50, "warmup_steps": 50} if SMOKE else {"num_samples": 500, "warmup_steps": 500}
comparison = fit.compare_nuts(num_chains=4, coords={"pump": pumps}, progress=not SMOKE, **budget)
print(comparison)

# %%
# Points are medians, bars hold 50 % and 90 % of the draws.

ax = comparison.plot()
ax.figure.savefig(OUT / "pumps_forest.png", dpi=150)

# %%
# Both posteriors are kept as files that ArviZ reads.

saved = comparison.idata_vem.to_netcdf(OUT / "pumps_vem.nc")
saved = comparison.idata_nuts.to_netcdf(OUT / "pumps_nuts.nc")

# %%
# The way up
# ----------
# Every step is a row of the history; the bound never falls.

ax = vem.plots.elbo(fit)
