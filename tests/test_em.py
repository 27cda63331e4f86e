"""EM in full: mixtures, chains, random effects, item responses; schedules, starts, standard errors."""

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo_em
from pyro.infer.autoguide.initialization import init_to_mean
from scipy import special
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.fit.together import Together, drawn_again
from pyro_vem.posterior.importance import pools

D = torch.float64
WAITS = {"y": zoo_em.WAITING}
POSITIVE, INTERVAL = constraints.positive, constraints.unit_interval
Y8 = torch.tensor([0.1, -0.8, 0.4, 0.9, -0.3, 6.1, 5.2, 5.9], dtype=D)


def test_old_faithful_is_the_fixed_point_of_em(fit):
    """Values of scikit-learn's GaussianMixture at tol=1e-12, and of mixtools' normalmixEM."""
    result = fit(zoo_em.two_waits, WAITS)
    assert result.converged
    assert result.elbo == pytest.approx(-1034.00174983, abs=1e-7)
    assert result.params["weights"].numpy() == pytest.approx([0.36088607, 0.63911393], abs=1e-5)
    assert result.params["mu"].numpy() == pytest.approx([54.61485614, 80.0910694], abs=1e-5)
    assert result.params["sd"].numpy() == pytest.approx([5.87121941, 5.86773442], abs=1e-5)
    assert abs(result.history[0].before - result.elbo) > 1  # not so at the start
    assert {row.method for row in result.plan.rows} == {"enumeration", "closed form"}


def test_new_rows_of_a_mixture_are_told_apart_by_held_parameters(fit):
    """What infer() says to do where a model has no factors of rows, held against Bayes' rule."""
    found = fit(zoo_em.two_waits, {"y": zoo_em.WAITING})
    with pytest.raises(
        vem.ModelError, match=r"discrete sites only.*fixed=tuple\(fit.params\).*responsibilities"
    ):
        found.infer({"y": zoo_em.WAITING[:5]})

    @vem.vem_model(fixed=tuple(found.params))
    def held(y):
        zoo_em.two_waits(y)

    new = fit(held, {"y": zoo_em.WAITING[:5]}, init=found.params)
    assert all(torch.equal(new.params[name], value) for name, value in found.params.items())
    torch.testing.assert_close(new.responsibilities()["z"], found.responsibilities()["z"][:5])


def test_standard_errors_of_a_mixture_are_those_of_its_likelihood(fit):
    result = fit(zoo_em.two_waits, WAITS)

    def log_likelihood(free):
        weights = torch.stack([free[0], 1 - free[0]])
        fn = dist.Normal(free[1:3], free[3:5])
        return (weights.log() + fn.log_prob(zoo_em.WAITING.unsqueeze(-1))).logsumexp(-1).sum()

    p = result.params
    point = torch.cat([p["weights"][:1], p["mu"], p["sd"]])
    information = -torch.autograd.functional.hessian(log_likelihood, point)
    exact = torch.linalg.inv(information).diagonal().sqrt()
    errors = result.standard_errors()
    found = torch.cat([errors["weights"][:1], errors["mu"], errors["sd"]])
    assert torch.allclose(found, exact, rtol=1e-5)


def test_responsibilities_are_bayes_rule(fit):
    result = fit(zoo_em.two_waits, WAITS)
    p = result.params
    logits = p["weights"].log() + dist.Normal(p["mu"], p["sd"]).log_prob(zoo_em.WAITING.unsqueeze(-1))
    assert torch.allclose(result.responsibilities()["z"], logits.softmax(-1), atol=1e-10)


def cavi_of_two_waits(responsibility, rounds=500):
    """Coordinate ascent by hand: q(weights) q(mu) q(tau) q(z), every factor of its own."""
    y = zoo_em.WAITING.numpy()
    r = responsibility
    a, b = np.full(2, 2.0), np.full(2, 20.0)
    for _ in range(rounds):
        alpha = 2.0 + r.sum(0)
        precision = 1 / 400 + a / b * r.sum(0)
        mean = (70 / 400 + a / b * (r * y[:, None]).sum(0)) / precision
        a = 2.0 + 0.5 * r.sum(0)
        b = 20.0 + 0.5 * (r * ((y[:, None] - mean) ** 2 + 1 / precision)).sum(0)
        log_tau = special.digamma(a) - np.log(b)
        logits = special.digamma(alpha) + 0.5 * log_tau
        logits = logits - 0.5 * a / b * ((y[:, None] - mean) ** 2 + 1 / precision)
        r = special.softmax(logits, axis=1)
    return alpha, mean, precision, a, b, r


def bound_by_hand(alpha, mean, precision, a, b, r):
    """The bound of that factorisation, constants included."""
    y = zoo_em.WAITING.numpy()
    log_w = special.digamma(alpha) - special.digamma(alpha.sum())
    log_tau = special.digamma(a) - np.log(b)
    square = (y[:, None] - mean) ** 2 + 1 / precision
    bound = (r * (log_w + 0.5 * log_tau - 0.5 * np.log(2 * np.pi) - 0.5 * a / b * square)).sum()
    bound -= special.xlogy(r, r).sum()
    bound += special.gammaln(4) + log_w.sum()
    bound += special.gammaln(alpha).sum() - special.gammaln(alpha.sum()) - ((alpha - 1) * log_w).sum()
    prior_mean = -0.5 * np.log(2 * np.pi * 400) - ((mean - 70) ** 2 + 1 / precision) / 800
    bound += (prior_mean + 0.5 * np.log(2 * np.pi * np.e / precision)).sum()
    prior_tau = 2 * np.log(20) + log_tau - 20 * a / b
    entropy = a - np.log(b) + special.gammaln(a) + (1 - a) * special.digamma(a)
    return bound + (prior_tau + entropy).sum()


