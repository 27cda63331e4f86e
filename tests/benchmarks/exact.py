"""The bounds of the benchmark models by hand: closed forms and Gauss-Hermite, no Pyro and no pyro_vem.

A scale site (``tau``, ``lam``, ``sigma``) is Gaussian on the log scale, so the moments of exp(k u) are
known; expectations of softplus take 64 nodes. `maximise` climbs such a bound by L-BFGS.
"""

import math

import numpy as np
import torch
from scipy import optimize
from torch.nn.functional import softplus

NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(64))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def mean_softplus(m, v):
    return softplus(m[..., None] + v.sqrt()[..., None] * NODES) @ WEIGHTS


def mean_exp(site, k=1):
    """E exp(k u) for u ~ N(m, v)."""
    m, v = site
    return torch.exp(k * m + 0.5 * k**2 * v)


def standard(site, sd=1.0):
    """E log N(z; 0, sd), summed."""
    m, v = site
    return (-HALF_LOG_2PI - math.log(sd) - 0.5 * (m**2 + v) / sd**2).sum()


def half_normal(site):
    """E log HalfNormal(exp u; 1) + u, summed; the u is the Jacobian of exp."""
    return (0.5 * math.log(2 / math.pi) - 0.5 * mean_exp(site, 2) + site[0]).sum()


def half_cauchy(site, scale=1.0):
    m, v = site
    tail = mean_softplus(2 * m - 2 * math.log(scale), 4 * v)
    return (math.log(2 / (math.pi * scale)) - tail + m).sum()


def normal(square, *log_scales):
    """E log N summed, given E of the squared residuals and log scales that add up."""
    shift, precision = sum(u[0] for u in log_scales), math.prod(mean_exp(u, -2) for u in log_scales)
    return (-HALF_LOG_2PI - shift - 0.5 * square * precision).sum()


def measured(square, sd):
    """The same where the sd is known."""
    return (-HALF_LOG_2PI - sd.log() - 0.5 * square / sd**2).sum()


def centred(site, mu, tau):
    """E log N(site; mu, tau), all three random."""
    return normal((site[0] - mu[0]) ** 2 + site[1] + mu[1], tau)


def shifted_square(d, v, tau, t):
    """E (D - tau t)^2 for D with mean d and variance v."""
    return d**2 + v - 2 * d * mean_exp(tau) * t[0] + mean_exp(tau, 2) * (t[0] ** 2 + t[1])


def bernoulli(y, m, v):
    return (y * m - mean_softplus(m, v)).sum()


def schools_centred(q, sigma, y):
    theta = q["theta"]
    prior = standard(q["mu"], 5.0) + half_cauchy(q["tau"], 5.0) + centred(theta, q["mu"], q["tau"])
    return prior + measured((y - theta[0]) ** 2 + theta[1], sigma)


def schools_noncentred(q, sigma, y):
    mu, tau, t = q["mu"], q["tau"], q["t"]
    square = shifted_square(y - mu[0], mu[1], tau, t)
    return standard(mu, 5.0) + half_cauchy(tau, 5.0) + standard(t) + measured(square, sigma)


def hierarchical_logistic(q, x, group, groups, y):
    a, w = q["a"], q["w"]
    prior = standard(q["mu"], 2.0) + half_normal(q["tau"]) + centred(a, q["mu"], q["tau"]) + standard(w)
    return prior + bernoulli(y, a[0][group] + x @ w[0], a[1][group] + x**2 @ w[1])


def radon(q, floor, county, counties, y):
    mu, b, raw = q["mu"], q["b"], tuple(part[county] for part in q["raw"])
    square = shifted_square(y - mu[0] - b[0] * floor, mu[1] + b[1] * floor**2, q["tau"], raw)
    prior = standard(mu, 5.0) + standard(b, 5.0) + half_normal(q["tau"]) + half_normal(q["sigma"])
    return prior + standard(q["raw"]) + normal(square, q["sigma"])


def poisson_glmm(q, x, group, groups, y):
    mu, b, a = q["mu"], q["b"], q["a"]
    prior = standard(mu, 2.0) + standard(b) + half_normal(q["tau"]) + centred(a, mu, q["tau"])
    log_rate = a[0][group] + b[0] * x, a[1][group] + b[1] * x**2
    return prior + (y * log_rate[0] - mean_exp(log_rate) - torch.lgamma(y + 1)).sum()


def logistic(q, x, y):
    w = q["w"]
    return standard(w) + bernoulli(y, x @ w[0], x**2 @ w[1])


def horseshoe(q, x, y):
    beta, lam, tau = q["beta"], q["lam"], q["tau"]
    prior = half_cauchy(tau) + half_cauchy(lam) + half_normal(q["sigma"])
    slopes = normal(beta[0] ** 2 + beta[1], lam, tau)
    return prior + slopes + normal((y - x @ beta[0]) ** 2 + x**2 @ beta[1], q["sigma"])


def entropy(q):
    return sum((0.5 + HALF_LOG_2PI + 0.5 * v.log()).sum() for _, v in q.values())


def bound(model, data, moments):
    """The exact bound at `moments`, a mapping of site to (mean, sd) on the unconstrained scale."""
    q = {site: tuple(torch.as_tensor(p, dtype=torch.float64) for p in pair) for site, pair in moments.items()}
    with torch.no_grad():
        return float(_bound(model, _tensors(data), {site: (m, s**2) for site, (m, s) in q.items()}))


def maximise(model, data, shapes, starts=3):
    """The best of several L-BFGS runs from random points: the bound and its moments by site."""
    data = _tensors(data)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])

    def unpack(x):
        parts = [torch.tensor_split(half, ends[:-1].tolist()) for half in x.chunk(2)]
        pairs = zip(shapes.items(), *parts, strict=True)
        return {site: (m.reshape(shape), log_sd.reshape(shape)) for (site, shape), m, log_sd in pairs}

    def loss(flat):
        x = torch.tensor(flat, requires_grad=True)
        value = -_bound(model, data, {site: (m, torch.exp(2 * u)) for site, (m, u) in unpack(x).items()})
        value.backward()
        return value.item(), x.grad.numpy()

    best = None
    for seed in range(starts):
        noise = np.random.default_rng(seed).standard_normal(ends[-1])
        start = np.concatenate([0.3 * noise, np.full(ends[-1], -1.5)])
        options = {"maxiter": 5000, "maxfun": 6000, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-7}
        found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        best = found if best is None or found.fun < best.fun else best
    moments = {site: (m.numpy(), u.exp().numpy()) for site, (m, u) in unpack(torch.tensor(best.x)).items()}
    return -best.fun, moments


def _bound(model, data, q):
    return globals()[model](q, **data) + entropy(q)


def _tensors(data):
    return {name: v if isinstance(v, int) else torch.as_tensor(v) for name, v in data.items()}
