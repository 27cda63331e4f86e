"""Standard errors over the rows of a plate, against formulas and against the exact likelihood by hand."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_vem as vem

D = torch.float64


def test_regression_with_unequal_noise_is_white(fit):
    """HC0 of White (1980): (X'X)^-1 X' diag(e^2) X (X'X)^-1."""
    rng = np.random.default_rng(2)
    x = np.stack([np.ones(120), rng.normal(size=120)], axis=1)
    y = x @ [1.0, 2.0] + (0.2 + np.abs(x[:, 1])) * rng.normal(size=120)

    def model(x, y):
        beta = pyro.param("beta", torch.zeros(2))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sd), obs=y)

    found = fit(model, {"x": torch.tensor(x), "y": torch.tensor(y)})
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    bread = np.linalg.inv(x.T @ x)
    white = bread @ (x.T * (y - x @ beta) ** 2) @ x @ bread
    errors = found.standard_errors(plate="rows")["beta"].numpy()
    np.testing.assert_allclose(errors, np.sqrt(np.diag(white)), rtol=1e-5)
    plain = found.standard_errors()["beta"].numpy()
    assert errors[1] > 1.3 * plain[1]  # the noise grows with x, which plain errors do not see
    frame = found.covariance("params", names=["beta"], plate="rows")
    np.testing.assert_allclose(frame.to_numpy(), white, rtol=1e-5)


def groups_data():
    rng = np.random.default_rng(4)
    u = rng.standard_t(4, size=40)
    return torch.tensor(0.5 + u[:, None] + rng.normal(size=(40, 6)) * (1 + (u[:, None] > 0)))


def intercepts(y):
    mu = pyro.param("mu", torch.tensor(0.0))
    sd_u = pyro.param("sd_u", torch.tensor(1.0), constraint=constraints.positive)
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", y.shape[0], dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(mu + sd_u * u, sd), obs=y)


@pytest.mark.parametrize("guide", [None, "auto"])
def test_random_intercepts_have_the_sandwich_of_their_likelihood(fit, guide):
    """The E-step is exact, so a group's score is that of its marginal likelihood."""
    y = groups_data()
    found = fit(intercepts, {"y": y}, guide=guide)
    point = torch.tensor([float(found.params[n]) for n in ("mu", "sd_u", "sd")], dtype=D)

    def likelihood(theta):
        cov = theta[1] ** 2 * torch.ones(6, 6, dtype=D) + theta[2] ** 2 * torch.eye(6, dtype=D)
        return torch.distributions.MultivariateNormal(theta[0].expand(6), cov).log_prob(y)

    scores = torch.autograd.functional.jacobian(likelihood, point)
    hessian = torch.autograd.functional.hessian(lambda theta: likelihood(theta).sum(), point)
    inverse = torch.linalg.inv(hessian)
    by_hand = inverse @ scores.T @ scores @ inverse
    errors = found.standard_errors(plate="groups")
    expected = dict(zip(("mu", "sd_u", "sd"), by_hand.diagonal().sqrt(), strict=True))
    for name, value in expected.items():
        assert float(errors[name]) == pytest.approx(float(value), rel=2e-3), name
    plain = found.standard_errors()  # of a mean under equal designs both agree
    assert float(errors["mu"]) == pytest.approx(float(plain["mu"]), rel=1e-6)
    assert float(errors["sd"]) > 1.2 * float(plain["sd"])


def test_a_global_factor_is_an_estimate_too(fit):
    """With a latent outside the plate its reaction is part of the parameters' error."""
    y = groups_data()

    def model(y):
        sd_u = pyro.param("sd_u", torch.tensor(1.0), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("groups", y.shape[0], dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(mu + sd_u * u, 1.5), obs=y)

    found = fit(model, {"y": y})
    assert 0 < float(found.standard_errors(plate="groups")["sd_u"]) < 1


def shared_by_index(group, y):
    mu = pyro.param("mu", torch.tensor(0.0))
    tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("group", 8):
        u = pyro.sample("u", dist.Normal(mu, tau))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(u[group], 0.5), obs=y)


def shared_and_learnt(group, y):
    tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
    u = pyro.sample("u", dist.Normal(torch.zeros(8), tau).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(u[group], 0.5), obs=y)


def shared_at_a_map_site(group, y):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    u = pyro.sample("u", dist.Normal(torch.zeros(8), tau).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(u[group], sd), obs=y)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (shared_by_index, ["'u' of plate 'group'", "plate='group'", "standard_errors()"]),
        (
            shared_and_learnt,
            ["'u' is outside plate 'row'", "prior depends on parameters", "standard_errors()"],
        ),
        (vem.vem_model(shared_at_a_map_site, map_sites=("tau",)), ["'u' is outside plate 'row'"]),
    ],
)
def test_rows_that_share_a_sample_of_latents_have_no_sandwich(fit, model, told):
    """Their scores do not hold how the latents vary: errors of mu would be many times too small."""
    group = torch.arange(80) % 8
    y = group - 3.5 + 0.3 * torch.sin(torch.arange(80.0))
    found = fit(model, {"group": group, "y": y})
    with pytest.raises(vem.ModelError) as error:
        found.standard_errors(plate="row")
    for text in told:
        assert text in str(error.value)
    assert all(error.isfinite().all() for error in found.standard_errors().values())