def test_a_bayesian_mixture_is_cavi_by_hand(fit):
    result = fit(zoo_em.two_waits_bayes, WAITS, tol=1e-13)
    result = fit(zoo_em.two_waits_bayes, WAITS, tol=1e-13, init=result)  # beyond what rounding leaves of tol
    by_hand = cavi_of_two_waits(result.responsibilities()["z"].numpy())
    alpha, mean, precision, a, b, _ = by_hand
    phi = {name.removeprefix("guide."): value.numpy() for name, value in result.guide_params.items()}
    assert phi["concentration.weights"] == pytest.approx(alpha, rel=1e-7)
    assert phi["loc.mu"] == pytest.approx(mean, rel=1e-8)
    assert phi["scale.mu"] == pytest.approx(precision**-0.5, rel=1e-7)
    assert phi["concentration.tau"] == pytest.approx(a, rel=1e-7)
    assert phi["rate.tau"] == pytest.approx(b, rel=1e-6)
    assert result.elbo == pytest.approx(bound_by_hand(*by_hand), abs=1e-7)


def forward_backward(start, moves, mu, sd, y):
    """Log likelihood and marginals of a chain, by hand."""
    emission = dist.Normal(mu, sd).log_prob(y.unsqueeze(-1)).exp()
    alpha, log_likelihood, forward = start, 0.0, []
    for t in range(len(y)):
        alpha = (alpha if t == 0 else alpha @ moves) * emission[t]
        log_likelihood += float(alpha.sum().log())
        alpha = alpha / alpha.sum()
        forward.append(alpha)
    beta, marginals = torch.ones(2, dtype=D), []
    for t in reversed(range(len(y))):
        marginals.append(forward[t] * beta / (forward[t] * beta).sum())
        beta = moves @ (emission[t] * beta)
        beta = beta / beta.sum()
    return log_likelihood, torch.stack(marginals[::-1])


def switching():
    generator = torch.Generator().manual_seed(2)
    states = torch.tensor([0] * 8 + [1] * 10 + [0] * 7)
    return 2.5 * states - 1 + torch.randn(25, generator=generator, dtype=D)


def test_a_hidden_markov_chain_has_forward_and_backward(fit):
    y = switching()
    result = fit(zoo_em.chain, {"y": y})
    p = result.params
    log_likelihood, marginals = forward_backward(p["start"], p["moves"], p["mu"], p["sd"], y)
    assert result.elbo == pytest.approx(log_likelihood, abs=1e-9)
    found = torch.stack([result.responsibilities()[f"z{t}"] for t in range(25)])
    assert torch.allclose(found, marginals, atol=1e-8)
    # Baum and Welch's M-step for the emissions changes nothing.
    weights = marginals.sum(0)
    mean = (marginals * y.unsqueeze(-1)).sum(0) / weights
    assert torch.allclose(p["mu"], mean, atol=1e-4)
    variance = (marginals * (y.unsqueeze(-1) - mean).square()).sum(0) / weights
    assert torch.allclose(p["sd"], variance.sqrt(), atol=1e-4)


def test_a_random_intercept_is_maximum_likelihood(fit):
    data = zoo_em.slow_em_data(1)
    result = fit(zoo_em.random_intercept, data, guide="auto")
    exact = torch.stack(zoo_em.best_balanced(data["y"]))
    names = ("mu", "between", "within")
    found = torch.stack([result.params[name] for name in names])
    assert torch.allclose(found, exact, atol=1e-3)

    def log_likelihood(point):
        return zoo_em.balanced_log_likelihood(*point, data["y"])

    assert result.elbo == pytest.approx(float(log_likelihood(exact)), abs=1e-6)
    information = -torch.autograd.functional.hessian(log_likelihood, exact)
    errors = torch.stack([result.standard_errors()[name] for name in names])
    assert torch.allclose(errors, torch.linalg.inv(information).diagonal().sqrt(), rtol=0.02)


def test_a_random_slope_has_an_exact_e_step(fit):
    data = zoo_em.random_slope_data()
    result = fit(zoo_em.random_slope, data, guide="auto")
    assert result.converged
    assert result.plan["y"].proof.startswith("affine in the statistics of z (Normal block)")
    p = result.params
    tril = p["tril"]
    point = torch.stack([*p["beta"], tril[0, 0], tril[1, 0], tril[1, 1], p["within"]])

    def log_likelihood(x):
        zero = torch.zeros((), dtype=D)
        made = torch.stack([torch.stack([x[2], zero]), torch.stack([x[3], x[4]])])
        return zoo_em.slope_log_likelihood(x[:2], made, x[5], data["x"], data["group"], data["y"])

    assert result.elbo == pytest.approx(float(log_likelihood(point)), abs=1e-8)
    information = -torch.autograd.functional.hessian(log_likelihood, point)
    slope = torch.autograd.functional.jacobian(log_likelihood, point)
    assert (torch.linalg.solve(information, slope).abs() < 1e-3).all()  # a Newton step away from the MLE
    exact = torch.linalg.inv(information).diagonal().sqrt()
    errors = result.standard_errors()
    made = [*errors["beta"], errors["tril"][0, 0], errors["tril"][1, 0], errors["tril"][1, 1]]
    assert torch.allclose(torch.stack([*made, errors["within"]]), exact, rtol=0.02)


