"""Data of the benchmarks, simulated from fixed seeds; numpy only, so that every package can read it."""

import numpy as np

SCHOOLS_Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools():
    """The eight schools of Rubin (1981)."""
    return {"sigma": SCHOOLS_SIGMA, "y": SCHOOLS_Y}


def hierarchical_logistic(rows=10_000, slopes=50, groups=100):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, slopes))
    group = rng.integers(groups, size=rows)
    intercept = -0.5 + 0.8 * rng.standard_normal(groups)
    logit = intercept[group] + x @ rng.normal(0.0, 0.4, slopes)
    return {"x": x, "group": group, "groups": groups, "y": _coin(rng, logit)}


def radon(houses=919, counties=85):
    """As in the Minnesota radon data: few counties hold most houses, one covariate tells the floor."""
    rng = np.random.default_rng(2)
    share = rng.pareto(1.2, counties) + 0.2
    extra = rng.choice(counties, houses - counties, p=share / share.sum())
    county = np.sort(np.concatenate([np.arange(counties), extra]))
    floor = (rng.random(houses) < 0.17).astype(float)
    level = 1.5 + 0.3 * rng.standard_normal(counties)
    y = level[county] - 0.7 * floor + 0.75 * rng.standard_normal(houses)
    return {"floor": floor, "county": county, "counties": counties, "y": y}


def poisson_glmm(groups, size=5):
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(groups), size)
    x = rng.standard_normal(groups * size)
    rate = np.exp((0.5 + 0.6 * rng.standard_normal(groups))[group] + 0.4 * x)
    return {"x": x, "group": group, "groups": groups, "y": rng.poisson(rate).astype(float)}


def logistic(features):
    """Neighbouring features correlate by 0.9: a diagonal Gaussian is narrow, its means ill-conditioned."""
    rng = np.random.default_rng(4)
    rows = max(1000, 20 * features)
    x = rng.standard_normal((rows, features))
    for j in range(1, features):
        x[:, j] = 0.9 * x[:, j - 1] + np.sqrt(1 - 0.9**2) * x[:, j]
    logit = x @ rng.standard_normal(features) / np.sqrt(features)
    return {"x": x, "y": _coin(rng, logit)}


def horseshoe(rows=100, features=30, signals=5):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, features))
    beta = np.zeros(features)
    beta[:signals] = [3.0, -2.0, 1.5, -1.0, 0.5]
    return {"x": x, "y": x @ beta + rng.standard_normal(rows)}


def _coin(rng, logit):
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)


# name: (model, its data)
WORKLOADS = {
    "eight_schools_centred": ("schools_centred", schools),
    "eight_schools_noncentred": ("schools_noncentred", schools),
    "hierarchical_logistic": ("hierarchical_logistic", hierarchical_logistic),
    "radon": ("radon", radon),
    "poisson_glmm_2000": ("poisson_glmm", lambda: poisson_glmm(2_000)),
    "poisson_glmm_20000": ("poisson_glmm", lambda: poisson_glmm(20_000)),
    "poisson_glmm_200000": ("poisson_glmm", lambda: poisson_glmm(200_000)),
    "logistic_20": ("logistic", lambda: logistic(20)),
    "logistic_100": ("logistic", lambda: logistic(100)),
    "logistic_1000": ("logistic", lambda: logistic(1_000)),
    "horseshoe": ("horseshoe", horseshoe),
}


def load(workload):
    """Name of the model, its arrays, and its sizes, which are no arrays and stay fixed under jit."""
    model, make = WORKLOADS[workload]
    everything = make()
    sizes = {name: value for name, value in everything.items() if isinstance(value, int)}
    return model, {name: v for name, v in everything.items() if name not in sizes}, sizes
