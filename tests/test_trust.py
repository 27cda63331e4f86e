"""What a fit says of itself: linear response, weights, verdict, rows, corrections, predictions."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.fit.driver import restart
from pyro_vem.posterior import checks, plots
from pyro_vem.posterior.arrowhead import Arrowhead, Layout, NotDefinite, Solver, dense
from pyro_vem.posterior.checks import latent_scales, other_starts, reparameterise
from pyro_vem.posterior.containers import psis
from pyro_vem.posterior.importance import as_pool, at_noise, guide_pool, response_pool
from pyro_vem.posterior.nested import nested_pool
from pyro_vem.posterior.rows import row_khat


class Encoder(torch.nn.Module):
    """A linear one; with weight zero it says the same of every row."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.layer, self.weight = torch.nn.Linear(1, 2), weight

    def forward(self, y):
        loc, scale = (self.weight * self.layer(y[:, None])).unbind(-1)
        return loc, scale.exp()


def gaussian(cov):
    """A model whose posterior is N(0, cov): a wide prior, taken back by a factor."""
    target = dist.MultivariateNormal(torch.zeros(len(cov), dtype=torch.float64), cov)

    def model():
        prior = dist.Normal(torch.zeros(len(cov), dtype=torch.float64), 100.0)
        x = pyro.sample("x", prior.to_event(1))
        pyro.factor("f", target.log_prob(x) - prior.log_prob(x).sum())

    return model


def covariances():
    """Three correlation structures with sds from 0.1 to 10."""
    sd = torch.linspace(0.1, 10.0, 10, dtype=torch.float64)
    eye = torch.eye(10, dtype=torch.float64)
    ar = 0.95 ** (torch.arange(10)[:, None] - torch.arange(10)).abs().double()
    return [
        ("diagonal", eye * sd * sd[:, None]),
        ("equicorrelated", (0.9 + 0.1 * eye) * sd * sd[:, None]),
        ("autoregressive", ar * sd * sd[:, None]),
    ]


@pytest.mark.parametrize(("name", "cov"), covariances(), ids=lambda x: x if isinstance(x, str) else "")
def test_linear_response_is_the_covariance_of_a_gaussian(fit, name, cov):
    result = fit(gaussian(cov))
    found = result.covariance().to_numpy()
    scale = np.sqrt(np.outer(cov.diagonal(), cov.diagonal()))
    assert np.abs((found - cov.numpy()) / scale).max() < 1e-6
    mean_field = result.guide_params["guide.scale.x"].numpy() ** 2
    if name != "diagonal":  # the test can fail: the guide's own variances are far off
        assert np.abs(mean_field / cov.diagonal().numpy() - 1).max() > 0.5
    draws = result.sample(4000, correction="linear_response")["x"].numpy()
    error = np.abs(np.cov(draws.T) - cov.numpy()) / scale
    assert error.max() < 5 * (2 / 4000) ** 0.5


def test_linear_response_mends_the_sds_of_a_regression(fit):
    """Means of the predictors are far from zero: mean field sees a tenth of the intercept's sd."""
    generator = np.random.default_rng(0)
    x = generator.normal(5.0, 1.0, (200, 3))
    y = torch.from_numpy(1.0 + x @ [1.0, -1.0, 0.5] + 0.7 * generator.normal(size=200))
    design = torch.from_numpy(np.column_stack([np.ones(200), x]))

    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros(4, dtype=torch.float64), 10.0).to_event(1))
        with pyro.plate("rows", 200):
            pyro.sample("y", dist.Normal(design @ b, 0.7), obs=y)

    result = fit(model, {"y": y})
    exact = torch.linalg.inv(design.T @ design / 0.49 + torch.eye(4, dtype=torch.float64) / 100)
    frame = result.covariance()
    assert list(frame.columns) == ["b[0]", "b[1]", "b[2]", "b[3]"]
    assert np.allclose(frame, exact, rtol=1e-6, atol=1e-9)
    assert float(result.guide_params["guide.scale.b"][0]) < 0.2 * float(exact[0, 0].sqrt())
    verdict = result.diagnose()
    assert verdict.verdict is vem.Verdict.USE_WITH_CORRECTION
    assert verdict.correction == "linear_response"
    assert verdict.khat > 0.7 > verdict.khat_corrected
    assert verdict.table.loc["b", "sd_ratio"] < 0.2
    assert verdict.table.loc["b", "sd_ratio_lr"] == pytest.approx(1.0, abs=0.05)