def test_probabilistic_pca_is_the_eigenvalues(fit):
    """Tipping and Bishop (1999): the maximum of the likelihood in closed form."""
    generator = torch.Generator().manual_seed(5)
    loadings = torch.randn(2, 5, generator=generator, dtype=D)
    y = torch.randn(150, 2, generator=generator, dtype=D) @ loadings
    y = y + 0.5 * torch.randn(150, 5, generator=generator, dtype=D)

    def model(y):
        w = pyro.param("w", 0.1 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
        mu, sd = pyro.param("mu", torch.zeros(5)), pyro.param("sd", torch.tensor(1.0), constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(mu + z @ w, sd).to_event(1), obs=y)

    result = fit(model, {"y": y}, guide="auto")
    values = torch.linalg.eigvalsh(torch.cov(y.T, correction=0)).flip(0)
    noise = values[2:].mean()
    cov = result.params["w"].T @ result.params["w"] + result.params["sd"] ** 2 * torch.eye(5, dtype=D)
    log_det = values[:2].log().sum() + 3 * noise.log()
    exact = -0.5 * len(y) * (5 * np.log(2 * np.pi) + float(log_det) + 5)
    assert result.elbo == pytest.approx(exact, abs=1e-6)
    assert float(result.params["sd"] ** 2) == pytest.approx(float(noise), rel=1e-5)
    assert torch.allclose(torch.linalg.eigvalsh(cov).flip(0)[:2], values[:2], rtol=1e-4)


def test_factor_analysis_has_no_slope_left(fit):
    generator = torch.Generator().manual_seed(6)
    loadings = torch.randn(2, 6, generator=generator, dtype=D)
    y = torch.randn(200, 2, generator=generator, dtype=D) @ loadings
    y = y + torch.linspace(0.4, 1.0, 6, dtype=D) * torch.randn(200, 6, generator=generator, dtype=D)

    def model(y):
        w = pyro.param("w", 0.1 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
        sd = pyro.param("sd", torch.ones(6), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ w, sd).to_event(1), obs=y)

    result = fit(model, {"y": y}, guide="auto")

    def log_likelihood(w, sd):
        cov = w.T @ w + torch.diag(sd**2)
        return torch.distributions.MultivariateNormal(torch.zeros(6, dtype=D), cov).log_prob(y).sum()

    point = (result.params["w"], result.params["sd"])
    assert result.elbo == pytest.approx(float(log_likelihood(*point)), abs=1e-7)
    for slope in torch.autograd.functional.jacobian(log_likelihood, point):
        assert slope.abs().max() < 0.05  # of 200 rows: 1e-4 standard errors


def test_item_responses_and_their_documented_gap(fit):
    """The variational answer is 0.39 nats below the maximum likelihood of -2466.653.

    The posterior of a student's ability given five answers is a little skewed, so a Gaussian factor
    leaves 0.0004 nats a student; the estimates themselves lose 0.013 nats of likelihood.
    """
    result = fit(zoo_em.item_responses, {"y": zoo_em.LSAT})
    assert result.elbo == pytest.approx(-2467.0449, abs=1e-3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(81)
    logits = result.params["slope"] * torch.tensor(nodes)[:, None, None] + result.params["level"]
    density = dist.Bernoulli(logits=logits).log_prob(zoo_em.LSAT).sum(-1)
    log_weights = torch.tensor(np.log(weights / np.sqrt(2 * np.pi))).unsqueeze(-1)
    exact = float((density + log_weights).logsumexp(0).sum())
    assert exact == pytest.approx(-2466.6667, abs=1e-3)
    assert result.elbo < exact < -2466.653


def e_steps_to(result, optimum, gap):
    """E-steps until the bound is within a gap of the optimum."""
    spent = 0
    for row in result.history:
        spent += row.evaluations if row.block == "profile" else row.block == "E"
        if optimum - row.after < gap:
            return spent
    return np.inf


def slow_em(fit, seed, **settings):
    data = zoo_em.slow_em_data(seed)
    result = fit(zoo_em.random_intercept, data, guide="auto", **settings)
    mu, between, within = zoo_em.best_balanced(data["y"])
    optimum = zoo_em.balanced_log_likelihood(mu, between.clamp(min=1e-9), within, data["y"])
    return e_steps_to(result, float(optimum), 1e-6), result


@pytest.mark.parametrize("seed", range(12))
def test_slow_em_takes_few_e_steps(fit, seed):
    steps, result = slow_em(fit, seed)
    assert steps <= 20
    assert result.converged


@pytest.mark.slow
def test_slow_em_takes_few_e_steps_over_200_seeds(fit):
    counts = np.array([slow_em(fit, seed)[0] for seed in range(200)])
    assert (counts <= 20).mean() >= 0.99, f"median {np.median(counts):.0f}, most {counts.max():.0f}"


def test_plain_alternation_is_slow_there(fit):
    """What the other schedules are for: the same fit by EM alone."""
    steps, _ = slow_em(fit, 0, schedule="alternate", max_iter=400)
    assert steps > 60
    extrapolated, _ = slow_em(fit, 0, schedule="accelerated", max_iter=400)
    assert extrapolated < steps


MODELS = {
    "mixture": (zoo_em.two_waits, lambda seed: {"y": zoo_em.WAITING[seed::3]}, None),
    "bayesian mixture": (zoo_em.two_waits_bayes, lambda seed: {"y": zoo_em.WAITING[seed % 3 :: 3]}, None),
    "random intercept": (zoo_em.random_intercept, zoo_em.slow_em_data, "auto"),
}


def falls(fit, name, seeds):
    """The largest fall of the bound in any step of any seed, and the number of steps."""
    model, data, guide = MODELS[name]
    worst, steps = 0.0, 0
    for seed in seeds:
        result = fit(model, data(seed), guide=guide, seed=seed)
        worst = min([worst, *(row.gain for row in result.history)])
        steps += len(result.history)
    return worst, steps


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_never_falls(fit, name):
    worst, steps = falls(fit, name, range(4))
    assert worst >= -1e-8
    assert steps > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_bound_never_falls_over_200_seeds(fit, name):
    worst, steps = falls(fit, name, range(200))
    assert worst >= -1e-8, f"in {steps} steps"


def crossed(row, column, y, mean=None):
    """Row and column effects, whose factors wait for each other in coordinate ascent."""
    between = pyro.sample("between", dist.Gamma(2.0, 2.0))
    within = pyro.sample("within", dist.Gamma(2.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0)) if mean is None else pyro.param("mu", torch.tensor(mean))
    with pyro.plate("rows", 20):
        a = pyro.sample("a", dist.Normal(0.0, between.rsqrt()))
    with pyro.plate("columns", 15):
        b = pyro.sample("b", dist.Normal(0.0, between.rsqrt()))
    with pyro.plate("cells", len(y)):
        pyro.sample("y", dist.Normal(mu + a[row] + b[column], within.rsqrt()), obs=y)


@pytest.mark.parametrize("mean", [None, 0.0], ids=["latents alone", "with a parameter"])
def test_coordinate_ascent_is_extrapolated(fit, mean):
    # With a parameter too the factors are what is slow: theta alone says nothing of where they go.
    generator = torch.Generator().manual_seed(0)
    row, column = torch.arange(20).repeat_interleave(15), torch.arange(15).repeat(20)
    a, b, noise = (torch.randn(n, generator=generator, dtype=D) for n in (20, 15, 300))
    data = {"row": row, "column": column, "y": 3 + a[row] + b[column] + 0.7 * noise, "mean": mean}
    plain = fit(crossed, data, guide="auto", schedule="alternate")
    quick = fit(crossed, data, guide="auto", schedule="accelerated")
    assert plain.n_iter > 100
    assert quick.n_iter < 40
    assert quick.elbo == pytest.approx(plain.elbo, abs=1e-6)
    assert sum(step.note == "extrapolated" for step in quick.history) > 3


def test_rounds_that_are_down_to_rounding_end(fit):
    # Less spread than a Poisson has: the sd goes to zero, where steps gain less than rounding loses.
    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, sd))
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    y = torch.tensor([4.0, 5.0, 3.0, 4.0] * 15, dtype=D)
    found = fit(model, {"y": y}, guide="auto", schedule="accelerated")
    assert found.status is vem.Status.stalled
    assert found.n_iter < 500
    best = float((y * y.mean().log() - y.mean() - torch.lgamma(y + 1)).sum())
    assert found.elbo == pytest.approx(best, abs=0.01)


