"""Closed forms found by probing values: families, indices, what is accepted, what is refused and why."""

import math
import resource

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo_em
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.bound.lifted import families
from pyro_vem.bound.lifted.index import coded_index, simplex_index

D = torch.float64
FACTORS = {
    "Normal": (families.NORMAL, {"loc": [0.3, -1.0], "scale": [0.5, 2.0]}, dist.Normal),
    "Gamma": (families.GAMMA, {"concentration": [0.7, 3.0], "rate": [2.0, 0.5]}, dist.Gamma),
    "InverseGamma": (
        families.INVERSE_GAMMA, {"concentration": [2.5, 3.0], "rate": [2.0, 0.5]}, dist.InverseGamma
    ),
    "Beta": (families.BETA, {"concentration1": [0.7, 3.0], "concentration0": [2.0, 0.5]}, dist.Beta),
    "Dirichlet": (families.dirichlet(3), {"concentration": [[0.7, 3.0, 1.0]]}, dist.Dirichlet),
}  # fmt: skip


def tensors(values):
    return {name: torch.tensor(value, dtype=D, requires_grad=True) for name, value in values.items()}


@pytest.mark.parametrize("name", FACTORS)
def test_expected_statistics_and_entropy(name):
    family, values, distribution = FACTORS[name]
    q = tensors(values)
    fn = distribution(**q)
    draws = fn.sample((400_000,)).reshape(400_000, -1, 1)
    columns = [family.statistics(draws[:, i]) for i in range(draws.shape[1])]
    expected = family.expected(q)
    for i, column in enumerate(columns):
        se = column.std(1) / column.shape[1] ** 0.5
        assert bool(((column.mean(1) - expected[:, i]).abs() < 5 * se).all())
    log_q = fn.log_prob(fn.sample((400_000,)))
    se = log_q.std(0) / 400_000**0.5
    assert bool(((family.entropy(q) + log_q.mean(0)).abs() < 5 * se).all())


@pytest.mark.parametrize("name", FACTORS)
def test_an_update_is_where_the_bound_has_no_slope(name):
    """d/dq of eta . E t + entropy vanishes at the updated factor."""
    family, values, _ = FACTORS[name]
    now = {key: value.detach() for key, value in tensors(values).items()}
    eta = torch.stack([torch.full_like(family.expected(now)[0], x) for x in (-0.4, -1.3)[: family.num]])
    if name in ("Gamma", "Beta", "Dirichlet"):
        eta[0] = 2.5
    if name == "InverseGamma":
        eta[0] = -3.5
    q = {key: value.detach().requires_grad_() for key, value in family.updated(eta, now).items()}
    bound = (eta * family.expected(q)).sum() + family.entropy(q).sum()
    for gradient in torch.autograd.grad(bound, list(q.values())):
        assert gradient.abs().max() < 1e-10


def test_a_block_is_the_precision_and_the_slope():
    block = families.block_normal(3)
    precision = torch.tensor([[2.0, 0.3, -0.2], [0.3, 1.0, 0.1], [-0.2, 0.1, 3.0]], dtype=D)
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    rows, columns = torch.triu_indices(3, 3)
    weight = torch.where(rows == columns, -0.5, -1.0) * precision[rows, columns]
    q = block.updated(torch.cat([slope, weight]).unsqueeze(-1), {})
    tril = q["scale_tril"][0]
    assert torch.allclose(tril @ tril.T, torch.linalg.inv(precision), atol=1e-12)
    assert torch.allclose(tril, tril.tril())
    assert torch.allclose(q["loc"][0], torch.linalg.solve(precision, slope))
    assert torch.allclose(block.best(torch.cat([slope, weight]).unsqueeze(-1))[0], q["loc"][0])


def test_newton_with_an_exponential_climbs_to_the_optimum():
    eta = torch.tensor([[3.0, 0.5], [-0.5, -2.0], [-1.0, -0.2]], dtype=D)
    q = {"loc": torch.tensor([4.0, -3.0], dtype=D), "scale": torch.tensor([0.1, 2.0], dtype=D)}
    for _ in range(30):
        q = families.NORMAL_EXP.updated(eta, q)
    q = {name: value.requires_grad_() for name, value in q.items()}
    bound = (eta * families.NORMAL_EXP.expected(q)).sum() + families.NORMAL_EXP.entropy(q).sum()
    for gradient in torch.autograd.grad(bound, list(q.values())):
        assert gradient.abs().max() < 1e-9