def test_covariances_of_transformed_latents_are_those_of_the_draws(fit):
    def model(y):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(a * p, 0.3), obs=y)

    result = fit(model, {"y": torch.tensor([0.5, 0.7, 0.6, 0.9, 0.4])})
    draws = result.sample(200_000, correction="linear_response")
    table = torch.stack([draws["a"], draws["p"]]).numpy()
    assert np.allclose(result.covariance(), np.cov(table), rtol=0.03)
    assert result.covariance(names=["p"]).shape == (1, 1)
    with pytest.raises(vem.ModelError, match="unknown name 'aa'"):
        result.covariance(names=["aa"])
    weighted = result.covariance(method="psis")
    psis = result.sample(20_000, correction="psis")
    assert np.allclose(np.diag(weighted), [psis["a"].var(), psis["p"].var()], rtol=0.1)


def test_plates_are_eliminated_block_by_block():
    """An arrowhead of 3 rows of 2 with 2 more; a coupling between rows is refused; CG agrees."""
    generator = np.random.default_rng(1)
    rows, rest = np.arange(6).reshape(3, 2), np.array([6, 7])
    matrix = np.zeros((8, 8))
    for row in rows:
        block = generator.normal(size=(2, 2))
        matrix[np.ix_(row, row)] = block @ block.T + np.eye(2)
        matrix[np.ix_(row, rest)] = generator.normal(size=(2, 2)) / 3
    matrix[np.ix_(rest, rest)] = 4 * np.eye(2)
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    count = []
    inverse = Arrowhead(lambda v: count.append(1) or matrix @ v, 8, Layout(rows, rest))
    assert len(count) == 5  # four products and one to check them
    every, truth = np.arange(8), np.linalg.inv(matrix)
    assert np.allclose(inverse.covariance(every), truth)
    assert np.allclose(inverse.variances(every), np.diag(truth))
    assert np.allclose(inverse.covariance(np.array([7, 0])), truth[np.ix_([7, 0], [7, 0])])
    draws = inverse.draws(100_000, every, np.random.default_rng(0))
    assert np.allclose(np.cov(draws.T), truth, atol=0.03)
    assert np.allclose(Arrowhead(lambda v: matrix @ v, 8, dense(8)).covariance(every), truth)
    assert np.allclose(Solver(lambda v: matrix @ v, 8).covariance(every), truth, atol=1e-7)
    matrix[0, 3] = matrix[3, 0] = 0.1
    with pytest.raises(ValueError, match="between the rows"):
        Arrowhead(lambda v: matrix @ v, 8, Layout(rows, rest))
    with pytest.raises(NotDefinite):
        Arrowhead(lambda v: matrix @ v - 3 * v, 8, dense(8))
    with pytest.raises(NotDefinite):
        Solver(lambda v: matrix @ v - 3 * v, 8)


def hierarchy(groups):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, groups, generator=generator, dtype=torch.float64)
    y = y + 0.8 * torch.randn(groups, generator=generator, dtype=torch.float64)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("groups", groups):
            a = pyro.sample("a", dist.Normal(mu, 0.8))
            with pyro.plate("rows", 4):
                pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    return model, {"y": y}


def test_many_groups_cost_as_many_products_as_few(fit):
    """Exact Gaussian answers with 3,000 local latents; the dense matrix would take 6,002 products."""
    model, data = hierarchy(3000)
    response = fit(model, data)._linear_response
    precision = 4 / 1.0 + 1 / 0.64
    weight = (1 / 0.64) / precision
    schur = 3000 / 0.64 * (1 - weight) + 0.01
    sd = dict(zip([site.name for site in response.sites], np.split(response.sd, [1]), strict=True))
    assert sd["mu"] == pytest.approx(schur**-0.5, rel=1e-6)
    assert np.allclose(sd["a"], (1 / precision + weight**2 / schur) ** 0.5, rtol=1e-6)


def test_globals_are_weighted_with_their_rows_summed_out(fit):
    """120 conjugate rows: evidence and posterior in closed form; the guide's joint k-hat is no use."""
    model, data = hierarchy(120)
    result = fit(model, data)
    pool = nested_pool(result, result._linear_response, 1, num_draws=500)
    y = data["y"].numpy().T
    within, between, prior = 1.0, 0.64, 100.0
    cov = np.kron(np.eye(120), within * np.eye(4) + between) + prior
    evidence = stats.multivariate_normal(np.zeros(480), cov).logpdf(y.reshape(-1))
    assert pool.log_evidence == pytest.approx(evidence, abs=5 / pool.effective**0.5)
    assert pool.khat < 0.5
    assert pool.is_usable
    precision = 120 / (between + within / 4) + 1 / prior
    mean = y.mean(1).sum() / (between + within / 4) / precision
    values = at_noise(result, pool.noise, "values")["values"]
    mu, a = values["mu"].numpy(), values["a"].numpy()
    found = pool.weights @ mu
    error = 5 * precision**-0.5 / pool.effective**0.5
    assert found == pytest.approx(mean, abs=error)
    assert (pool.weights @ (mu - found) ** 2) ** 0.5 == pytest.approx(precision**-0.5, rel=0.15)
    row_precision = 4 / within + 1 / between
    means = (4 * y.mean(1) / within + mean / between) / row_precision
    sd = (1 / row_precision + (1 / between / row_precision) ** 2 / precision) ** 0.5
    assert np.abs(pool.weights @ a - means).max() < 6 * sd / pool.effective**0.5


