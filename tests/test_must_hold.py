"""The promises on real problems, each against an exact answer."""

import numpy as np
import pyro
import pytest
import torch
import zoo
from sklearn.datasets import load_iris
from torch import nn

import pyro_vem as vem


def fresh_elbo(fit, num_draws=20_000, seed=11):
    densities = fit.draw(num_draws, seed, "densities")["densities"]
    ratio = densities["log_p"] - densities["log_q"]
    return float(ratio.mean()), float(ratio.std() / num_draws**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_eight_schools_reaches_the_best_gaussian(fit, seed):
    result = fit(zoo.eight_schools, zoo.SCHOOLS, seed=seed)
    assert result.status is vem.Status.converged
    assert result.history[0].before < zoo.SCHOOLS_BEST_ELBO - 1, "it did not start there"
    elbo, se = fresh_elbo(result)
    assert se < 0.015
    assert abs(elbo - zoo.SCHOOLS_BEST_ELBO) < 0.05


@pytest.mark.parametrize("prior", zoo.priors(), ids=lambda prior: prior.name)
def test_prior_only_fit_is_the_best_gaussian(fit, prior):
    def model():
        pyro.sample("z", prior.make())

    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(model)
    loc = result.guide_params["guide.loc.z"].numpy()
    scale = result.guide_params["guide.scale.z"].numpy()
    assert np.all(np.abs(loc - prior.loc) < 0.05 * prior.scale)
    assert np.all(np.abs(np.log(scale / prior.scale)) < 0.1)
    assert np.any(np.abs(np.log(scale / 0.1)) > 0.2), "where it started is no answer"


def test_lognormal_prior_is_exact_where_pyro_loses_the_jacobian(fit):
    def model():
        pyro.sample("s", pyro.distributions.LogNormal(0.0, 1.0))

    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(model)
    assert result.plan["s"].method == "closed form"
    assert abs(float(result.guide_params["guide.loc.s"])) < 1e-3
    # TraceMeanField_ELBO with AutoNormal: its Delta KL drops the Jacobian of exp
    guide = pyro.infer.autoguide.AutoNormal(model)
    adam = pyro.optim.Adam({"lr": 0.02})
    svi = pyro.infer.SVI(model, guide, adam, pyro.infer.TraceMeanField_ELBO())
    for _ in range(300):
        svi.step()
    assert pyro.param("AutoNormal.locs.s").item() < -0.7


def test_em_reaches_maximum_likelihood_of_random_effects(fit):
    y = zoo.random_effects_data()
    exact, log_likelihood = zoo.random_effects_exact(y)
    early = fit(zoo.random_effects, {"y": y}, max_iter=1)
    assert any(abs(float(early.params[name]) / value - 1) > 1e-2 for name, value in exact.items())
    result = fit(zoo.random_effects, {"y": y})
    assert result.converged
    for name, value in exact.items():
        assert float(result.params[name]) == pytest.approx(value, rel=1e-4)
    assert result.elbo == pytest.approx(log_likelihood, abs=1e-3)
    assert result.diagnose().verdict.name == "GOOD"


class LinearEncoder(nn.Module):
    """loc = A (y - c), one sd for each latent dimension: the exact posterior of PPCA is one."""

    def __init__(self, columns, q):
        super().__init__()
        torch.manual_seed(0)
        self.loc = nn.Linear(columns, q)
        self.log_scale = nn.Parameter(torch.zeros(q))

    def forward(self, y):
        loc = self.loc(y)
        return loc, self.log_scale.exp().expand_as(loc)


@pytest.mark.parametrize("schedule", ["auto", "joint", pytest.param("alternate", marks=pytest.mark.slow)])
def test_linear_encoder_reaches_maximum_likelihood_ppca(fit, schedule):
    y = load_iris().data
    exact = zoo.ppca_exact(y)
    guide = vem.AmortizedNormal(zoo.ppca, {"z": LinearEncoder(4, 2)}, inputs="y")

    def covariance(result):
        weights = result.params["W"].numpy()
        return weights.T @ weights + float(result.params["sigma"]) ** 2 * np.eye(4)

    result = fit(zoo.ppca, {"y": y}, guide=guide, schedule=schedule)
    assert result.converged
    assert result.history[0].before < result.elbo - 100, "it did not start there"
    assert np.abs(covariance(result) - exact).max() < 1e-3


def test_pumps_reach_the_best_diagonal_gaussian(fit):
    result = fit(zoo.pumps, zoo.PUMPS)
    assert result.converged
    assert float(result.params["mu"]) == pytest.approx(-1.1766, abs=2e-3)
    assert float(result.params["tau"]) == pytest.approx(1.2738, abs=2e-3)
    assert result.elbo == pytest.approx(-32.1525, abs=4 * result.elbo_se + 1e-3)
    exact = zoo.pumps_log_likelihood(-1.1768, 1.2881)
    assert exact == pytest.approx(-32.0374, abs=1e-3)
    assert exact - result.elbo == pytest.approx(0.115, abs=4 * result.elbo_se + 1e-3)
