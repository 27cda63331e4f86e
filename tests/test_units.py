"""The same model in other units, and from starts that are far away, has the same fit."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_vem as vem

D = torch.float64
ENUMERATED = {"infer": {"enumerate": "parallel"}}
INCOME = {
    "x": 1 + torch.rand(120, generator=torch.Generator().manual_seed(0), dtype=D),
    "k": torch.arange(120) % 3 == 0,
}
INCOME["y"] = (
    2 * INCOME["x"]
    + 3 * INCOME["k"]
    + 0.3 * torch.randn(120, generator=torch.Generator().manual_seed(1), dtype=D)
)


def mixture(x, y):
    a, b = pyro.param("a", torch.tensor([0.0, 2.0])), pyro.param("b", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), **ENUMERATED)
        pyro.sample("y", dist.Normal(a[z] + b * x, s), obs=y)


@pytest.mark.parametrize("schedule", ["auto", "joint"])
def test_a_covariate_of_incomes(fit, schedule):
    y = INCOME["y"]
    plain, raw = (fit(mixture, {"x": unit * INCOME["x"], "y": y}, schedule=schedule) for unit in (1.0, 1e5))
    assert raw.converged
    assert raw.elbo == pytest.approx(plain.elbo, abs=1e-6)
    assert float(raw.params["b"]) == pytest.approx(1e-5 * float(plain.params["b"]), rel=1e-4)
    assert torch.allclose(raw.params["a"].sort()[0], plain.params["a"].sort()[0], atol=1e-4)


def test_slopes_of_covariates_in_different_units(fit):
    def model(x, k, y):
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        w, v = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "wv")
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(w * x + v * k, s), obs=y)

    data = {"x": 1e5 * INCOME["x"], "k": INCOME["k"].double(), "y": INCOME["y"]}
    conjugate, newton = fit(model, data, guide="auto"), fit(model, data)
    assert conjugate.elbo == pytest.approx(newton.elbo, abs=1e-5)
    assert float(conjugate.params["s"]) == pytest.approx(float(newton.params["s"]), rel=1e-4)


@pytest.mark.parametrize("prior_sd", [10.0, 1e6])
def test_a_vague_prior(fit, prior_sd):
    group = torch.arange(60) % 12
    noise = torch.randn(72, generator=torch.Generator().manual_seed(2), dtype=D)
    y = 3 + noise[60:][group] + 0.5 * noise[:60]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, prior_sd))
        t, s = (pyro.param(name, torch.tensor(1.0), constraint=constraints.positive) for name in "ts")
        with pyro.plate("groups", 12):
            b = pyro.sample("b", dist.Normal(0.0, t))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(mu + b[group], s), obs=y)

    conjugate, newton = fit(model, {"y": y}, guide="auto"), fit(model, {"y": y})
    assert conjugate.elbo == pytest.approx(newton.elbo, abs=1e-6)


@pytest.mark.parametrize(("offset", "schedule"), [(1e3, "auto"), (1e4, "auto"), (1e5, "joint")])
def test_data_far_from_the_start(fit, offset, schedule):
    group = torch.arange(60) % 12
    noise = torch.randn(72, generator=torch.Generator().manual_seed(2), dtype=D)

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        t, s = (pyro.param(name, torch.tensor(1.0), constraint=constraints.positive) for name in "ts")
        with pyro.plate("groups", 12):
            b = pyro.sample("b", dist.Normal(mu, t))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(b[group], s), obs=y)

    y = noise[60:][group] + 0.5 * noise[:60]
    near = fit(model, {"y": y}, guide="auto")
    far = fit(model, {"y": y + offset}, guide="auto", schedule=schedule)
    assert far.converged
    assert far.elbo == pytest.approx(near.elbo, abs=1e-5)
    assert float(far.params["mu"]) == pytest.approx(offset + float(near.params["mu"]), abs=1e-4)


def test_a_variance_in_euros(fit):
    y = 2e5 + 8e4 * torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=D)

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        v = pyro.param("v", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Bernoulli(0.5), **ENUMERATED)
            pyro.sample("y", dist.Normal(mu, v.sqrt()), obs=y)

    result = fit(model, {"y": y})
    assert result.converged
    assert float(result.params["v"]) == pytest.approx(float(y.var(correction=0)), rel=1e-6)


def test_a_rate_of_zero_has_not_run_away(fit):
    """A Poisson mixture of which one component is all zeros: zero inflation, with its maximum at the edge."""
    counts = torch.poisson(torch.full((70,), 4.0), generator=torch.Generator().manual_seed(0))
    y = torch.cat([torch.zeros(30), counts])

    def model(y):
        rate = pyro.param("rate", torch.tensor([0.5, 3.0]), constraint=constraints.positive)
        weight = pyro.param("weight", torch.ones(2) / 2, constraint=constraints.simplex)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(weight), **ENUMERATED)
            pyro.sample("y", dist.Poisson(rate[z]), obs=y)

    result = fit(model, {"y": y})
    assert result.status is vem.Status.converged
    low, high = result.params["rate"].tolist()
    share = float(result.params["weight"][1])
    assert low < 1e-6
    exact = dist.ZeroInflatedPoisson(torch.tensor(high, dtype=D), gate=torch.tensor(1 - share, dtype=D))
    assert result.elbo == pytest.approx(float(exact.log_prob(y.double()).sum()), abs=1e-6)


@pytest.mark.parametrize("noise", [100.0, 500.0])
def test_profile_steps_grow_where_the_profile_is_convex(fit, noise):
    y = noise * 3 * torch.randn(100, generator=torch.Generator().manual_seed(4), dtype=D)

    def model(y):
        t = pyro.param("t", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", 100):
            z = pyro.sample("z", dist.Normal(0.0, t))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    result = fit(model, {"y": y}, guide="auto", max_iter=60)
    assert result.converged
    assert float(result.params["t"]) == pytest.approx(np.sqrt(float(y.square().mean()) - noise**2), rel=1e-5)


@pytest.mark.parametrize(("offset", "prior_sd"), [(1e4, 1e5), (1e4, 1e7), (-2e3, 1e5)])
def test_data_far_from_a_vague_prior_are_fitted_as_if_they_were_near(fit, offset, prior_sd):
    """The same posterior, its intercept moved: means reach it alone, and then nothing differs."""
    year = torch.arange(100, dtype=D) / 2
    y = 0.1 * year + torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=D)

    def model(y, centre):
        a = pyro.sample("a", dist.Normal(centre, prior_sd))
        b = pyro.sample("b", dist.Normal(0.0, prior_sd))
        s = pyro.sample("s", dist.HalfNormal(10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a + b * year, s), obs=y)

    near = fit(model, {"y": y, "centre": -offset})
    far = fit(model, {"y": y + offset, "centre": 0.0})
    assert far.converged
    assert far.elbo == pytest.approx(near.elbo, abs=1e-6)
    assert float(far.guide_params["guide.loc.a"]) == pytest.approx(
        float(near.guide_params["guide.loc.a"]) + offset, abs=1e-4
    )
    assert sum(row.evaluations for row in far.history) < 60  # steps in all coordinates took 9,000


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("is_centred", [True, False])
def test_large_data_keep_their_closed_forms(fit, offset, is_centred):
    """Coefficients of one beside data of a million: steps of one would leave them nine digits."""
    group = torch.arange(100) % 10
    y = torch.randn(100, generator=torch.Generator().manual_seed(4), dtype=D)

    def model(y, centre):
        mu = pyro.sample("mu", dist.Normal(centre, 1e4))
        t, s = (pyro.sample(name, dist.HalfCauchy(5.0)) for name in "ts")
        with pyro.plate("groups", 10):
            b = pyro.sample("b", dist.Normal(mu, t) if is_centred else dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b[group] if is_centred else mu + t * b[group], s), obs=y)

    near = fit(model, {"y": y, "centre": 0.0})
    far = fit(model, {"y": y + offset, "centre": offset})
    assert {row.method for row in far.plan.rows} == {"closed form"}
    assert far.converged
    assert far.elbo == pytest.approx(near.elbo, abs=1e-5)


def regression(x, y, family):
    a, b = (pyro.sample(name, dist.Normal(0.0, 100.0)) for name in "ab")
    with pyro.plate("rows", len(y)):
        pyro.sample("y", family(a + b * x), obs=y)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (lambda eta: dist.Poisson(eta.exp()), "closed form"),
        (lambda eta: dist.Bernoulli(logits=eta), "quadrature"),
        (lambda eta: dist.Gamma(2.0, 2 * (-eta).exp()), "closed form"),
    ],
    ids=["Poisson", "Bernoulli", "Gamma"],
)
def test_a_calendar_year_as_a_covariate(fit, family, method):
    """An sd of 0.1 in the slope is one of 200 in a row: rates overflow, and logits need more nodes."""
    years = 1970 + torch.arange(120, dtype=D) / 4
    with pyro.poutine.seed(rng_seed=0):
        y = pyro.sample("y", family(-0.5 + 0.05 * (years - 1970)))
    found = fit(regression, {"x": years, "y": y, "family": family})
    assert found.converged
    assert found.plan["y"].method == method
    assert any(note.startswith("began with sds of") for note in found.plan.notes)
    loc, sd = (
        torch.stack([found.guide_params[f"guide.{part}.{n}"] for n in "ab"]) for part in ("loc", "scale")
    )
    assert float(loc[1]) == pytest.approx(0.05, abs=0.03)

    nodes, weight = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(60))
    spread = (sd[0] ** 2 + (sd[1] * years) ** 2).sqrt()
    rows = weight / weight.sum() @ family(loc[0] + loc[1] * years + spread * nodes.unsqueeze(1)).log_prob(y)
    kl = torch.distributions.kl_divergence(dist.Normal(loc, sd), dist.Normal(0.0, 100.0)).sum()
    assert found.elbo == pytest.approx(float(rows.sum() - kl), abs=1e-6)