def test_a_hierarchy_with_many_groups_gets_a_verdict(fit):
    """400 groups and a latent spread: no joint weights, but weights of the globals."""
    generator = torch.Generator().manual_seed(0)
    y = torch.poisson((0.5 + 0.7 * torch.randn(400, generator=generator)).exp().expand(5, 400), generator)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 400):
            a = pyro.sample("a", dist.Normal(mu, tau))
            with pyro.plate("rows", 5):
                pyro.sample("y", dist.Poisson(a.exp()), obs=y)

    result = fit(model, {"y": y})
    verdict = result.diagnose(num_draws=2000)
    assert verdict.khat_corrected > 0.7 > verdict.khat_globals
    assert verdict.verdict is not vem.Verdict.UNRELIABLE
    assert "of the globals" in verdict.numbers


def test_standard_errors_are_those_of_maximum_likelihood(fit):
    """Exact E-step: the profiled bound is the log likelihood, balanced one-way random effects."""

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        between = pyro.param("between", torch.tensor(1.0), constraint=dist.constraints.positive)
        within = pyro.param("within", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("groups", y.shape[-1]):
            a = pyro.sample("a", dist.Normal(mu, between))
            with pyro.plate("rows", y.shape[0]):
                pyro.sample("y", dist.Normal(a, within), obs=y)

    data = hierarchy(50)[1]
    result = fit(model, data)
    y = data["y"]

    def minus_log_likelihood(theta):
        mu, between, within = theta
        cov = between**2 * torch.ones(4, 4, dtype=torch.float64) + within**2 * torch.eye(4)
        return -torch.distributions.MultivariateNormal(mu.expand(4), cov).log_prob(y.T).sum()

    point = torch.stack([result.params[name] for name in ("mu", "between", "within")])
    exact = torch.linalg.inv(torch.autograd.functional.hessian(minus_log_likelihood, point)).diagonal().sqrt()
    errors = result.standard_errors()
    found = torch.stack([errors[name] for name in ("mu", "between", "within")])
    assert torch.allclose(found, exact, rtol=1e-4)
    frame = result.covariance("params")
    assert list(frame.columns) == ["mu", "between", "within"]
    assert result.covariance("params", names=["within"]).shape == (1, 1)


def steps(y):
    """A Gaussian random walk seen with noise: its means hang together, under independent factors."""
    drift = pyro.param("drift", torch.tensor(0.0))
    size = pyro.param("size", torch.tensor(1.0), constraint=dist.constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    walk = torch.ones(len(y), len(y)).tril() * size
    z = pyro.sample("z", dist.MultivariateNormal(drift * torch.arange(len(y)), scale_tril=walk))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, noise), obs=y)


def test_parameters_that_a_loose_bound_has_moved_are_named(fit):
    """The exact likelihood's Newton step, and a verdict that does not pass over it."""
    generator = torch.Generator().manual_seed(0)
    n = 25
    y = 0.3 * torch.randn(n, generator=generator).double().cumsum(0)
    y = y + torch.randn(n, generator=generator).double()
    result = fit(steps, {"y": y})
    names = ("drift", "size", "noise")

    def log_likelihood(theta):
        drift, size, noise = theta
        walk = torch.ones(n, n, dtype=torch.float64).tril() * size
        cov = walk @ walk.T + noise**2 * torch.eye(n)
        return torch.distributions.MultivariateNormal(drift * torch.arange(n), cov).log_prob(y)

    point = torch.stack([result.params[name] for name in names])
    evidence = float(log_likelihood(point))
    gradient = torch.autograd.functional.jacobian(log_likelihood, point)
    covariance = torch.tensor(result.covariance("params").to_numpy())
    exact = (covariance @ gradient).abs() / covariance.diagonal().sqrt()
    verdict = result.diagnose()
    assert abs(verdict.gap - (evidence - result.elbo)) < 0.05  # of the weights that are believed
    found = torch.tensor([verdict.drift[name] for name in names], dtype=torch.float64)
    assert exact.max() > 1
    assert torch.allclose(found, exact, atol=0.15)
    worst = names[int(exact.argmax())]
    assert f"estimates of {worst}" in verdict.headline
    assert f"{worst!r} by" in verdict.reasons[-1]
    assert "integrate latents out" in verdict.actions[0]
    assert "AutoMultivariateNormal" in verdict.actions[0]