def test_starts_leave_alone_a_parameter_that_enters_nothing(fit):
    def model(y):
        pyro.param("idle", torch.tensor(0.3))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    found = fit(model, {"y": Y8}, guide="auto", num_starts=3)
    assert found.converged
    assert float(found.params["idle"]) == pytest.approx(0.3, abs=1e-6)


def test_the_bound_at_the_edge_of_a_probability_is_that_of_its_logit(fit):
    @vem.vem_model(map_sites=("p",))
    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    found = fit(model, {"y": torch.ones(5, dtype=D)}, guide="auto", schedule="alternate", max_iter=3)
    assert found.history[-1].after == pytest.approx(found.elbo, abs=1e-10)


def test_a_branch_that_only_the_fit_meets_is_sampled(fit):
    # The table of y, whose coefficients move with a parameter, holds at the probes and not at the data.
    def model(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.softplus_positive)
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        w = pyro.sample("w", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.where(z > 45, 2 * z - 45, z), sd), obs=y)
            pyro.sample("x", dist.Normal(w, 1.0), obs=y - 90)

    y = 90 + torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=D)
    found = fit(model, {"y": y}, guide="auto")
    assert any("sampled from here on" in step.note for step in found.history)
    assert float(found.sample(500)["z"].mean()) == pytest.approx((float(y.mean()) + 45) / 2, abs=0.1)


@pytest.mark.parametrize("schedule", ["alternate", "accelerated", "profile", "joint"])
def test_every_schedule_ends_at_one_optimum(fit, schedule):
    result = fit(zoo_em.two_waits, WAITS, schedule=schedule)
    assert result.converged
    assert result.elbo == pytest.approx(-1034.00174983, abs=1e-6)


def test_profile_without_closed_forms(fit):
    """A Poisson mean with a log-normal rate: the E-step is Newton's, the schedule the same."""

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.LogNormal(mu, tau))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    data = {"y": torch.tensor([5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0])}
    plain, profiled = (fit(model, data, schedule=schedule) for schedule in ("joint", "profile"))
    assert profiled.elbo == pytest.approx(plain.elbo, abs=1e-7)
    assert any(row.block == "profile" for row in profiled.history)


def test_starts_report_how_far_they_agree(fit):
    result = fit(zoo_em.two_waits_bayes, WAITS, num_starts=4)
    assert len(result.starts) == 4
    assert result.elbo == max(start.elbo for start in result.starts)
    agreeing = [start for start in result.starts if result.elbo - start.elbo < 1e-6]
    assert len(agreeing) >= 3
    assert max(start.distance for start in agreeing) < 0.02  # labels may have changed places
    assert "within 0.1 nats" in repr(result)


def test_a_start_may_do_better(fit):
    """Three groups, started with two components in one of them."""
    y = torch.cat([torch.linspace(-0.5, 0.5, 30) + centre for centre in (-6.0, 0.0, 6.0)]).double()

    def model(y):
        mu = pyro.param("mu", torch.tensor([-6.1, -5.9, 3.0]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu[z], 0.5), obs=y)

    one, many = fit(model, {"y": y}), fit(model, {"y": y}, num_starts=10)
    assert many.elbo > one.elbo + 10
    assert many.params["mu"].sort().values.numpy() == pytest.approx([-6.0, 0.0, 6.0], abs=0.02)


def _first_values(found):
    """A callback that keeps the bound before the first step of each start."""

    def watch(step, params):
        if step.iteration == 1 and step.block == "E":
            found.append(step.before)

    return watch


