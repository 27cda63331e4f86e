"""Small models with exact answers: evidence, best Gaussian, maximum likelihood."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, optimize, special, stats
from torch.distributions import constraints

SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS_BEST_ELBO = -31.597  # best diagonal Gaussian, to three decimals

PUMP_FAILURES = torch.tensor([5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0])
PUMP_HOURS = torch.tensor([94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5])


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * t)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = {"sigma": SCHOOLS_SIGMA, "y": SCHOOLS_Y}


def pumps(hours, failures=None):
    mu = pyro.param("mu", torch.tensor(0.0))
    tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("pump", len(hours)):
        rate = pyro.sample("rate", dist.LogNormal(mu, tau))
        pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)


PUMPS = {"hours": PUMP_HOURS, "failures": PUMP_FAILURES}


def normal_mean(y, prior_sd=1.0, sd=1.0):
    """z ~ N(0, prior_sd), y_i ~ N(z, sd): everything in closed form."""
    z = pyro.sample("z", dist.Normal(0.0, prior_sd))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, sd), obs=y)


def normal_mean_exact(y, prior_sd=1.0, sd=1.0):
    """Posterior mean, posterior sd and log evidence of `normal_mean`."""
    y = np.asarray(y, dtype=float)
    precision = 1 / prior_sd**2 + len(y) / sd**2
    cov = sd**2 * np.eye(len(y)) + prior_sd**2
    evidence = stats.multivariate_normal(np.zeros(len(y)), cov).logpdf(y)
    return y.sum() / sd**2 / precision, precision**-0.5, float(evidence)


def random_effects(y):
    """One-way random effects: rows of y are batches."""
    mu = pyro.param("mu", torch.tensor(0.0))
    sigma_b = pyro.param("sigma_b", torch.tensor(1.0), constraint=constraints.positive)
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("batch", y.shape[0], dim=-2):
        b = pyro.sample("b", dist.Normal(mu, sigma_b))
        with pyro.plate("rep", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(b, sigma), obs=y)


def random_effects_data():
    rng = np.random.default_rng(3)
    return torch.tensor(4.0 + 1.5 * rng.standard_normal((6, 1)) + rng.standard_normal((6, 5)))


def random_effects_exact(y):
    """Maximum-likelihood mu, sigma_b, sigma and the log likelihood there (balanced design)."""
    y = np.asarray(y)
    batches, reps = y.shape
    means = y.mean(1)
    within = ((y - means[:, None]) ** 2).sum() / (batches * (reps - 1))
    between = reps * ((means - means.mean()) ** 2).sum() / batches
    assert between > within, "the maximum would lie on the boundary"
    var_b = (between - within) / reps
    cov = within * np.eye(reps) + var_b
    log_likelihood = stats.multivariate_normal(np.full(reps, y.mean()), cov).logpdf(y).sum()
    return {"mu": y.mean(), "sigma_b": var_b**0.5, "sigma": within**0.5}, float(log_likelihood)


def ppca(y, q=2):
    columns = y.shape[1]
    start = torch.linspace(-1.0, 1.0, q * columns).cos().reshape(q, columns)
    weights = pyro.param("W", start * torch.tensor([[1.0], [-0.5]]))
    mu = pyro.param("mu", y.mean(0))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(q), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu + z @ weights, sigma).to_event(1), obs=y)


def ppca_exact(y, q=2):
    """Maximum-likelihood covariance of probabilistic PCA (Tipping and Bishop 1999)."""
    y = np.asarray(y, dtype=float)
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    noise = values[:-q].mean()
    top = vectors[:, -q:]
    return top @ np.diag(values[-q:] - noise) @ top.T + noise * np.eye(y.shape[1])


@dataclass(frozen=True)
class Prior:
    """A prior with its best Gaussian on the unconstrained scale."""

    name: str
    make: object
    loc: np.ndarray
    scale: np.ndarray


def _best_gaussian(log_density):
    """Mean and sd of the Gaussian closest in KL(q || p), p given by its log density on the line."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()

    def loss(x):
        return -(weights @ log_density(x[0] + np.exp(x[1]) * nodes)) - x[1]

    best = optimize.minimize(loss, [0.0, 0.0], tol=1e-12, method="BFGS", options={"gtol": 1e-7})
    return best.x[0], np.exp(best.x[1])