PARAMETERS = {
    "sd": (families.SD, [-3.0, -2.0]),
    "rate": (families.GAMMA, [3.0, -2.0]),
    "scale": (families.INVERSE_GAMMA, [-3.0, -2.0]),
    "square": (families.SQUARE, [3.0, -2.0]),
    "real": (families.NORMAL, [1.0, -2.0]),
    "probability": (families.BETA, [1.0, 2.0]),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_best_value_has_no_slope(name):
    family, natural = PARAMETERS[name]
    eta = torch.tensor(natural, dtype=D).unsqueeze(-1)
    u = family.best(eta).requires_grad_()
    (slope,) = torch.autograd.grad((eta * family.statistics(u.unsqueeze(-1))).sum(), u)
    assert slope.abs() < 1e-12


def test_codes_spell_the_element():
    gather = torch.tensor([4, 0, 2, 2, 1, 3, 4])
    levels = torch.tensor([[0.3], [-1.1], [1.7], [0.9]], dtype=D)

    def run(u, only=None):
        by_python = torch.tensor([float(u[3]) ** 2], dtype=D)  # no derivative goes through float()
        return {"gather": u[gather].cos(), "float": by_python, "sum": u.cumsum(0), "none": torch.ones(2)}

    index = coded_index(run, torch.arange(5).unsqueeze(-1), levels, 0)
    assert torch.equal(index.where["gather"], gather)
    assert index.where["float"].tolist() == [3]
    assert index.several == {"sum"}
    assert "none" not in index.where


def test_components_of_simplexes_are_told_apart():
    rows, words = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 0])

    def run(u):
        p = u.reshape(2, 2)
        return {"log": 3.0 * p[rows, words].log() + 1, "root": p[rows, words].sqrt()}

    index = simplex_index(run, 2, 2, 0)
    assert index.where["log"].tolist() == [1, 2, 3, 0]
    assert index.several == {"root"}


Y = torch.tensor([2.5, 0.7, 3.1, -0.4, 1.9, 2.2], dtype=D)


def test_normal_gamma_is_the_fixed_point_of_cavi(fit):
    result = fit(zoo_em.normal_gamma, {"y": Y}, guide="auto")
    mean, a, b = 0.0, 2.0 + len(Y) / 2, 1.0
    for _ in range(200):
        precision = 1 / 100 + len(Y) * a / b
        mean = (1.0 / 100 + a / b * float(Y.sum())) / precision
        b = 3.0 + 0.5 * float((Y - mean).square().sum() + len(Y) / precision)
    phi = result.guide_params
    assert float(phi["guide.loc.mu"]) == pytest.approx(mean, rel=1e-10)
    assert float(phi["guide.scale.mu"]) == pytest.approx(precision**-0.5, rel=1e-10)
    assert float(phi["guide.concentration.tau"]) == pytest.approx(a, rel=1e-10)
    assert float(phi["guide.rate.tau"]) == pytest.approx(b, rel=1e-10)
    assert isinstance(result.setup.guide, vem.MeanFieldConjugate)
    assert result.elbo_se == 0
    assert result.plan["y"].proof == "affine in the statistics of mu (Normal), tau (Gamma)"


def _beta_binomial():
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor([1.0, 0, 1, 1, 1, 0], dtype=D))


def _gamma_poisson():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([3.0, 0.0, 5.0], dtype=D))


def _exponential():
    rate = pyro.sample("rate", dist.Exponential(1.5))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Exponential(rate), obs=torch.tensor([3.0, 0.2, 0.5], dtype=D))


def _inverse_gamma():
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(0.0, variance.sqrt()), obs=Y)


def _dirichlet():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 1, 2, 2, 2]))


def _multinomial():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])))
    pyro.sample("y", dist.Multinomial(5, p), obs=torch.tensor([1.0, 1.0, 3.0]))


DESIGN = torch.tensor([[1.0, 0.2], [1.0, -1.0], [1.0, 2.0], [1.0, 0.5], [1.0, 1.5], [1.0, -0.3]], dtype=D)


def _regression():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(DESIGN @ beta, 0.7), obs=Y)


PRIOR = torch.tensor([[1.5, 0.4], [0.4, 0.8]], dtype=D)


def _regression_mvn():
    beta = pyro.sample("beta", dist.MultivariateNormal(torch.ones(2), PRIOR))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(DESIGN @ beta, 0.7), obs=Y)