def test_starts_of_conjugate_factors_differ(fit):
    """Without discrete sites there are no responsibilities to draw: the factors are."""

    def model(y):
        with pyro.plate("rows", 6, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("r", 6, dim=-2), pyro.plate("c", 4, dim=-1):
            pyro.sample("y", dist.Normal(a * b, 0.5), obs=y)

    found = []
    y = torch.outer(torch.linspace(-1.0, 2.0, 6), torch.tensor([1.0, -1.0, 2.0, 0.5]))
    result = fit(model, {"y": y}, guide="auto", num_starts=3, callbacks=[_first_values(found)])
    assert result.setup.lifted is not None
    assert len(result.starts) == len(set(found)) == 3


@pytest.mark.parametrize("kind", ["values", "an earlier fit", "a strategy", "a strategy of the guide"])
def test_starts_differ_where_some_values_are_given(fit, kind):
    """Two modes, of which the second start finds the one that the given value does not lead to."""

    def model(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(1.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z.abs(), sd), obs=y)

    y, found = torch.tensor([3.0, 3.2, 2.8, 3.1]), []
    given = {
        "values": lambda: {"init": {"sd": torch.tensor(2.0)}},
        "an earlier fit": lambda: {"init": fit(model, {"y": y}, init={"z": 3.0})},
        "a strategy": lambda: {"init": init_to_mean},
        "a strategy of the guide": lambda: {"guide": vem.MeanFieldNormal(model, init=init_to_mean)},
    }[kind]()
    result = fit(model, {"y": y}, num_starts=6, callbacks=[_first_values(found)], **given)
    assert len(set(found)) == 6
    bounds = [start.elbo for start in result.starts]
    assert max(bounds) - min(bounds) > 0.1  # the prior likes one mode more than the other
    assert result.elbo == max(bounds)


def test_a_start_without_a_bound_is_drawn_again():
    calls, closed = [], []

    def begun(start):
        calls.append(start)
        if len(calls) < 3:
            raise vem.ModelError("its log density is infinite")
        elbo = -1e200 if len(calls) == 3 else -10.0
        return SimpleNamespace(state=SimpleNamespace(elbo=elbo), close=lambda: closed.append(elbo))

    assert drawn_again(begun, 2).state.elbo == -10.0
    assert calls == [2, 2, 2, 2]
    assert closed == [-1e200]


def test_a_start_that_never_has_a_bound_is_left_out():
    def begun(start):
        raise vem.ModelError(f"start {start}: its log density is infinite")

    with pytest.warns(UserWarning, match="start 3 is left out: .* its log density is infinite"):
        assert drawn_again(begun, 3) is None


TOGETHER = {
    "mixture": (zoo_em.two_waits, WAITS, {"schedule": "accelerated"}),
    "bayesian mixture": (zoo_em.two_waits_bayes, WAITS, {}),
    "plain rounds": (zoo_em.two_waits, WAITS, {"schedule": "alternate", "tol": 1e-9}),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_starts_at_once_end_where_each_alone_does(fit, monkeypatch, case):
    model, data, options = TOGETHER[case]
    at_once = fit(model, data, num_starts=5, **options)
    assert any("rounds of 5 starts at once" in row.note for row in at_once.history)
    monkeypatch.setattr("pyro_vem.fit.together.can_go_together", lambda *_: False)
    alone = fit(model, data, num_starts=5, **options)
    assert not any("at once" in row.note for row in alone.history)
    assert at_once.status is alone.status is vem.Status.converged
    assert at_once.elbo == pytest.approx(alone.elbo, abs=1e-6)
    assert [s.elbo for s in at_once.starts] == pytest.approx([s.elbo for s in alone.starts], abs=1e-4)
    rises = [row.after - row.before for row in at_once.history]
    assert min(rises) > -1e-8


def test_starts_at_once_leave_saddles_as_alone(fit):
    """Five groups, all components in one place at first, where plain rounds would creep."""
    generator = torch.Generator().manual_seed(8)
    centres = 12 * torch.rand(5, generator=generator, dtype=D)
    y = (centres + 0.4 * torch.randn(30, 5, generator=generator, dtype=D)).reshape(-1)

    def model(y):
        mu, sd = pyro.param("mu", torch.full((5,), 5.0)), pyro.param("sd", torch.tensor(3.0), POSITIVE)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(5)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu[z], sd), obs=y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vem.fit.together.can_go_together", lambda *_: False)
        alone = fit(model, {"y": y}, num_starts=4)
    assert fit(model, {"y": y}, num_starts=4).elbo >= alone.elbo - 1e-6


def test_probabilities_at_their_edge_have_not_run_away(fit):
    """An item that no one of a class solves: the bound has its maximum there."""
    y = torch.cat([torch.tensor([[1.0, 1, 0, 0]] * 20), torch.tensor([[0.0, 0, 1, 1]] * 20)]).double()

    def model(y):
        p = pyro.param("p", torch.tensor([[0.6, 0.6, 0.4, 0.4], [0.4, 0.4, 0.6, 0.5]]), INTERVAL)
        with pyro.plate("rows", len(y), dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            with pyro.plate("items", 4, dim=-1):
                pyro.sample("y", dist.Bernoulli(p[z, torch.arange(4)]), obs=y)

    for schedule in ("auto", "accelerated", "alternate"):
        result = fit(model, {"y": y}, schedule=schedule, num_starts=3)
        assert result.status is vem.Status.converged
        assert result.elbo == pytest.approx(40 * np.log(0.5), abs=1e-5)


def test_starts_of_a_model_of_parameters_only_differ(fit):
    """A Cauchy location has two modes here, of which the nearer one to zero is the lower."""
    y = torch.tensor([0.0, 0.1, 9.0, 9.1, 8.9], dtype=D)

    def model(y):
        loc = pyro.param("loc", torch.tensor(4.4))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Cauchy(loc, 0.5), obs=y)

    one, many = fit(model, {"y": y}), fit(model, {"y": y}, num_starts=8)
    ends = sorted(start.elbo for start in many.starts)
    assert ends[-1] > ends[0] + 1
    assert float(many.params["loc"]) == pytest.approx(9.0, abs=0.1)
    assert many.starts[0].elbo == one.elbo


@pytest.mark.slow
def test_starts_that_need_more_than_closed_forms_go_one_by_one(fit):
    settings = [{"schedule": "profile"}, {"m_step": "newton"}, {"e_step": "lbfgs"}]
    cases = [(zoo_em.two_waits, WAITS, options) for options in settings]
    cases += [(zoo_em.chain, {"y": switching()}, {})]
    for model, data, options in cases:
        result = fit(model, data, num_starts=2, **options)
        assert not any("at once" in row.note for row in result.history)
        assert len(result.starts) == 2


@pytest.mark.parametrize("where", ["in a round", "in a callback"])
def test_starts_at_once_may_be_interrupted(fit, monkeypatch, where):
    rounds, through = [], Together._round

    def stop_in_round(self, is_moving, iteration):
        rounds.append(iteration)
        if where == "in a round" and iteration == 4:
            raise KeyboardInterrupt
        through(self, is_moving, iteration)

    def stop_in_callback(step, params):
        if where == "in a callback" and "at once" in step.note:
            raise KeyboardInterrupt

    monkeypatch.setattr(Together, "_round", stop_in_round)
    result = fit(zoo_em.two_waits_bayes, WAITS, num_starts=3, callbacks=[stop_in_callback])
    assert result.status is vem.Status.interrupted
    assert [start.status for start in result.starts] == [vem.Status.interrupted] * 3
    assert result.elbo == max(start.elbo for start in result.starts) > result.history[0].before
    assert rounds == list(range(1, len(rounds) + 1))
    assert (len(rounds) == 4) == (where == "in a round")


def far_groups():
    """Groups whose means are far apart: EM is fast there, and hardly adds to the noise of draws."""
    noise = torch.randn(72, generator=torch.Generator().manual_seed(0), dtype=D)
    group = torch.arange(60) % 12
    return {"group": group, "y": 2 + 1.2 * noise[60:][group] + 0.7 * noise[:60]}


def test_the_caller_may_give_an_m_step(fit):
    """The sd of a random effect from draws: the root of the mean square."""

    def between(latents, params):
        return (latents["theta"] - params["mu"]).square().mean().sqrt()

    settings = {"guide": "auto", "max_iter": 200}
    result = fit(zoo_em.random_intercept, far_groups(), m_step={"between": between}, **settings)
    exact = fit(zoo_em.random_intercept, far_groups(), **settings)
    assert result.converged
    # Of 512 draws of 12 groups the standard error is 0.5 %, of which the rounds make 0.6 %; three of them.
    assert float(result.params["between"]) == pytest.approx(float(exact.params["between"]), rel=0.018)
    assert result.elbo == pytest.approx(exact.elbo, abs=12 * 0.018**2)


def test_an_m_step_that_lowers_the_bound_is_rolled_back(fit):
    def wrong(latents, params):
        return torch.tensor(100.0)

    data = zoo_em.slow_em_data(1)
    result = fit(zoo_em.random_intercept, data, guide="auto", max_iter=30, m_step={"between": wrong})
    notes = [row.note for row in result.history]
    assert any("m_step['between'] rolled back" in note for note in notes)
    assert min(row.gain for row in result.history) >= -1e-8
    with pytest.raises(vem.ModelError, match="unknown name 'nothing'"):
        fit(zoo_em.random_intercept, data, guide="auto", m_step={"nothing": wrong})
    with pytest.raises(vem.ModelError, match="return a finite value of shape"):
        fit(zoo_em.random_intercept, data, guide="auto", m_step={"mu": lambda *_: torch.zeros(3)})


@pytest.mark.parametrize("guide", ["auto", None])
@pytest.mark.parametrize("hooked", [("t",), ("t", "mu")])
def test_nothing_else_moves_what_a_function_gives(fit, guide, hooked):
    group, y = far_groups().values()

    def model(y):
        mu = pyro.param("mu", torch.tensor(3.0))
        t = pyro.param("t", torch.tensor(5.0), constraint=constraints.positive)
        with pyro.plate("groups", 12):
            b = pyro.sample("b", dist.Normal(mu, t))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(b[group], 0.7), obs=y)

    values = {"t": torch.tensor(2.0, dtype=D), "mu": torch.tensor(2.1, dtype=D)}
    hooks = {name: lambda *_, name=name: values[name] for name in hooked}
    result = fit(model, {"y": y}, guide=guide, m_step=hooks)
    assert result.converged
    assert all(float(result.params[name]) == pytest.approx(float(values[name])) for name in hooked)
    held = vem.vem_model(lambda y: model(y), fixed=hooked)
    there = fit(held, {"y": y}, guide="auto", init={name: values[name] for name in hooked})
    assert result.elbo == pytest.approx(there.elbo, abs=1e-6)