def test_parameters_of_a_tight_bound_have_not_moved(fit):
    """Next to no gap: no look; a gap that moves little: a note at most."""
    exact = fit(zoo.random_effects, {"y": zoo.random_effects_data()}).diagnose()
    assert not exact.drift
    verdict = fit(zoo.pumps, zoo.PUMPS).diagnose()
    assert verdict.gap > 0.1
    assert max(verdict.drift.values()) < 0.2
    assert verdict.verdict is vem.Verdict.GOOD
    assert not verdict.reasons
    assert not verdict.notes


def test_no_covariance_is_made_up(fit):
    def ridge(y):
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    result = fit(ridge, {"y": torch.linspace(1.0, 4.0, 9)})
    assert result.converged
    with pytest.raises(vem.ModelError, match="no covariance: the bound"):
        result.standard_errors()
    unfinished = fit(zoo.pumps, zoo.PUMPS, max_iter=1)
    with pytest.raises(vem.ModelError, match="max_iterations"):
        unfinished.covariance()
    with pytest.raises(vem.ModelError, match="no free parameters"):
        fit(zoo.eight_schools, zoo.SCHOOLS).standard_errors()


def test_encoders_have_no_linear_response(fit):
    def model(y):
        with pyro.plate("rows", 20):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = vem.AmortizedNormal(model, {"z": Encoder()}, inputs="y")
    result = fit(model, {"y": torch.linspace(-1, 1, 20)}, guide=guide)
    with pytest.raises(vem.ModelError, match="encoder ties"):
        result.covariance()


def test_weights_of_a_wide_proposal_find_the_evidence(fit):
    """Conjugate normal: log evidence in closed form, from both pools."""
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    result = fit(gaussian(cov))
    for pool in (guide_pool(result, 20_000, 3), response_pool(result, result._linear_response, 20_000, 3)):
        se = pool.log_ratio.std() / pool.effective**0.5
        assert abs(pool.log_evidence) < 5 * se, pool.proposal
    assert response_pool(result, result._linear_response, 20_000, 3).khat < 0


def test_smoothing_agrees_with_a_pareto_tail():
    ratio = np.log(stats.pareto(1 / 0.5).rvs(20_000, random_state=0))
    log_weights, khat = psis(ratio)
    assert khat == pytest.approx(0.5, abs=0.12)
    assert np.exp(log_weights).sum() == pytest.approx(1.0)


def test_evidence_of_weights_that_underflow():
    """One draw with all of the weight: the others' are zero as numbers, and no less for their logs."""
    even = np.random.default_rng(0).normal(size=101)  # whose tail of 21 smoothing changes
    pool, low = as_pool("guide", even, 101.0, {}), even.argmin()
    assert pool.log_evidence == pytest.approx(even[low] - pool.log_weights[low] - np.log(101), abs=1e-12)
    ratio = np.r_[np.linspace(0.0, 1.0, 999), 2000.0]
    pool = as_pool("guide", ratio, 1000.0, {})
    assert pool.weights[0] == 0.0
    assert pool.log_evidence == pytest.approx(2000.0 - np.log(1000), abs=5)


def test_psis_mends_eight_schools(fit):
    """E[tau] by quadrature is 3.62; the guide's own mean is 2.9."""
    result = fit(zoo.eight_schools, zoo.SCHOOLS)
    corrected = result.sample(20_000, correction="psis")["tau"]
    assert float(result.sample(20_000)["tau"].mean()) < 3.1
    assert float(corrected.mean()) == pytest.approx(zoo.schools_mean_of_tau(), abs=0.15)


def centred(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_a_centred_hierarchy_is_told_to_be_reparameterised(fit):
    result = fit(centred, zoo.SCHOOLS)
    verdict = result.diagnose()
    assert verdict.verdict is vem.Verdict.UNRELIABLE
    assert "LocScaleReparam(0.0)" in verdict.actions[0]
    assert "'theta'" in verdict.actions[0]
    with pytest.raises(vem.ModelError, match="no importance weights"):
        result.sample(10, correction="psis")
    mended = fit(pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)}), zoo.SCHOOLS)
    assert mended.elbo == pytest.approx(zoo.SCHOOLS_BEST_ELBO, abs=1e-3)
    assert mended.diagnose().verdict is not vem.Verdict.UNRELIABLE