def test_rows_that_do_not_come_apart_are_refused(fit):
    def model(group, y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("groups", 3):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u[group], 1.0), obs=y)

    data = {"group": torch.tensor([0, 1, 2, 0, 1, 2]), "y": torch.arange(6.0)}
    found = fit(model, data)
    with pytest.raises(vem.ModelError, match="site 'y' is outside plate 'groups'"):
        found.standard_errors(plate="groups")
    with pytest.raises(vem.ModelError, match=r"row.*rows"):
        found.standard_errors(plate="row")
    with pytest.raises(ValueError, match="plate='rows' is for of='params'"):
        found.covariance(plate="rows")


def test_criteria_of_a_mixture_are_scikit_learns(fit):
    """Without factors the bound is the log likelihood; a simplex of two has one free number."""
    mixture = pytest.importorskip("sklearn.mixture")
    import zoo_em

    found = fit(zoo_em.two_waits, {"y": zoo_em.WAITING})
    data = zoo_em.WAITING.numpy()[:, None]
    peer = mixture.GaussianMixture(2, tol=1e-12, max_iter=5000, means_init=[[50.0], [80.0]], reg_covar=0.0)
    peer.fit(data)
    criteria = found.criteria()
    assert criteria.num_parameters == 5
    assert not criteria.is_bound
    assert criteria.aic == pytest.approx(peer.aic(data), abs=1e-5)
    assert criteria.bic == pytest.approx(peer.bic(data), abs=1e-5)
    assert "AIC = " in str(criteria)


def test_rows_are_those_that_are_observed(fit):
    """Of sites that share a discrete one each has its own; what is masked says nothing."""

    def model(y, w, is_seen):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m + 4 * z, 1.0), obs=y)
            with pyro.poutine.mask(mask=is_seen):
                pyro.sample("w", dist.Normal(2 * z, 1.0), obs=w)
        with pyro.plate("pairs", 3):
            inside = torch.tensor([[True, False], [False, False], [True, True]])
            pyro.sample("u", dist.Normal(m, torch.ones(3, 2)).mask(inside).to_event(1), obs=torch.ones(3, 2))

    y, w = torch.tensor([0.0, 4.0, 4.1, -0.5]), torch.tensor([0.0, 2.0, 2.1, 0.2])
    found = fit(model, {"y": y, "w": w, "is_seen": torch.tensor([True, True, False, True])})
    assert found.criteria().num_rows == 4 + 3 + 2


def test_one_row_has_no_bic(fit):
    """A marginal Gaussian process: all data are one vector, and log n would be no penalty at all."""
    x = torch.linspace(0.0, 1.0, 8)

    def process(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        cov = sd**2 * ((-((x[:, None] - x) ** 2)).exp() + 0.1 * torch.eye(8))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), cov), obs=y)

    criteria = fit(process, {"y": x.sin()}).criteria()
    assert criteria.num_rows == 1
    assert np.isnan(criteria.bic)
    assert np.isfinite(criteria.aic)
    assert "independent rows" in str(criteria)


def test_criteria_say_that_they_are_bounds(fit):
    found = fit(intercepts, {"y": groups_data()})
    assert found.criteria().num_rows == 240
    assert found.criteria(plate="groups").num_rows == 40
    assert str(found.criteria()).startswith("AIC <= ")
    with pytest.raises(vem.ModelError, match=r"fit.loo\(\)"):
        fit(
            lambda y: pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=y),
            {"y": torch.tensor(0.3)},
        ).criteria()


@pytest.mark.parametrize(
    "kind",
    ["positive_definite", "positive_semidefinite", "lower_cholesky", "softplus_lower_cholesky"],
)
def test_matrices_have_as_many_numbers_as_move(fit, kind):
    """A covariance has d (d + 1) / 2; errors of maximum likelihood in closed form (Wishart's)."""
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(-1)

    def model(y):
        matrix = pyro.param("matrix", torch.eye(3), constraint=getattr(dist.constraints, kind))
        named = {"scale_tril" if "cholesky" in kind else "covariance_matrix": matrix}
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), **named), obs=y)

    found = fit(model, {"y": y})
    assert found.criteria().num_parameters == 6
    matrix, errors = found.params["matrix"], found.standard_errors()["matrix"]
    if "cholesky" in kind:
        assert float(errors[0, 0]) == pytest.approx(float(matrix[0, 0]) / 400**0.5, rel=1e-5)
        assert not errors.triu(1).any()
    else:
        variances = matrix.diagonal()
        exact = ((variances * variances[:, None] + matrix**2) / 200).sqrt()
        torch.testing.assert_close(errors, exact, rtol=1e-5, atol=0)


def test_a_unit_diagonal_does_not_move(fit):
    """Slope of one column on the other, with the error of least squares."""
    y = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(-1)

    def model(y):
        unit = pyro.param("unit", torch.eye(2), constraint=dist.constraints.unit_lower_cholesky)
        sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=unit * sd), obs=y)

    found = fit(model, {"y": y})
    assert found.criteria().num_parameters == 3
    sd, errors = found.params["sd"], found.standard_errors()["unit"]
    assert float(errors[1, 0]) == pytest.approx(float(sd[1] / sd[0]) / 200**0.5, rel=1e-5)
    assert errors.count_nonzero() == 1
