"""The models of the benchmarks in PyMC; each function builds its model anew."""

import pymc as pm
import pytensor.tensor as pt


def schools_centred(sigma, y):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", mu, tau, shape=len(sigma))
        pm.Normal("y", theta, sigma, observed=y)
    return model


def schools_noncentred(sigma, y):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        t = pm.Normal("t", 0.0, 1.0, shape=len(sigma))
        pm.Normal("y", mu + tau * t, sigma, observed=y)
    return model


def hierarchical_logistic(x, group, groups, y):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 2.0)
        tau = pm.HalfNormal("tau", 1.0)
        a = pm.Normal("a", mu, tau, shape=groups)
        w = pm.Normal("w", 0.0, 1.0, shape=x.shape[1])
        coin(a[group] + x @ w, y)
    return model


def radon(floor, county, counties, y):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        b = pm.Normal("b", 0.0, 5.0)
        tau = pm.HalfNormal("tau", 1.0)
        sigma = pm.HalfNormal("sigma", 1.0)
        raw = pm.Normal("raw", 0.0, 1.0, shape=counties)
        pm.Normal("y", mu + tau * raw[county] + b * floor, sigma, observed=y)
    return model


def poisson_glmm(x, group, groups, y):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 2.0)
        b = pm.Normal("b", 0.0, 1.0)
        tau = pm.HalfNormal("tau", 1.0)
        a = pm.Normal("a", mu, tau, shape=groups)
        pm.Poisson("y", pm.math.exp(a[group] + b * x), observed=y)
    return model


def logistic(x, y):
    with pm.Model() as model:
        w = pm.Normal("w", 0.0, 1.0, shape=x.shape[1])
        coin(x @ w, y)
    return model


def horseshoe(x, y):
    with pm.Model() as model:
        tau = pm.HalfCauchy("tau", 1.0)
        sigma = pm.HalfNormal("sigma", 1.0)
        lam = pm.HalfCauchy("lam", 1.0, shape=x.shape[1])
        beta = pm.Normal("beta", 0.0, tau * lam, shape=x.shape[1])
        pm.Normal("y", x @ beta, sigma, observed=y)
    return model


def coin(logit, y):
    """pm.Bernoulli goes through the probability, and is -inf at the large logits where DADVI starts."""
    pm.Potential("y", pt.sum(y * logit - pt.softplus(logit)))