@pytest.mark.parametrize("schedule", ["auto", "accelerated", "alternate"])
def test_no_extrapolation_moves_what_a_function_gives(fit, schedule):
    """The function keeps mu on quarters."""
    seen = []

    def rounded(latents, params):
        seen.append(float(params["mu"]))
        return (latents["b"].mean() * 4).round() / 4

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        t, s = (pyro.param(name, torch.tensor(2.0), constraint=constraints.positive) for name in "ts")
        with pyro.plate("rows", len(y)):
            b = pyro.sample("b", dist.Normal(mu, t))
            pyro.sample("y", dist.Normal(b, s), obs=y)

    y = 3.33 + 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=D)
    result = fit(model, {"y": y}, guide="auto", m_step={"mu": rounded}, schedule=schedule, max_iter=60)
    assert all(value * 4 % 1 == 0 for value in seen)
    assert float(result.params["mu"]) == 3.25


def test_every_round_calls_the_functions_of_an_m_step(fit):
    """Joint and profile steps would move the parameter without them."""
    seen = []

    def between(latents, params):
        seen.append(1)
        return (latents["theta"] - params["mu"]).square().mean().sqrt()

    data = zoo_em.slow_em_data(1)
    result = fit(zoo_em.random_intercept, data, guide="auto", max_iter=12, m_step={"between": between})
    assert len(seen) >= result.n_iter
    assert not any(row.block == "profile" for row in result.history)
    for schedule in ("joint", "profile"):
        with pytest.raises(ValueError, match=f"schedule='{schedule}': no M-step would call"):
            fit(zoo_em.random_intercept, data, schedule=schedule, m_step={"between": between})