@pytest.mark.parametrize("seed", [2, 5, 6])
def test_funnels_do_not_pass_by_luck(fit, seed):
    """Centred hierarchies whose k-hat may be below 0.7 by luck, and tau off by 0.3 sd or more."""
    y = torch.from_numpy(1 + 2.0 * np.random.default_rng(8008 + 10 * seed).normal(size=8))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("groups", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 2.0), obs=y)

    result = fit(model, {"y": y})
    exact = zoo.mean_and_sd_of_tau(y.numpy(), 2.0, stats.halfnorm(0, 5))
    tau = result.sample(20_000)["tau"]
    verdict = result.diagnose()
    if abs(float(tau.mean()) - exact[0]) > 0.25 * exact[1]:
        assert verdict.verdict is not vem.Verdict.GOOD
    if verdict.correction:
        corrected = result.sample(20_000, correction=verdict.correction)["tau"]
        assert abs(float(corrected.mean()) - exact[0]) < 0.25 * exact[1]


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)])
def test_the_non_centred_one_is_never_unreliable(fit, seeds):
    result = fit(zoo.eight_schools, zoo.SCHOOLS)
    for seed in seeds:
        assert result.diagnose(seed=100 + seed).verdict is not vem.Verdict.UNRELIABLE


def test_rows_are_judged_one_by_one(fit):
    """A plate of conjugate rows, two of which have a likelihood that no Gaussian follows."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 40):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Cauchy(z, torch.where(torch.arange(40) < 38, 5.0, 0.05)), obs=y)

    y = torch.zeros(40)
    y[38:] = 3.0
    rows = row_khat(fit(model, {"y": y}))
    assert rows.plate == "rows"
    assert rows.khat.shape == (40,)
    assert rows.worst[0] >= 38
    assert rows.khat[:38].max() < 0.5 < rows.khat[38:].min()


def test_rows_that_hang_together_have_no_khat_of_their_own(fit):
    def walk(y):
        with pyro.plate("time", 10):
            step = pyro.sample("step", dist.Normal(0.0, 1.0))
        with pyro.plate("seen", 10):
            pyro.sample("y", dist.Normal(step.cumsum(-1), 1.0), obs=y)

    assert row_khat(fit(walk, {"y": torch.linspace(0, 3, 10)})) is None


def test_other_starts_find_another_mode(fit):
    def two(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(x**2, 0.3), obs=y)

    result = fit(two, {"y": torch.full((20,), 1.5)}, init={"x": 1.0})
    verdict = result.diagnose(restarts=4)
    assert verdict.verdict is vem.Verdict.UNRELIABLE
    assert "several modes" in verdict.reasons[0]


def test_other_starts_of_a_guide_that_is_not_ours_start_elsewhere(fit):
    def two(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(x**2, 0.3), obs=y)

    def guide(y):
        loc, scale = pyro.param("loc", torch.tensor(1.0)), pyro.param("scale", torch.tensor(-2.0))
        pyro.sample("x", dist.Normal(loc, scale.exp()))

    result = fit(two, {"y": torch.full((20,), 1.5)}, guide=guide)
    means = [restart(result, seed).sample(100)["x"].mean() for seed in range(8)]
    assert {round(float(mean)) for mean in means} == {-1, 1}
    assert "several modes" in other_starts(result, 8, 0)[0]


def test_other_starts_keep_what_is_held(fit):
    def model(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, sd))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    data = {"y": torch.tensor([0.0, 1.0, 2.0, -2.0])}
    held = fit(vem.vem_model(model, fixed=["sd"]), data, init={"sd": 2.0})
    assert float(restart(held, 1).params["sd"]) == 2.0
    assert other_starts(held, 2, 1)[0] is None
    new = fit(model, data).infer({"y": torch.tensor([3.0, 1.0])})
    assert other_starts(new, 2, 1) == (
        None, "no other starts were looked at: infer() holds what they would move",
    )  # fmt: skip


def test_starts_that_run_away_are_no_better(fit, monkeypatch):
    result = fit(zoo.pumps, zoo.PUMPS)
    ends = [
        dataclasses.replace(result, elbo=np.nan, status=vem.Status.nonfinite),
        dataclasses.replace(result, elbo=result.elbo + 50, status=vem.Status.diverged),
        dataclasses.replace(result, elbo=result.elbo - 2),
        dataclasses.replace(result, elbo=result.elbo + 3),
    ]
    monkeypatch.setattr(checks, "restart", lambda _, seed: ends[seed])
    low, high = f"{result.elbo - 2:.3f}", f"{result.elbo + 3:.3f}"
    assert other_starts(result, 2, 0) == (None, "2 other starts have all run away")
    assert other_starts(result, 3, 0) == (
        None, f"ELBO over 1 other starts: {low} to {low}; 2 more have run away",
    )  # fmt: skip
    assert other_starts(result, 4, 0) == (
        f"another start (seed 3) reaches an ELBO of {high}",
        f"ELBO over 2 other starts: {low} to {high}; 2 more have run away",
    )


def test_other_starts_of_estimates_are_noted(fit):
    def model(y):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    diagnosis = fit(model, {"y": torch.ones(4)}).diagnose(restarts=2)
    assert diagnosis.verdict is vem.Verdict.GOOD
    assert diagnosis.notes == ("ELBO over 2 other starts: -3.676 to -3.676",)


def test_a_latent_that_nothing_depends_on_is_noted(fit):
    def model(y):
        pyro.sample("idle", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    notes = fit(model, {"y": torch.ones(3)}).diagnose().notes
    assert any("'idle'" in note and "data say nothing" in note for note in notes)


def line(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(b * x, s), obs=y)


def test_predictions_at_the_data_and_at_new_ones(fit):
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    y = 2 * x + 0.5 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = fit(line, {"x": x, "y": y})
    state = torch.get_rng_state()
    own = result.predict(num_draws=500)
    assert torch.equal(torch.get_rng_state(), state)
    assert own["y"].shape == (500, 50)
    assert torch.equal(own["y"], result.predict(num_draws=500)["y"])
    assert not torch.equal(own["y"], result.predict(num_draws=500, seed=1)["y"])
    new = result.predict({"x": torch.tensor([3.0])}, num_draws=4000)
    b, s = new["b"], new["s"]
    assert float(new["y"].mean()) == pytest.approx(3 * float(b.mean()), abs=0.05)
    assert float(new["y"].var()) == pytest.approx(9 * float(b.var()) + float((s**2).mean()), rel=0.1)
    prior = result.predict(num_draws=2000, kind="prior")
    assert float(prior["b"].std()) == pytest.approx(10.0, rel=0.08)
    with pytest.raises(vem.ModelError, match="unknown name 'z'"):
        result.predict({"z": x})
    with pytest.raises(vem.ModelError, match="missing a required argument"):
        result.predict({"y": y})


@pytest.mark.parametrize("new", [False, True])
def test_noise_of_predictions_is_not_that_of_the_latents(fit, new):
    """y - z and z are independent given the data; all 64 rows together tell it to 0.01."""

    def model(y=None):
        with pyro.plate("rows", 64):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    made = fit(model, {"y": torch.zeros(64)}).predict({"y": None} if new else None, num_draws=200, seed=3)
    noise = made["y"] - made["z"]
    assert float((noise * made["z"]).mean()) == pytest.approx(0.0, abs=5 * (0.5 / made["z"].numel()) ** 0.5)
    assert float(noise.var()) == pytest.approx(1.0, rel=0.06)


def test_pointwise_log_likelihood_at_new_data(fit):
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    result = fit(line, {"x": x, "y": 2 * x + 0.3})
    own = result.log_likelihood(num_draws=100)["y"]
    again = result.log_likelihood({"x": x, "y": 2 * x + 0.3}, num_draws=100)["y"]
    assert own.shape == (100, 50)
    assert torch.allclose(own, again)


def test_latents_of_a_plate_that_grew_are_new(fit):
    model, data = zoo.pumps, zoo.PUMPS
    result = fit(model, data)
    hours = torch.cat([zoo.PUMP_HOURS, zoo.PUMP_HOURS[:2]])
    made = result.predict({"hours": hours}, num_draws=2000)
    assert made["rate"].shape == (2000, 12)
    log_rate = made["rate"].log()
    assert float(log_rate[:, 11].std()) == pytest.approx(float(result.params["tau"]), rel=0.08)


def test_an_encoder_predicts_other_rows_than_it_was_fitted_on(fit):
    """z ~ N(0, 1), y ~ N(z, 1): the exact posterior of a row is N(y / 2, 1 / 2), seen or not."""

    def model(y=None, rows=None):
        with pyro.plate("rows", len(y) if rows is None else rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.log_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, y):
            loc = self.layer(y[:, None])[:, 0]
            return loc, self.log_scale.exp().expand_as(loc)

    y = torch.linspace(-2, 2, 20)
    result = fit(model, {"y": y}, guide=vem.AmortizedNormal(model, {"z": Encoder()}, inputs="y"))
    made = result.predict({"y": torch.tensor([-3.0, 0.0, 3.0])}, num_draws=4000)
    assert made["y"].shape == (4000, 3)
    error = made["z"].mean(0) - torch.tensor([-1.5, 0.0, 1.5])
    assert float(error.abs().max()) < 4 * (0.5 / 4000) ** 0.5
    assert made["z"].std(0).numpy() == pytest.approx(0.5**0.5, rel=0.05)


def test_the_card_reads_the_same_in_a_notebook(fit):
    result = fit(zoo.eight_schools, zoo.SCHOOLS)
    text = result._repr_html_()
    assert text.startswith("<table>")
    assert "USE WITH CORRECTION" in text
    assert "correction=&#x27;psis&#x27;" in text


def test_plots_draw_into_given_axes(fit):
    plt = pytest.importorskip("matplotlib.pyplot")
    result = fit(zoo.pumps, zoo.PUMPS)
    _, axes = plt.subplots(1, 3)
    ax = plots.terms_over_steps(result, axes[0])
    assert ax is axes[0]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"rate", "failures"}
    bars = plots.terms(result, axes[1]).patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(result.elbo, abs=1e-6)
    plots.khat_rows(result.diagnose(), axes[2])
    assert axes[2].get_xlabel() == "row of pump"
    plt.close("all")
    with pytest.raises(vem.ModelError, match="no plate of latents"):
        plots.khat_rows(dataclasses.replace(result.diagnose(), rows=None))


def test_what_has_no_random_latent_has_nothing_to_correct(fit):
    def model(y):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    result = fit(model, {"y": torch.ones(4)})
    assert result.diagnose().verdict is vem.Verdict.GOOD
    assert float(result.standard_errors()["m"]) == pytest.approx(0.5, rel=1e-6)
    assert result.predict(num_draws=7)["y"].shape == (7, 4)
    for correction, why in (("psis", "no latent is random"), ("linear_response", "a mean and an sd")):
        with pytest.raises(vem.ModelError, match=why):
            result.sample(3, correction=correction)


@pytest.mark.parametrize("start", [0.9, -0.9])
def test_a_mode_that_the_guide_makes_no_draws_in_is_seen(fit, start):
    """|z| observed: the other sign is another mode. Few draws or none see it, and their weights are equal."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        with pyro.plate("rows", 1):
            pyro.sample("y", dist.Normal(z.abs(), 0.3), obs=y)

    result = fit(model, {"y": torch.ones(1)}, init={"z": torch.tensor(start)})
    found = [result.diagnose(seed=seed) for seed in range(1, 7)]
    assert {diagnosis.verdict for diagnosis in found} == {vem.Verdict.UNRELIABLE}