def _log_beta(a):
    return float(torch.lgamma(a).sum() - torch.lgamma(a.sum()))


def _gamma_evidence(a, b, n, total, constant=0.0):
    return a * math.log(b) - math.lgamma(a) + math.lgamma(a + n) - (a + n) * math.log(b + total) + constant


def _normal_evidence(mean, prior):
    cov = DESIGN @ prior @ DESIGN.T + 0.49 * torch.eye(len(Y), dtype=D)
    return float(torch.distributions.MultivariateNormal(DESIGN @ mean, cov).log_prob(Y))


COUNTS = torch.tensor([1.0, 1.0, 3.0], dtype=D)
ALPHA = torch.tensor([0.5, 1.0, 2.0], dtype=D)
EXACT = {
    _beta_binomial: _log_beta(torch.tensor([6.0, 5.0], dtype=D))
    - _log_beta(torch.tensor([2.0, 3.0], dtype=D)),
    _gamma_poisson: 2 * math.log(1.5)
    - math.lgamma(2)
    + math.lgamma(10)
    - 10 * math.log(4.5)
    - math.lgamma(4)
    - math.lgamma(6),
    _exponential: _gamma_evidence(1.0, 1.5, 3, 3.7),
    _inverse_gamma: 3 * math.log(2)
    - math.lgamma(3)
    + math.lgamma(6)
    - 6 * math.log(2 + float(Y.square().sum()) / 2)
    - 3 * math.log(2 * math.pi),
    _dirichlet: _log_beta(ALPHA + COUNTS) - _log_beta(ALPHA),
    _multinomial: _log_beta(ALPHA + COUNTS)
    - _log_beta(ALPHA)
    + math.lgamma(6)
    - float(torch.lgamma(COUNTS + 1).sum()),
    _regression: _normal_evidence(torch.zeros(2, dtype=D), 4 * torch.eye(2, dtype=D)),
    _regression_mvn: _normal_evidence(torch.ones(2, dtype=D), PRIOR),
}


@pytest.mark.parametrize("model", EXACT)
def test_conjugate_models_have_their_evidence(fit, model):
    result = fit(model, guide="auto")
    assert result.converged
    assert result.elbo == pytest.approx(EXACT[model], abs=1e-8)
    assert abs(result.history[0].before - EXACT[model]) > 0.01  # not so at the start
    assert {row.method for row in result.plan.rows} == {"closed form"}


REFUSED = {}


def refused(reason):
    def add(model):
        REFUSED[model] = reason
        return model

    return add


@refused("not affine in the statistics of")
def _student():
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.StudentT(4.0, mu, tau.rsqrt()), obs=Y)


@refused("depends on several elements")
def _logistic():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Bernoulli(logits=DESIGN @ beta), obs=(Y > 1).double())


@refused("depends on tau: no conjugate family for HalfCauchy")
def _half_cauchy():
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(mu, tau), obs=Y)


@pytest.mark.parametrize("model", REFUSED)
def test_what_has_no_closed_form_is_refused_with_the_reason(fit, model):
    result = fit(model, guide=vem.MeanFieldConjugate(model))
    assert result.plan["y"].method == "draws"
    assert REFUSED[model] in result.plan["y"].proof
    automatic = fit(model, guide="auto")
    assert isinstance(automatic.setup.guide, vem.MeanFieldNormal)
    assert any("not conjugate" in note for note in automatic.plan.notes)


def test_the_other_sites_keep_their_closed_forms(fit):
    """A logistic likelihood with a latent prior precision: tau is closed, beta is not."""

    def model(y):
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), tau.rsqrt()).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=DESIGN @ beta), obs=y)

    result = fit(model, {"y": (Y > 1).double()}, guide=vem.MeanFieldConjugate(model))
    assert result.converged
    assert result.plan["beta"].method == "closed form"
    assert result.plan["y"].method == "draws"
    phi = result.guide_params
    second = phi["guide.loc.beta"].square() + phi["guide.scale.beta"].square()
    assert float(phi["guide.concentration.tau"]) == pytest.approx(3.0, rel=1e-6)
    assert float(phi["guide.rate.tau"]) == pytest.approx(2.0 + 0.5 * float(second.sum()), rel=1e-4)