def _logit_beta(a, b):
    return _best_gaussian(lambda u: a * special.log_expit(u) + b * special.log_expit(-u))


def _dirichlet(alpha):
    """Stick-breaking makes independent logit-Beta variables, shifted by log(sticks left)."""
    factors = [_logit_beta(alpha[k], sum(alpha[k + 1 :])) for k in range(len(alpha) - 1)]
    offsets = np.log(np.arange(len(alpha) - 1, 0, -1))
    return np.array([f[0] for f in factors]) + offsets, np.array([f[1] for f in factors])


@cache
def priors():
    a, b = 3.0, 2.0
    beta = _logit_beta(2.0, 5.0)
    alpha = (2.0, 1.5, 3.0)
    loc, scale = _dirichlet(alpha)
    return (
        Prior("LogNormal", lambda: dist.LogNormal(0.0, 1.0), np.array(0.0), np.array(1.0)),
        # E log p = a m - b exp(m + s^2 / 2): stationary in closed form
        Prior("Gamma", lambda: dist.Gamma(a, b), np.log(a / b) - 1 / (2 * a), np.array(a**-0.5)),
        Prior("Beta", lambda: dist.Beta(2.0, 5.0), np.array(beta[0]), np.array(beta[1])),
        Prior("Normal", lambda: dist.Normal(-1.0, 3.0), np.array(-1.0), np.array(3.0)),
        Prior("Dirichlet", lambda: dist.Dirichlet(torch.tensor(alpha)), loc, scale),
    )


def pumps_log_likelihood(mu, tau):
    """Exact log likelihood of `pumps`, by adaptive quadrature."""
    total = 0.0
    for x, t in zip(PUMP_FAILURES.tolist(), PUMP_HOURS.tolist(), strict=True):

        def density(u, x=x, t=t):
            return np.exp(stats.poisson(t * np.exp(u)).logpmf(x)) * stats.norm(mu, tau).pdf(u)

        peak = np.log((x + 0.5) / t)
        value, _ = integrate.quad(density, peak - 8, peak + 8, points=[peak], epsabs=0, epsrel=1e-10)
        total += np.log(value)
    return total


def through(decoder, size):
    """Rows of standard Normal latents through a network, with noise."""

    def model(y):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 0.5).to_event(1), obs=y)

    return model


def mean_and_sd_of_tau(y, sigma, prior):
    """Posterior mean and sd of a hierarchy's spread by quadrature: effects and mean integrate out.

    y_i ~ N(theta_i, sigma_i), theta_i ~ N(mu, tau), mu ~ N(0, 5), tau ~ prior.
    """
    noise = np.broadcast_to(np.asarray(sigma, dtype=float), len(y)) ** 2

    def joint(tau):
        cov = np.diag(noise + tau**2) + 25.0
        return np.exp(stats.multivariate_normal(np.zeros(len(y)), cov).logpdf(y) + 20) * prior.pdf(tau)

    mass, first, second = (
        integrate.quad(lambda t, k=k: t**k * joint(t), 0, np.inf, epsabs=0, epsrel=1e-8)[0] for k in range(3)
    )
    return first / mass, (second / mass - (first / mass) ** 2) ** 0.5


def schools_mean_of_tau():
    """E[tau | y] of `eight_schools`."""
    y, sigma = SCHOOLS_Y.numpy().astype(float), SCHOOLS_SIGMA.numpy().astype(float)
    return mean_and_sd_of_tau(y, sigma, stats.halfcauchy(0, 5))[0]