def test_profile_steps_that_find_nothing_are_a_stall(fit):
    """The bound has its maximum where `top` ends the support: no gradient vanishes there."""

    def model(y, u):
        top = pyro.param("top", torch.tensor(3.0), constraint=constraints.positive)
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("u", dist.Uniform(0.0, top), obs=u)

    data = {"y": torch.linspace(-1.0, 3.0, 8), "u": torch.linspace(0.1, 2.0, 8)}
    result = fit(model, data, schedule="profile", max_iter=200)
    assert result.status is vem.Status.stalled
    assert float(result.params["top"]) == pytest.approx(2.0, abs=1e-3)


def test_what_is_fixed_stays(fit):
    model = vem.vem_model(lambda y: zoo_em.two_waits(y), fixed=["sd"])  # roles stay with the function
    result = fit(model, WAITS)
    assert result.params["sd"].numpy() == pytest.approx([5.0, 5.0], rel=1e-6)  # a float32 parameter
    assert result.converged


def test_draws_and_predictions_of_a_mixture(fit):
    result = fit(zoo_em.two_waits_bayes, WAITS)
    drawn = result.sample(50)
    assert set(drawn) == {"weights", "mu", "tau"}
    made = result.predict(num_draws=400)
    assert made["y"].shape == (400, 272)
    assert made["z"].shape == (400, 272)
    assert float(made["y"].mean()) == pytest.approx(float(zoo_em.WAITING.mean()), abs=1.0)
    pointwise = result.log_likelihood(num_draws=20)["y"]
    assert pointwise.shape == (20, 272)
    again = result.log_likelihood(WAITS, num_draws=20)["y"]
    assert torch.allclose(pointwise, again)
    with pytest.raises(vem.ModelError, match="MeanFieldNormal"):
        result.covariance()


def test_bounds_and_evidence_of_a_mixture_are_in_order(fit):
    """Factors of z and the rest <= the rest alone, z summed out <= log evidence, from either guide."""
    start = {"mu": torch.tensor([55.0, 80.0])}
    factorised = fit(zoo_em.two_waits_bayes, WAITS, init=start)
    gaussian = fit(
        zoo_em.two_waits_bayes, WAITS, init=start, guide=vem.MeanFieldNormal(zoo_em.two_waits_bayes)
    )
    assert gaussian.plan["z"].proof == "summed out in the model"
    evidence = [pools(result)[0].log_evidence for result in (factorised, gaussian)]
    assert evidence[0] == pytest.approx(evidence[1], abs=0.1)
    assert factorised.elbo < gaussian.elbo < evidence[1]
    assert gaussian.diagnose().khat < 0.7
    assert any("MeanFieldNormal" in action for action in factorised.diagnose().actions)


def test_a_mixture_can_be_saved(fit, tmp_path):
    result = fit(zoo_em.two_waits_bayes, WAITS)
    result.save(tmp_path / "fit")
    again = vem.VEMResult.load(tmp_path / "fit", zoo_em.two_waits_bayes, WAITS)
    assert again.elbo == result.elbo
    assert torch.equal(again.sample(3)["mu"], result.sample(3)["mu"])


def test_starts_are_saved(fit, tmp_path):
    result = fit(zoo_em.two_waits, WAITS, num_starts=2)
    result.save(tmp_path / "fit")
    assert vem.VEMResult.load(tmp_path / "fit", zoo_em.two_waits).starts == result.starts


PARALLEL = {"infer": {"enumerate": "parallel"}}


def test_masked_rows_of_a_mixture_count_nothing(fit):
    """A masked row's sum over components is one, not their number."""
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0]).bool()

    def model(y):
        w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 5.0]))
        with pyro.plate("rows", 8), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Categorical(w), **PARALLEL)
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    result = fit(model, {"y": Y8})
    p = result.params
    rows = (p["w"].log() + dist.Normal(p["mu"], torch.ones(2)).log_prob(Y8.unsqueeze(-1))).logsumexp(-1)
    assert result.elbo == pytest.approx(float(rows[mask].sum()), abs=1e-8)


def test_rows_of_two_discrete_sites_stay_apart(fit):
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 8):
            a = pyro.sample("a", dist.Categorical(torch.ones(2)), **PARALLEL)
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.6, 0.4])), **PARALLEL)
            pyro.sample("y", dist.Normal(m + 4.0 * a + 0.5 * b, 1.0), obs=y)

    result = fit(model, {"y": Y8})
    rows = result.log_likelihood(num_draws=3)["y"]
    assert rows.shape == (3, 8)
    m = result.sample(3)["m"].reshape(3, 1, 1, 1)
    means = m + 4.0 * torch.arange(2).reshape(2, 1) + 0.5 * torch.arange(2)
    weights = torch.tensor([0.5], dtype=D).log() + torch.tensor([0.6, 0.4], dtype=D).log()
    exact = (weights + dist.Normal(means, 1.0).log_prob(Y8.reshape(8, 1, 1))).logsumexp((-2, -1))
    assert torch.allclose(rows, exact)
    shapes = {name: value.shape for name, value in result.responsibilities().items()}
    assert shapes == {"a": (8, 2), "b": (8, 2)}