def test_a_kink_where_no_probe_went_is_seen_at_the_fitted_factor(fit):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu.clamp(max=5.0), 0.3), obs=y)

    result = fit(model, {"y": torch.full((40,), 8.0)}, guide="auto", max_iter=5)
    assert "draws of the fitted guide" in "\n".join([str(result.plan), *(r.note for r in result.history)])


def test_parameters_without_statistics_move_the_coefficients(fit):
    """A softplus of a parameter scales a latent: its coefficients are functions of the parameter."""

    def model(y):
        raw = pyro.param("raw", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.nn.functional.softplus(raw) * z, 1.0), obs=y)

    y = 3 * torch.randn(400, dtype=D)
    result = fit(model, {"y": y}, guide="auto")
    scale = torch.nn.functional.softplus(result.params["raw"])
    assert float(scale**2 + 1) == pytest.approx(float(y.square().mean()), rel=1e-5)
    assert "coefficients move with parameters" in result.plan["y"].proof


def test_topics_never_allocate_topics_times_words_times_vocabulary(fit):
    """4 topics, 20,000 words of 20,000: 12.8 GB in one tensor, 3.2 GB without the topics."""
    rng = np.random.default_rng(0)
    words = 20_000
    data = {
        "document": torch.tensor(np.sort(rng.integers(0, 50, words))),
        "word": torch.tensor(rng.integers(0, 20_000, words)),
        "count": torch.tensor(rng.integers(1, 4, words), dtype=D),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = fit(zoo_em.topics, data, max_iter=3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 800_000  # kilobytes
    assert result.history[-1].after > result.history[0].before


def test_the_guide_alone_is_an_ordinary_pyro_guide():
    guide = vem.MeanFieldConjugate(zoo_em.normal_gamma)
    svi = pyro.infer.SVI(
        zoo_em.normal_gamma, guide, pyro.optim.ClippedAdam({"lr": 0.02}), vem.AnalyticKL_ELBO()
    )
    y = Y.float()
    losses = [svi.step(y) for _ in range(300)]
    assert np.mean(losses[-50:]) < np.mean(losses[:50])
    made = pyro.infer.Predictive(zoo_em.normal_gamma, guide=guide, num_samples=3)(y)
    assert made["tau"].shape[0] == 3


def test_scales_of_what_is_summed_out_together_must_agree(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            with pyro.poutine.scale(scale=2.0):
                pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    with pytest.raises(vem.UnsupportedModelError, match="scales differ"):
        fit(model, {"y": Y})


def test_a_discrete_site_under_what_has_no_closed_form_is_summed_out_at_nodes(fit):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.StudentT(3.0, mu[z], 1.0), obs=y)

    for guide in (None, "auto"):
        result = fit(model, {"y": Y}, guide=guide)
        assert result.converged
        assert "not conjugate: site 'y' depends on a discrete site" in str(result.plan)
    by_hand = fit(model, {"y": Y}, guide=vem.MeanFieldNormal(model))
    assert result.elbo == pytest.approx(by_hand.elbo, abs=1e-9)
    with pytest.raises(vem.UnsupportedModelError, match=r"'y' depends on a discrete site.*MeanFieldNormal"):
        fit(model, {"y": Y}, guide=vem.MeanFieldConjugate(model))


def test_a_uniform_prior_is_a_beta(fit):
    """Survival and recapture (Cormack, Jolly and Seber, 1964 and 1965), with the priors that people write."""
    seen = torch.tensor([[1, 0, 1, 0.0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])

    def model(y, unit):
        survival, recapture = pyro.sample("survival", unit), pyro.sample("recapture", unit)
        with pyro.plate("animals", len(y)):
            z = torch.ones(len(y))
            for t in pyro.markov(range(1, y.shape[1])):
                z = pyro.sample(f"z{t}", dist.Bernoulli(survival * z), infer={"enumerate": "parallel"})
                pyro.sample(f"y{t}", dist.Bernoulli(recapture * z), obs=y[:, t])

    flat, beta = (
        fit(model, {"y": seen, "unit": unit}) for unit in (dist.Uniform(0.0, 1.0), dist.Beta(1.0, 1.0))
    )
    assert flat.converged
    assert "guide.concentration1.survival" in flat.guide_params
    assert flat.elbo == pytest.approx(beta.elbo, abs=1e-12)


def test_discrete_sites_alone_need_no_statistics(fit):
    """Components of any kind: the likelihood is exact, its maximum found by gradients."""

    def model(y):
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.StudentT(3.0, mu[z.long()], 1.0), obs=y)

    result = fit(model, {"y": Y})
    mu = result.params["mu"].clone().requires_grad_()
    exact = dist.StudentT(3.0, mu, torch.ones(2)).log_prob(Y.unsqueeze(-1)).logsumexp(-1).sum()
    exact = exact - len(Y) * math.log(2)
    assert result.elbo == pytest.approx(float(exact.detach()), abs=1e-10)
    assert torch.autograd.grad(exact, mu)[0].abs().max() < 1e-4


def test_point_estimates_have_their_own_best_value(fit):
    """MAP of a simplex under a Dirichlet prior: (alpha + n - 1) / total."""

    @vem.vem_model(map_sites=["p"])
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 2.0])))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, sd), obs=torch.tensor(3.0, dtype=D))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 1, 2, 2, 2]))

    result = fit(model, guide="auto")
    assert torch.allclose(result.params["p"], torch.tensor([2.0, 3.0, 4.0], dtype=D) / 9, atol=1e-8)
    assert float(result.params["sd"]) == pytest.approx(8**0.5, rel=1e-5)