def test_a_guide_that_is_judged_alone_says_so(fit):
    """|z| observed four times: only wider draws than the guide's could see the other mode."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z.abs(), 1.0), obs=y)

    data = {"y": torch.full((4,), 3.0)}
    notes = fit(model, data, guide=AutoNormal(model)).diagnose().notes
    assert notes[0].startswith("no wider draws were looked at: linear response needs a mean and an sd")
    assert not any("no wider draws" in note for note in fit(model, data).diagnose().notes)


def test_the_same_funnel_in_another_spelling(fit):
    """The latent scale is inside a covariance."""
    y = torch.from_numpy(1 + 1.5 * np.random.default_rng(8056).normal(size=8))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        eye = torch.eye(8, dtype=torch.float64)
        theta = pyro.sample("theta", dist.MultivariateNormal(mu.expand(8), scale_tril=tau * eye))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)

    result = fit(model, {"y": y})
    exact = zoo.mean_and_sd_of_tau(y.numpy(), 1.0, stats.halfnorm(0, 5))
    shift = abs(float(result.sample(20_000)["tau"].mean()) - exact[0]) / exact[1]
    assert shift < 0.25 or result.diagnose().verdict is not vem.Verdict.GOOD


def test_points_are_no_posterior(fit):
    def model(y):
        s = pyro.sample("s", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, s), obs=y)

    def half(y):
        pyro.sample(
            "s", dist.Delta(pyro.param("s0", torch.tensor(0.5), constraint=dist.constraints.positive))
        )
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample(
            "z", dist.Normal(loc, pyro.param("sd", torch.tensor(0.3), constraint=dist.constraints.positive))
        )

    data = {"y": torch.tensor([0.1, 0.5, -0.3, 0.9])}
    for guide in (half, AutoDelta(model)):
        verdict = fit(model, data, guide=guide).diagnose()
        assert verdict.verdict is vem.Verdict.UNRELIABLE
        assert "'s'" in verdict.reasons[0]
        assert "a point, not a posterior" in verdict.reasons[0]
    both = vem.vem_model(map_sites=("s", "z"))(model)
    assert "no posterior to judge" in str(fit(both, data).diagnose())


def test_what_weights_cannot_mend_has_a_remedy(fit):
    """A bent posterior: the refusal and the card name guides that follow correlations."""

    def banana():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[0] ** 2 * x[1], 0.01), obs=torch.tensor(1.0))

    result = fit(banana)
    with pytest.raises(vem.ModelError, match=r"effective draws .*; follow correlations: .*reparameterise"):
        result.sample(10, correction="psis")
    with pytest.raises(vem.ModelError, match=r"follow correlations"):
        result.covariance(method="psis")
    actions = result.diagnose().actions
    assert 'guide="auto"' in actions[0]
    assert "AutoMultivariateNormal(model)" in actions[1]
    assert "reparameterise" in actions[2]


def test_an_encoder_is_not_told_to_be_reparameterised(fit):
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    data = {"y": torch.linspace(-3, 3, 60)}
    guide = vem.AmortizedNormal(model, {"z": Encoder(weight=0.0)}, inputs="y")
    result = fit(model, data, guide=guide, max_iter=3)
    (action,) = reparameterise(result)
    assert "amortization_gap()" in action
    assert "epochs" in action


def test_cards_without_a_posterior_say_what_to_do_next(fit):
    """Maximum likelihood and MAP: nothing is sampled, there is no verdict, and there is a next step."""

    def waits(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y)

    @vem.vem_model(map_sites=("mu",))
    def point(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def mixture(y):
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y)

    data = {"y": torch.tensor([0.1, -0.4, 0.3, 4.2, 3.6])}
    one = fit(waits, data)
    assert one.plan["y"].method == "point"
    for text in (str(one), str(fit(point, data))):
        assert "exact    none" not in text
        assert "sampled  none" in text
        assert "verdict" not in text
    assert "next     fit.standard_errors(), fit.criteria() to compare models" in str(one)
    assert "criteria" not in str(fit(point, data))
    assert "num_starts=8" in str(fit(mixture, data))
    assert "num_starts=8" not in str(fit(mixture, data, num_starts=2))


def test_moments_that_overflow_are_not_dropped(fit):
    def model(y):
        x = pyro.sample("x", dist.Gamma(0.01, 0.01))
        pyro.sample("y", dist.Poisson(x), obs=y)

    verdict = fit(model, {"y": torch.tensor(0.0)}).diagnose()
    assert verdict.verdict is not vem.Verdict.GOOD


def test_reparameterisation_is_offered_where_it_works(fit):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 8):
            a = pyro.sample("a", dist.LogNormal(mu, tau))
            pyro.sample("y", dist.Normal(a, 2.0), obs=y)

    assert latent_scales(fit(model, {"y": torch.linspace(0.5, 3.0, 8)})) == {"a": False}
    assert latent_scales(fit(centred, zoo.SCHOOLS)) == {"theta": True}
    assert latent_scales(fit(zoo.eight_schools, zoo.SCHOOLS)) == {}


@pytest.mark.parametrize("kind", ["scale_tril", "covariance_matrix", "low rank", "known"])
def test_scales_inside_covariances_are_seen(fit, kind):
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        eye = torch.eye(3)
        if kind == "low rank":
            prior = dist.LowRankMultivariateNormal(torch.zeros(3), tau * eye[:, :1], torch.ones(3))
        elif kind == "known":
            prior = dist.MultivariateNormal(tau.expand(3), scale_tril=2 * eye)
        else:
            prior = dist.MultivariateNormal(torch.zeros(3), **{kind: tau * eye})
        theta = pyro.sample("theta", prior)
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)

    found = latent_scales(fit(model, {"y": torch.tensor([0.5, -2.0, 3.0])}, max_iter=1))
    assert found == ({} if kind == "known" else {"theta": False})


def test_priors_in_float32_are_no_matter(fit):
    prior = dist.HalfCauchy(1.0)

    def model(y):
        with pyro.plate("rows", len(y)):
            s = pyro.sample("s", prior)
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    fit(model, {"y": torch.tensor([0.5, 1.0, 2.0])}).diagnose(num_draws=1000)


def test_new_data_that_do_not_fit_are_refused(fit):
    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(torch.zeros(len(x), dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    result = fit(model, {"x": torch.ones(3), "y": torch.ones(3)})
    with pytest.raises(vem.ModelError, match="into a plate"):
        result.predict({"x": torch.ones(5)})
    with pytest.raises(vem.ModelError, match="no observation in the new data"):
        result.log_likelihood({"x": torch.ones(3)})


def test_a_guide_that_runs_on_new_data_takes_no_correction(fit):
    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 0.3), obs=y)

    x = torch.linspace(-1, 1, 9)
    data = {"x": x, "y": 2 * x}
    result = fit(model, data, guide=AutoNormal(model))
    assert result.predict(num_draws=5, correction="psis")["y"].shape == (5, 9)
    for ask in (result.predict, result.log_likelihood):
        with pytest.raises(vem.ModelError, match=r"correction='psis' .* MeanFieldNormal\(model\)"):
            ask(data, num_draws=5, correction="psis")


def test_rows_missing_in_new_data_are_predicted(fit):
    def model(x, y, mask):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 0.1), obs=y, obs_mask=mask)

    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 4.0, 0.0, 8.0])
    data = {"x": x, "y": y, "mask": torch.tensor([True, True, False, True])}
    result = fit(model, data)
    made = result.predict({**data, "mask": torch.tensor([False, True, True, True])}, num_draws=500)
    assert float(made["y_unobserved"][:, 0].mean()) == pytest.approx(2.0, abs=0.1)
