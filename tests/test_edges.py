"""Parameters whose maximum lies at the edge of their constraint, against exact maximum likelihood."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.fit.edges import Edges, ends
from pyro_vem.model.parameters import Block, Parameter

D = torch.float64
TINY = 1e-6  # nats between a fit's bound and that at the edge
ENUMERATED = {"infer": {"enumerate": "parallel"}}


def groups(seed=0, num=20, size=5, share=0.0, unit=1.0):
    """Data whose maximum-likelihood ratio of the two variances is `share`, or which is zero."""
    draws = np.random.default_rng(seed)
    y = draws.standard_normal((num, size))
    y -= y.mean(1, keepdims=True)
    means = draws.standard_normal((num, 1))
    within = (y**2).sum() / (num * (size - 1))
    means = (means - means.mean()) / means.std() * np.sqrt(within * (share + 1 / size)) if share else 0.0
    return torch.tensor(unit * (y + means + 2.0), dtype=D)


def intercepts(start=1.0):
    """A random intercept in each group."""

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        tau = pyro.param("tau", torch.tensor(start), constraint=constraints.positive)
        sigma = pyro.param("sigma", torch.tensor(start), constraint=constraints.positive)
        with pyro.plate("groups", y.shape[0], dim=-2):
            b = pyro.sample("b", dist.Normal(0.0, tau))
            with pyro.plate("rows", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(mu + b, sigma), obs=y)

    return model


def likelihood(y, log_sigma, v):
    """The marginal log likelihood at the best mean, v the variance between groups."""
    num, size = y.shape
    s2 = np.exp(2 * log_sigma)
    total = s2 + size * v
    within = float((y - y.mean(1, keepdim=True)).square().sum())
    between = size * float((y.mean(1) - y.mean()).square().sum())
    logs = num * (size * np.log(2 * np.pi) + (size - 1) * np.log(s2) + np.log(total))
    return -0.5 * (logs + within / s2 + between / total)


def best(y):
    """The maximum of the marginal likelihood over variances that are not negative, by SciPy."""
    centre = float(y.std().log())

    def loss(x):
        return -likelihood(y, centre + float(x[0]), np.exp(2 * centre) * float(x[1]))

    found = optimize.minimize(
        loss, [0.0, 0.1], bounds=[(-5, 5), (0, 10)], options={"ftol": 1e-15, "gtol": 1e-9}
    )
    return -float(found.fun), np.exp(centre) * np.sqrt(found.x[1])


@pytest.mark.parametrize("schedule", ["auto", "alternate", "accelerated", "profile", "joint"])
@pytest.mark.parametrize("guide", [None, "auto"])
def test_a_variance_component_of_zero_is_gone_to(fit, guide, schedule):
    y = groups()
    maximum, tau = best(y)
    assert tau == 0
    result = fit(intercepts(), {"y": y}, guide=guide, schedule=schedule)
    assert result.status is vem.Status.converged
    assert result.n_iter < 40
    assert result.elbo == pytest.approx(maximum, abs=TINY)
    assert [str(edge) for edge in result.boundary] == ["tau = 0"]
    assert any(row.note == "went to the boundary: tau" for row in result.history)
    assert "tau is at its boundary: the maximum is where tau = 0." in result.stop_reason


@pytest.mark.parametrize("guide", [None, "auto"])
def test_joint_steps_come_to_an_edge_from_wherever_they_start(fit, guide):
    """There values tell nothing of the last steps, and steps that wait for a check are no standstill."""
    y = groups()
    for seed in range(6):
        result = fit(intercepts(), {"y": y}, guide=guide, schedule="joint", seed=seed)
        assert result.converged
        assert [str(edge) for edge in result.boundary] == ["tau = 0"]


@pytest.mark.parametrize("guide", [None, "auto"])
@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3])
def test_units_do_not_matter(fit, unit, guide):
    y = groups(unit=unit)
    result = fit(intercepts(unit), {"y": y}, guide=guide)
    assert result.converged
    assert [str(edge) for edge in result.boundary] == ["tau = 0"]
    assert result.elbo == pytest.approx(best(y)[0], abs=TINY)


@pytest.mark.parametrize("guide", [None, "auto"])
@pytest.mark.parametrize("seed", [3, 4])
def test_another_sd_that_has_fallen_far_is_no_hindrance(fit, seed, guide):
    """The sd of rows has come down to its own maximum, from where a stride loses thousands of nats."""
    y = torch.tensor(0.3 * np.random.default_rng(seed).standard_normal((20, 3)))
    maximum, tau = best(y)
    assert tau == 0
    result = fit(intercepts(), {"y": y}, guide=guide)
    assert result.converged
    assert result.n_iter < 25
    assert [str(edge) for edge in result.boundary] == ["tau = 0"]
    assert result.elbo == pytest.approx(maximum, abs=TINY)


@pytest.mark.parametrize("guide", [None, "auto"])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
def test_a_small_variance_that_is_not_zero_is_no_edge(fit, unit, guide):
    """The maximum is a tenth of sigma inside; it is 0.6 nats above the edge."""
    y = groups(num=100, size=10, share=0.01, unit=unit)
    maximum, tau = best(y)
    assert 0.09 * unit < tau < 0.11 * unit
    result = fit(intercepts(unit), {"y": y}, guide=guide)
    assert result.converged
    assert result.boundary == ()
    assert float(result.params["tau"]) == pytest.approx(tau, rel=1e-3)
    assert result.elbo == pytest.approx(maximum, abs=TINY)


def test_one_of_two_components_is_zero(fit):
    """Crossed effects: the rows' is zero, the columns' is not."""
    draws = np.random.default_rng(0)
    y = draws.standard_normal((15, 12, 3))
    y = torch.tensor(y - y.mean((1, 2), keepdims=True) + draws.standard_normal((1, 12, 1)))

    def model(y, has_rows=True):
        mu = pyro.param("mu", torch.tensor(0.0))
        across = pyro.param("across", torch.tensor(1.0), constraint=constraints.positive)
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
        rows, columns = pyro.plate("rows", 15, dim=-3), pyro.plate("columns", 12, dim=-2)
        a = torch.zeros(())
        if has_rows:
            down = pyro.param("down", torch.tensor(1.0), constraint=constraints.positive)
            with rows:
                a = pyro.sample("a", dist.Normal(0.0, down))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, across))
        with rows, columns, pyro.plate("copies", 3, dim=-1):
            pyro.sample("y", dist.Normal(mu + a + b, sigma), obs=y)

    result = fit(model, {"y": y}, guide="auto")
    without = fit(model, {"y": y, "has_rows": False}, guide="auto")
    assert result.converged
    assert [edge.label for edge in result.boundary] == ["down"]
    assert result.elbo == pytest.approx(without.elbo, abs=TINY)
    errors, expected = result.standard_errors(), without.standard_errors()
    assert torch.isnan(errors["down"])
    for name in ("mu", "across", "sigma"):  # as if the component were left out
        assert float(errors[name]) == pytest.approx(float(expected[name]), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 0.4)])
def test_a_probability_at_an_end(fit, value, low, high):
    def model(y):
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.interval(low, high))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    result = fit(model, {"y": torch.full((20,), value)})
    end = high if value else low
    assert result.converged
    assert [edge.label for edge in result.boundary] == ["p"]
    assert result.boundary[0].limit == pytest.approx(end, abs=1e-12)
    assert result.elbo == pytest.approx(20 * np.log(end if value else 1 - end), abs=TINY)
    assert torch.isnan(result.standard_errors()["p"])
    assert "too large a penalty for p" in str(result.criteria())


def test_a_probability_near_an_end_is_inside(fit):
    y = torch.zeros(10_000)
    y[0] = 1.0

    def model(y):
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    result = fit(model, {"y": y})
    assert result.converged
    assert result.boundary == ()
    assert float(result.params["p"]) == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize("schedule", ["auto", "alternate", "joint"])
def test_a_mixture_weight_of_zero(fit, schedule):
    y = torch.tensor(0.5 * np.random.default_rng(1).standard_normal(60))

    def model(y):
        w = pyro.param("w", torch.ones(3) / 3, constraint=constraints.simplex)
        means, sds = torch.tensor([0.0, 0.3, 9.0]), torch.tensor([0.5, 2.0, 1.0])
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w), **ENUMERATED)
            pyro.sample("y", dist.Normal(means[z], sds[z]), obs=y)

    result = fit(model, {"y": y}, schedule=schedule)
    assert result.converged
    assert [str(edge) for edge in result.boundary] == ["w[1] = 0", "w[2] = 0"]
    assert result.elbo == pytest.approx(stats.norm(0, 0.5).logpdf(y.numpy()).sum(), abs=TINY)
    assert torch.isnan(result.standard_errors()["w"]).all()  # the first is one minus zeros


def test_a_map_site_whose_density_is_largest_at_zero(fit):
    @vem.vem_model(map_sites=("rate",))
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    result = fit(model, {"y": torch.zeros(10)})
    assert result.converged
    assert [str(edge) for edge in result.boundary] == ["rate = 0"]
    assert result.elbo == pytest.approx(0.0, abs=TINY)


def test_counts_that_vary_less_than_poisson_ones(fit):
    """A Poisson model with a random intercept: without a closed form."""
    rows = [[2.0, 3.0, 1.0, 2.0], [1.0, 2.0, 3.0, 2.0], [2.0, 2.0, 2.0, 1.0], [3.0, 2.0, 1.0, 2.0]]
    y = torch.tensor(4 * rows, dtype=D)

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("groups", len(y), dim=-2):
            b = pyro.sample("b", dist.Normal(mu, tau))
            with pyro.plate("rows", y.shape[1], dim=-1):
                pyro.sample("y", dist.Poisson(b.exp()), obs=y)

    result = fit(model, {"y": y})
    assert result.converged
    assert result.n_iter < 40
    assert [edge.label for edge in result.boundary] == ["tau"]
    assert result.elbo == pytest.approx(float(dist.Poisson(y.mean()).log_prob(y).sum()), abs=TINY)


def test_what_is_said_of_it(fit, tmp_path):
    """The card, the diagnosis, standard errors, criteria and files."""
    y, model = groups(), intercepts()
    result = fit(model, {"y": y}, guide="auto")
    sentence = "tau is at its boundary"
    assert sentence in repr(result)
    assert any(sentence in note for note in result.diagnose(num_draws=500).notes)
    errors = result.standard_errors()
    n = y.numel()
    sd = float((y - y.mean()).square().mean().sqrt())
    assert torch.isnan(errors["tau"])
    assert float(errors["mu"]) == pytest.approx(sd / n**0.5, rel=1e-4)
    assert float(errors["sigma"]) == pytest.approx(sd / (2 * n) ** 0.5, rel=1e-4)
    assert "tau, at its boundary" in str(result.criteria())
    result.save(tmp_path / "fit.safetensors")
    assert vem.VEMResult.load(tmp_path / "fit.safetensors", model, {"y": y}).boundary == result.boundary
    again = fit(model, {"y": y}, guide="auto", init=result)
    assert again.converged
    assert [str(edge) for edge in again.boundary] == ["tau = 0"]


@pytest.mark.parametrize("guide", [None, "auto"])
def test_a_fit_to_other_data_leaves_the_edge_of_an_earlier_one(fit, guide):
    """Slopes at an edge are rounding, so that a warm start alone would stay at a minimum."""
    y, model = groups(share=1.0), intercepts()
    maximum, tau = best(y)
    assert tau > 0.5
    at_edge = fit(model, {"y": groups()}, guide=guide)
    result = fit(model, {"y": y}, guide=guide, init=at_edge)
    assert result.converged
    assert result.boundary == ()
    assert result.elbo == pytest.approx(maximum, abs=TINY)
    assert any(row.note == "began inside the boundary: tau" for row in result.history)


@pytest.mark.parametrize(
    ("constraint", "value", "expected"),
    [
        (constraints.real, 0.5, ([False], [False])),
        (constraints.positive, 0.5, ([True], [False])),
        (constraints.greater_than(2.0), 3.0, ([True], [False])),
        (constraints.unit_interval, 0.5, ([True], [True])),
        (constraints.simplex, [0.2, 0.8], ([True, True], [False, False])),
        (constraints.lower_cholesky, [[1.0, 0.0], [0.5, 2.0]], ([True, False, False, True], [False] * 4)),
        (constraints.corr_cholesky, [[1.0, 0.0], [0.0, 1.0]], ([True], [True])),
    ],
)
def test_which_numbers_have_ends(constraint, value, expected):
    parameter = Parameter("x", constraint, torch.tensor(value, dtype=D))
    every = np.ones(parameter.unconstrained.numel(), dtype=bool)
    down, up = ends(parameter, every, every)
    assert (down.tolist(), up.tolist()) == expected


def test_a_singular_covariance_has_no_limit_of_its_own():
    """The variance at a factor's zero is what the rest of its row leaves of it: any number."""
    start = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=D)
    named = {}
    starts = {constraints.positive_definite: start, constraints.lower_cholesky: torch.linalg.cholesky(start)}
    for constraint, value in starts.items():
        setup = SimpleNamespace(theta=Block([Parameter("cov", constraint, value)]))
        edges = Edges(setup, lambda *_: None)
        named[constraint] = [str(edge) for edge in edges.named(np.array([0.0, 0.0, 0.0, -1.0]))]
    assert list(named.values()) == [["cov[1, 1] at its limit"], ["cov[1, 1] = 0"]]