def test_models_without_plates_and_without_closed_forms(fit):
    def scalar():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=torch.tensor(1.0, dtype=D))

    result = fit(scalar, guide="auto")
    assert result.elbo == pytest.approx(-0.5 * math.log(4 * math.pi) - 0.25, abs=1e-8)

    def none():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Poisson(rate), obs=torch.arange(6.0))

    conjugate, gaussian = fit(none, guide=vem.MeanFieldConjugate(none)), fit(none)
    assert conjugate.elbo_se < 0.02
    assert conjugate.elbo == pytest.approx(gaussian.elbo, abs=5 * conjugate.elbo_se)


def test_annotators_have_a_simplex_for_each_class(fit):
    """A plate of annotators (Dawid and Skene, 1979) was refused: its guide raised an error."""
    seen = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1], [2, 2, 0, 2], [0, 1, 0, 0], [2, 2, 2, 1]])
    prior = dist.Dirichlet(4 * torch.eye(3) + 1)

    def rest(confusion):
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("items", len(seen), dim=-2):
            c = pyro.sample("c", dist.Categorical(pi), infer={"enumerate": "parallel"})
            with pyro.plate("answers", 4, dim=-1) as j:
                pyro.sample("y", dist.Categorical(confusion[j, c]), obs=seen)

    def by_plate():
        with pyro.plate("annotators", 4, dim=-1):
            confusion = pyro.sample("confusion", prior.to_event(1))
        rest(confusion)

    def by_event():
        rest(pyro.sample("confusion", prior.expand([4, 3]).to_event(2)))

    first, second = fit(by_plate, {}), fit(by_event, {})
    assert first.converged
    assert first.elbo == pytest.approx(second.elbo, abs=1e-9)


COUNTS = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 4.0, 2.0, 0.0])


def test_data_may_rule_out_values_of_a_discrete_site(fit):
    """A count above zero is no structural zero: such rows were refused as infinite data."""

    def model():
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(COUNTS)):
            z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Poisson(rate * z), obs=COUNTS)

    result = fit(model, {})
    assert result.converged
    p, rate = (result.params[name] for name in ("p", "rate"))
    seen = p * dist.Poisson(rate).log_prob(COUNTS).exp() + (1 - p) * (COUNTS == 0)
    assert result.elbo == pytest.approx(float(seen.log().sum()), abs=1e-9)
    assert float(p * rate) == pytest.approx(float(COUNTS.mean()), abs=1e-4)  # of the likelihood equations


def test_data_that_no_value_of_a_discrete_site_allows_are_refused(fit):
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(COUNTS)):
            z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Poisson(0 * z), obs=COUNTS)

    with pytest.raises(vem.ModelError, match="site 'y': its log density is infinite"):
        fit(model, {})


def test_a_gradient_that_is_not_finite_is_refused_by_name(fit):
    """The slope of y log(rate) at a rate of 0 is nan, which autograd takes times 0: a fit never moved."""

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(COUNTS)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Poisson(rate * z), obs=COUNTS)

    assert fit(model, {}).converged  # closed forms need no gradient of it
    with pytest.raises(vem.ModelError, match=r"site 'y': the gradient .* not finite .* 1e-12"):
        fit(model, {}, guide=vem.MeanFieldNormal(model))
