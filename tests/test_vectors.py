"""Vectors under a MultivariateNormal prior: independent factors, moments; saddles and hidden arrows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo_em
from scipy import optimize
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.bound.lifted.coupled import Coupled
from pyro_vem.bound.lifted.families import NORMAL_EXPS
from pyro_vem.fit.acceleration import Anderson
from pyro_vem.fit.scales import Scales

D = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def counts_data(rows=60, size=4):
    rng = np.random.default_rng(3)
    tril = np.tril(0.4 * rng.normal(size=(size, size)), -1) + np.diag(np.linspace(0.5, 1.2, size))
    z = rng.normal(size=(rows, size)) @ tril.T + np.linspace(0.5, 2, size)
    return torch.tensor(rng.poisson(np.exp(z)).astype(float))


def counts(y, kind="scale_tril"):
    """The Poisson log-normal model (Aitchison and Ho, 1989)."""
    rows, size = y.shape
    mu = pyro.param("mu", torch.zeros(size))
    constraint = constraints.lower_cholesky if kind == "scale_tril" else constraints.positive_definite
    factor = pyro.param("factor", torch.eye(size), constraint=constraint)
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.MultivariateNormal(mu, **{kind: factor}))
        pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (zoo_em.random_intercept, zoo_em.slow_em_data(0)),
        (zoo_em.normal_gamma, {"y": draws(9)}),
        (counts, {"y": counts_data()}),
    ],
    ids=["gathered", "scalars", "vectors"],
)
def test_slopes_are_derivatives(model, data):
    # Natural parameters without discrete sites are written out; autograd says what they should be.
    found = vem.fit_vem(model, data, guide="auto", tol=1e-2, progress=False)
    terms, theta = found.setup.lifted, found.params
    statistics = terms.statistics(found.guide_params, theta)
    for name in terms.lifted.found.codings:
        leaf = (1.1 * statistics[name]).requires_grad_()
        there = {**statistics, name: leaf}
        (expected,) = torch.autograd.grad(terms.lifted.total([name], there, theta), leaf)
        (slope,) = terms.lifted.slopes([name], (), {**statistics, name: leaf.detach()}, theta)[0]
        assert slope.abs().max() > 0
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def best_bound_of_counts(y):
    """The optimum by hand: mean and covariance eliminated, L-BFGS in means and log sds."""
    rows, size = y.shape

    def loss(flat):
        x = torch.tensor(flat, requires_grad=True)
        mean, log_sd = x.reshape(2, rows, size)
        variance = (2 * log_sd).exp()
        gap = mean - mean.mean(0)
        cov = (gap.T @ gap + torch.diag(variance.sum(0))) / rows
        likelihood = (y * mean - (mean + variance / 2).exp() - torch.lgamma(y + 1)).sum()
        # At the best covariance the quadratic form is rows * size / 2, which the entropy cancels.
        bound = likelihood - 0.5 * rows * torch.logdet(cov) + log_sd.sum()
        (gradient,) = torch.autograd.grad(-bound, x)
        return -float(bound.detach()), gradient.numpy()

    start = torch.cat([(y + 0.5).log().reshape(-1), torch.full((rows * size,), -1.0, dtype=D)])
    found = optimize.minimize(
        loss, start.numpy(), jac=True, method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-8},
    )  # fmt: skip
    return -found.fun


@pytest.mark.parametrize("kind", ["scale_tril", "covariance_matrix"])
def test_counts_with_a_full_covariance_reach_the_optimum(fit, kind):
    y = counts_data()
    best = best_bound_of_counts(y)
    found = fit(counts, {"y": y, "kind": kind}, guide="auto")
    assert found.status is vem.Status.converged
    assert found.elbo == pytest.approx(best, abs=1e-6)
    assert found.history[0].before < best - 10
    assert all(row.method == "closed form" for row in found.plan.rows)
    assert "factors of their own" in found.plan.rows[0].proof
    assert "does not change" not in str(found.plan)
    mean = found.guide_params["guide.loc.z"]
    torch.testing.assert_close(found.params["mu"], mean.mean(0), atol=1e-6, rtol=0)
    assert found.criteria().num_parameters == 14
    assert all(error.isfinite().all() for error in found.standard_errors().values())


def test_a_mean_of_covariates_leaves_the_moments_of_the_rest(fit):
    """With a regression in the prior's mean, closed forms and Newton's M-step share the parameters."""
    y, x = counts_data(), draws(60, 2)

    def model(y, x):
        slope = pyro.param("slope", torch.zeros(2, 4))
        tril = pyro.param("tril", torch.eye(4), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.MultivariateNormal(1.0 + x @ slope, scale_tril=tril))
            pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)

    found, plain = (fit(model, {"y": y, "x": x}, guide=guide) for guide in ("auto", None))
    assert found.elbo == pytest.approx(plain.elbo, abs=1e-5)
    assert isinstance(found.setup.guide, vem.MeanFieldConjugate)


def test_a_gaussian_process_of_counts_is_one_vector(fit):
    """A log-Gaussian Cox process: every count sees one element of one vector."""
    place = torch.linspace(0, 1, 40, dtype=D)
    kernel = (-((place.unsqueeze(-1) - place) ** 2) / 0.02).exp() + 1e-4 * torch.eye(40)
    y = torch.tensor(np.random.default_rng(1).poisson(np.exp(1 + np.sin(6 * place.numpy()))).astype(float))

    def model(y):
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(40), covariance_matrix=kernel))
        pyro.sample("y", dist.Poisson(f.exp()).to_event(1), obs=y)

    found, plain = fit(model, {"y": y}, guide="auto"), fit(model, {"y": y})
    assert found.elbo == pytest.approx(plain.elbo, abs=1e-6)
    assert "closed form" in {row.method for row in found.plan.rows}
    assert isinstance(found.setup.guide, vem.MeanFieldConjugate)
    torch.testing.assert_close(
        found.guide_params["guide.loc.f"], plain.guide_params["guide.loc.f"], atol=1e-4, rtol=0
    )


def test_what_moves_the_prior_of_vectors_may_not_be_latent(fit):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.MultivariateNormal(mu, torch.eye(4)))
            pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)

    found = fit(model, {"y": counts_data(8)}, guide="auto")
    assert "not conjugate: y: not affine in the statistics of Normal block" in str(found.plan)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_move_to_their_optimum(shared):
    """Newton on the rows of a coupled quadratic with exponentials, against a general optimiser."""
    rows, size = 6, 5
    factor = draws(1 if shared else rows, size, size)
    precision = factor @ factor.mT + torch.eye(size)
    prior = Coupled("z", size, draws(rows, size, seed=1), precision, torch.zeros(1, dtype=D), 1.0)
    up, down = -draws(rows * size, seed=2).exp(), -0.3 * draws(rows * size, seed=3).exp()
    linear = 2 * draws(rows * size, seed=4)

    def bound(mean, scale):
        statistics = NORMAL_EXPS.expected({"loc": mean, "scale": scale})
        own = linear @ statistics[0] + up @ statistics[2] + down @ statistics[3]
        return prior.value({"z": statistics}).sum() + own + scale.log().sum()

    q = {"loc": torch.zeros(rows * size, dtype=D), "scale": torch.ones(rows * size, dtype=D)}
    before = float(bound(q["loc"], q["scale"]))
    for _ in range(30):
        statistics = NORMAL_EXPS.expected(q).requires_grad_()
        (eta,) = torch.autograd.grad(prior.value({"z": statistics}).sum(), statistics)
        eta = eta + torch.stack([linear, torch.zeros_like(up), up, down])
        q = prior.updated(eta.detach(), q)
        now = float(bound(q["loc"], q["scale"]))
        assert now >= before - 1e-12 * abs(before)
        before = now
    mean, scale = q["loc"].requires_grad_(), q["scale"].requires_grad_()
    slopes = torch.autograd.grad(bound(mean, scale), (mean, scale))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-8


def test_moments_are_the_m_step_of_vectors_with_a_full_factor(fit):
    """Two exact E-steps and moment matches per round: EM of a random-effects model by hand."""
    rng = np.random.default_rng(5)
    y = torch.tensor(rng.normal(size=(40, 3)) @ np.array([[1.0, 0.4, 0.1], [0, 0.8, 0.3], [0, 0, 0.5]]))

    def model(y):
        mu = pyro.param("mu", torch.zeros(3))
        tril = pyro.param("tril", torch.eye(3), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.MultivariateNormal(mu, scale_tril=tril))
            pyro.sample("y", dist.Normal(z, 0.3).to_event(1), obs=y)

    found = fit(model, {"y": y}, guide="auto")
    mean, cov = y.mean(0), torch.cov(y.T, correction=0)
    exact = dist.MultivariateNormal(mean, cov).log_prob(y).sum()
    assert found.elbo == pytest.approx(float(exact), abs=1e-7)
    torch.testing.assert_close(
        found.params["tril"] @ found.params["tril"].T, cov - 0.09 * torch.eye(3), atol=1e-5, rtol=0
    )
    assert all("closed form" in row.note for row in found.history if row.block == "M")


def loadings(y, start, is_compiled=True):
    w = pyro.param("w", start)
    sd = pyro.param("sd", torch.ones(y.shape[1]), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if is_compiled:
            pyro.sample("y", dist.Normal(z @ w, sd).to_event(1), obs=y)
        else:  # a family without slots
            pyro.sample("y", dist.MultivariateNormal(z @ w, scale_tril=sd.diag()), obs=y)


@pytest.mark.parametrize("constraint", [constraints.corr_cholesky, dist.constraints.unit_lower_cholesky])
def test_moments_that_a_constraint_forbids_are_no_m_step(fit, constraint):
    y = draws(80, 2) @ torch.tensor([[1.5, 0.0], [0.8, 1.0]], dtype=D).T

    def model(y):
        tril = pyro.param("tril", torch.eye(2), constraint=constraint)
        with pyro.plate("rows", 80):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def log_likelihood(tril):
        covariance = tril @ tril.mT + 0.25 * torch.eye(2)
        return float(dist.MultivariateNormal(torch.zeros(2, dtype=D), covariance).log_prob(y).sum())

    def of(free):
        corner = (1 - free**2) ** 0.5 if constraint is constraints.corr_cholesky else 1.0
        return torch.tensor([[1.0, 0.0], [free, corner]], dtype=D)

    best = optimize.minimize_scalar(
        lambda free: -log_likelihood(of(free)), bounds=(-0.999, 0.999), method="bounded"
    )
    for schedule in ("auto", "joint", "alternate"):
        result = fit(model, {"y": y}, guide="auto", schedule=schedule)
        assert result.elbo == pytest.approx(-best.fun, abs=1e-5)
        assert log_likelihood(result.params["tril"]) == pytest.approx(result.elbo, abs=1e-7)


def test_a_mean_that_a_constraint_forbids_is_no_m_step(fit):
    y = draws(60, 2) - 1.0

    def model(y):
        mu = pyro.param("mu", torch.ones(2), constraint=constraints.positive)
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", 60):
            z = pyro.sample("z", dist.MultivariateNormal(mu, scale_tril=tril))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    result = fit(model, {"y": y}, guide="auto")
    assert float(result.params["mu"].max()) < 1e-4
    exact = dist.MultivariateNormal(torch.zeros(2, dtype=D), y.T @ y / 60).log_prob(y).sum()
    assert result.elbo == pytest.approx(float(exact), abs=1e-3)


@pytest.mark.parametrize("guide", ["auto", None])
def test_zero_loadings_are_a_saddle_that_is_left(fit, guide):
    y = draws(80, 2, seed=1) @ draws(2, 5, seed=2) + 0.5 * draws(80, 5, seed=3)
    y = y - y.mean(0)
    good = fit(loadings, {"y": y, "start": 0.3 * draws(2, 5, seed=4)}, guide=guide)
    found = fit(loadings, {"y": y, "start": torch.zeros(2, 5)}, guide=guide)
    assert any("left a saddle of the bound" in row.note for row in found.history)
    assert found.status is vem.Status.converged
    assert found.elbo == pytest.approx(good.elbo, abs=1e-5)
    assert not any("saddle" in row.note for row in good.history)


def test_a_parameter_that_starts_at_zero_hides_no_latent(fit):
    """At zero loadings the likelihood does not see the latents: it must be drawn all the same."""
    y = draws(80, 2, seed=1) @ draws(2, 5, seed=2) + 0.5 * draws(80, 5, seed=3)
    data = {"y": y - y.mean(0), "start": torch.zeros(2, 5), "is_compiled": False}
    found = fit(loadings, data, max_iter=2)
    (likelihood,) = [row for row in found.plan.rows if row.site == "y"]
    assert likelihood.method == "draws"
    assert {batch.scope for batch in found.setup.objective.batches} == {("z",)}


def test_a_flat_direction_is_no_saddle(fit):
    """Only the sum of two parameters is identified: curvature along their difference is zero."""

    def model(y):
        a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(-0.2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(a + b, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([0.3, 1.2, 2.0], dtype=D)
    found = fit(model, {"y": y})
    assert not any("saddle" in row.note for row in found.history)
    assert float(found.params["a"] + found.params["b"]) == pytest.approx(float(y.mean()), abs=2e-4)
    exact = dist.Normal(y.mean(), math.sqrt(2)).log_prob(y).sum()
    assert found.elbo == pytest.approx(float(exact), abs=1e-8)


def test_singular_moments_are_not_taken(fit, monkeypatch):
    # Three rows of five: where a proposal shrinks all sds, no covariance matches their moments.
    def shrunk(rule, point, image, scale):
        rule.steps = [(image - point, image)]
        return np.concatenate([image[: image.size // 2], image[image.size // 2 :] - 30])

    monkeypatch.setattr(Anderson, "proposal", shrunk)
    y = torch.poisson(torch.full((3, 5), 3.0), generator=torch.Generator().manual_seed(0)).double()
    data = {"y": y, "kind": "covariance_matrix"}
    found = fit(counts, data, guide="auto", schedule="accelerated", max_iter=8)
    assert sum("extrapolation rolled back" in step.note for step in found.history) > 1
    assert min(step.gain for step in found.history) > -1e-9


def test_factors_of_vectors_have_their_lengths(fit):
    # What is extrapolated is weighed in posterior sds: a block in large units must not outweigh the rest.
    found = fit(zoo_em.random_slope, zoo_em.random_slope_data(), guide="auto", max_iter=2)
    setup, state = found.setup, found._points[-1]
    (tril,) = (value for name, value in found.guide_params.items() if "scale_tril" in name)
    scale = Scales(setup).of_factors(state)
    name = next(name for name in setup.phi.names if ".loc." in name)
    sds = (tril @ tril.mT).diagonal(dim1=-2, dim2=-1).sqrt()
    assert scale[setup.phi.where([name])] == pytest.approx(sds.reshape(-1).numpy())