def two_factors(y):
    """More factors than the data have: errors of some columns go to zero (Heywood cases)."""
    w = pyro.param("w", 0.5 * torch.randn(2, y.shape[1], generator=torch.Generator().manual_seed(7)))
    sd = pyro.param("sd", torch.ones(y.shape[1]), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ w, sd).to_event(1), obs=y)


def most_likely(y, factors, starts=6):
    """The maximum of the marginal likelihood of factor analysis, by SciPy."""
    cross, num, size = (y.T @ y).numpy(), *y.shape
    split = factors * size

    def value(x):
        w, sd = x[:split].reshape(factors, size), x[split:]
        cov = w.T @ w + np.diag(sd**2 + 1e-10)
        root, inverse = np.linalg.slogdet(cov)[1], np.linalg.inv(cov)
        slope = num * inverse - inverse @ cross @ inverse
        total = 0.5 * (num * (size * np.log(2 * np.pi) + root) + np.sum(inverse * cross))
        return total, np.concatenate([(w @ slope).ravel(), np.diag(slope) * sd])

    found = []
    for seed in range(starts):
        start = np.concatenate([np.random.default_rng(seed).standard_normal(split), np.ones(size)])
        options = {"maxiter": 20_000, "ftol": 1e-15, "gtol": 1e-8}
        found.append(-optimize.minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun)
    return max(found)


def test_an_error_that_loadings_have_to_follow_to_zero(fit):
    noise = torch.Generator().manual_seed(3)
    z, w = torch.randn(25, 1, generator=noise, dtype=D), torch.randn(1, 5, generator=noise, dtype=D)
    y = z @ w + torch.randn(25, 5, generator=noise, dtype=D)
    result = fit(two_factors, {"y": y}, max_iter=40)
    assert result.converged
    assert [str(edge) for edge in result.boundary] == ["sd[2] = 0"]
    assert result.elbo == pytest.approx(most_likely(y, 2), abs=TINY)  # loadings turn until scores part