@pytest.mark.parametrize("schedule", ["auto", "alternate"])
def test_an_element_without_data_holds_no_other_back(fit, schedule):
    group, items = torch.arange(60) % 5, torch.arange(60) % 4
    noise = torch.randn(65, generator=torch.Generator().manual_seed(0), dtype=D)
    y = noise[:60] + torch.tensor([0.0, 3.0])[items % 2] + noise[60:][group]

    def model(y, levels):
        m = pyro.param("m", torch.zeros(levels))
        sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("groups", 5):
            a = pyro.sample("a", dist.Normal(0.0, sd[0]))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(m[items % 2] + a[group], sd[1]), obs=y)

    two, three = (
        fit(model, {"y": y, "levels": n}, guide="auto", schedule=schedule, max_iter=300) for n in (2, 3)
    )
    assert two.converged
    assert three.converged
    assert three.elbo == pytest.approx(two.elbo, abs=1e-7)
    assert torch.allclose(three.params["m"][:2], two.params["m"], atol=1e-4)
    assert float(three.params["m"][2]) == 0.0


def test_what_callbacks_write_into_is_their_own(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor(2.0))
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def write(_, params):
        params["mu"].zero_()

    def hook(_, params):
        return params["mu"].zero_() + 1.0

    alone = fit(model, {"y": Y8})
    assert fit(model, {"y": Y8}, callbacks=[write]).elbo == alone.elbo
    hooked = fit(model, {"y": Y8}, m_step={"mu": hook}, max_iter=3)
    assert float(hooked.params["mu"]) in (1.0, 2.0)


def test_equal_components_are_left_behind(fit):
    def model(y):
        w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
        mu, sd = pyro.param("mu", torch.zeros(2)), pyro.param("sd", torch.tensor(1.0), constraints.positive)
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Categorical(w), **PARALLEL)
            pyro.sample("y", dist.Normal(mu[z], sd), obs=y)

    result = fit(model, {"y": Y8})
    assert result.elbo == pytest.approx(-11.366978, abs=1e-5)  # -19.57 at the saddle
    assert "equal components are a saddle: started from random ones" in result.plan.notes


def test_a_discrete_site_outside_plates_and_one_with_one_value(fit):
    def outside(y):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), **PARALLEL)
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    assert fit(outside, {"y": Y8}).responsibilities()["z"].shape == (2,)

    def single(y):
        mu = pyro.param("mu", torch.zeros(1))
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Categorical(torch.ones(1)), **PARALLEL)
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    result = fit(single, {"y": Y8})
    assert torch.equal(result.responsibilities()["z"], torch.ones(8, 1, dtype=D))
    assert result.log_likelihood(num_draws=2)["y"].shape == (2, 8)


def test_a_latent_under_a_discrete_site(fit):
    """u ~ N(3 z, 1), y ~ N(u, 1): factors of z and u cannot reach the evidence, and stay below it."""

    def model(y):
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Bernoulli(0.5), **PARALLEL)
            u = pyro.sample("u", dist.Normal(3.0 * z, 1.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    result = fit(model, {"y": Y8})
    wide = dist.Normal(torch.tensor([0.0, 3.0], dtype=D), 2**0.5)
    evidence = float((wide.log_prob(Y8.unsqueeze(-1)).logsumexp(-1) - np.log(2)).sum())
    assert evidence - 5 < result.elbo < evidence
    assert result.sample(2)["u"].shape == (2, 8)


def test_a_component_that_collapses_has_run_away(fit):
    """One point alone in a component: the likelihood grows without bound as its sd vanishes."""

    def model(y):
        mu = pyro.param("mu", torch.tensor([0.0, 5.0]))
        sd = pyro.param("sd", torch.tensor([1.0, 0.05]), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), **PARALLEL)
            pyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)

    y = torch.cat([torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0])])
    with pytest.warns(UserWarning, match="'sd' has run away"):
        assert fit(model, {"y": y}).status is vem.Status.diverged


def collapsing(y):
    """Two components, each with its own sd; some starts end with one point alone in one of them."""
    mu = pyro.param("mu", torch.tensor([-0.5, 0.5]))
    sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
    w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w), **PARALLEL)
        pyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)


def test_a_start_that_runs_away_is_not_the_best(fit):
    """Its bound is the highest of all, since it has no end."""
    with pytest.warns(UserWarning, match="'sd' has run away") as caught:
        result = vem.fit_vem(collapsing, {"y": torch.arange(4.0)}, num_starts=6)
    assert {w.filename for w in caught} == {__file__}  # the user's own line
    assert result.status is vem.Status.converged
    ended = [start.status for start in result.starts]
    assert vem.Status.diverged in ended
    diverged = max(start.elbo for start in result.starts if start.status is vem.Status.diverged)
    assert diverged > result.elbo == max(s.elbo for s in result.starts if s.status is vem.Status.converged)


def test_a_state_that_is_never_left_is_no_runaway(fit):
    """The probability of a move that no row makes goes to zero, below what torch tells from it."""
    result = fit(zoo_em.chain, {"y": Y8})
    assert result.status is vem.Status.converged
    assert float(result.params["moves"].min()) < 1e-9
    log_likelihood, _ = forward_backward(*(result.params[n] for n in ("start", "moves", "mu", "sd")), Y8)
    assert result.elbo == pytest.approx(log_likelihood, abs=1e-9)


def test_an_observation_mask_under_a_discrete_site_names_the_remedy(fit):
    def model(y, mask):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), **PARALLEL)
            pyro.sample("y", dist.Normal(torch.tensor([0.0, 5.0])[z], 1.0), obs=y, obs_mask=mask)

    data = {"y": Y8, "mask": torch.arange(8) > 2}
    with pytest.raises(vem.UnsupportedModelError, match=r"use pyro\.poutine\.mask"):
        fit(model, data, guide=vem.MeanFieldConjugate(model))
    result = fit(model, data)  # what is not observed is a latent: of two modes
    assert "use pyro.poutine.mask" in str(result.plan)
    seen = dist.Normal(torch.tensor([0.0, 5.0]), 1.0).log_prob(Y8[3:].unsqueeze(-1)).logsumexp(-1) - math.log(
        2
    )
    assert float(seen.sum()) - 3 * math.log(2) < result.elbo < float(seen.sum())
    assert result.diagnose().verdict is vem.Verdict.UNRELIABLE
