"""Arguments that are other functions of a predictor than the usual ones, and grids over any density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributions as td
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_vem as vem
from pyro_vem.bound.compiled.forms import form_of, gauss_hermite
from pyro_vem.bound.compiled.links import LINKS
from pyro_vem.bound.compiled.nodes import mean_at_nodes
from pyro_vem.bound.compiled.slots import RESIDUAL, Spec
from pyro_vem.model.density import lean_log_prob
from pyro_vem.model.runtime import isolated

D = torch.float64
STANDARD = dist.Normal(torch.tensor(0.0, dtype=D), 1.0)

# What a user writes for data whose predictor is eta, with k a positive latent.
FAMILIES = {
    "probit": lambda eta, k: dist.Bernoulli(STANDARD.cdf(eta)),
    "complementary log-log": lambda eta, k: dist.Bernoulli(1 - torch.exp(-eta.exp())),
    "log-log": lambda eta, k: dist.Binomial(5, torch.exp(-torch.exp(-eta))),
    "softplus rate": lambda eta, k: dist.Poisson(softplus(eta)),
    "softplus scale": lambda eta, k: dist.Normal(0.3 * k, softplus(eta)),
    "precision of a beta": lambda eta, k: dist.Beta(k * eta.sigmoid(), k * (1 - eta.sigmoid())),
    "precision of a beta-binomial": lambda eta, k: dist.BetaBinomial(
        k * eta.sigmoid(), k * (1 - eta.sigmoid()), total_count=12
    ),
    "zero-inflated": lambda eta, k: dist.ZeroInflatedPoisson(eta.exp(), gate_logits=-k.log()),
}


def regression(x, y, family, groups=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    k = pyro.sample("k", dist.LogNormal(1.0, 0.5))
    eta = x @ w
    if groups is not None:
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with pyro.plate("groups", int(groups.max()) + 1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        eta = eta + sd * u[groups]
    with pyro.plate("rows", len(y)):
        pyro.sample("y", family(eta, k), obs=y)


def data(name, rows=150, groups=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator, dtype=D)
    eta = x @ torch.tensor([0.8, -0.5, 0.3], dtype=D)
    with pyro.poutine.seed(rng_seed=1):
        y = pyro.sample("y", FAMILIES[name](eta, torch.tensor(3.0, dtype=D)))
    y = y.clamp(1e-6, 1 - 1e-6) if name == "precision of a beta" else y
    found = {"x": x, "y": y, "family": FAMILIES[name]}
    return found if groups is None else {**found, "groups": torch.arange(rows) % groups}


def assert_is_the_bound(found):
    """Against log p - log q at draws, through the ordinary model."""
    with isolated(D):
        drawn = found.setup.objective.sample(found.guide_params, found.params, 4000, 5, ("densities",))
    ratio = drawn["densities"]["log_p"] - drawn["densities"]["log_q"]
    assert abs(float(ratio.mean()) - found.elbo) < 4 * float(ratio.std()) / len(ratio) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_regressions_need_no_draws(fit, name):
    found = fit(regression, data(name))
    assert found.converged
    assert found.plan["y"].method == "quadrature"
    assert_is_the_bound(found)
    drawn = fit(regression, data(name), options=vem.FitOptions(compiled=False, num_draws=1024))
    assert drawn.plan["y"].method == "draws"
    for site in "wk":
        loc, sd = (f"guide.{part}.{site}" for part in ("loc", "scale"))
        assert torch.allclose(drawn.guide_params[loc], found.guide_params[loc], atol=0.01)
        assert torch.allclose(drawn.guide_params[sd], found.guide_params[sd], rtol=0.02)


@pytest.mark.parametrize("name", ["probit", "softplus rate"])
def test_predictors_with_scaled_group_effects(fit, name):
    """An effect times its sd: the slot is affine given the sd alone."""
    found = fit(regression, data(name, groups=10))
    assert found.converged
    assert found.plan["y"].method == "quadrature"
    assert "given sd" in found.plan["y"].proof
    assert_is_the_bound(found)


@pytest.mark.parametrize("name", ["complementary log-log", "softplus scale"])
def test_exponentials_of_scaled_effects_have_no_expectation(fit, name):
    """exp(exp(log sd) u) of two Gaussians: nodes would settle on a number."""
    found = fit(regression, data(name, groups=10), max_iter=1)
    assert found.plan["y"].method == "draws"
    assert "no finite expectation" in found.plan["y"].proof


def test_weights_may_be_parameters(fit):
    def model(x, y):
        w = pyro.param("w", torch.zeros(2, dtype=D))
        sd = pyro.param("sd", torch.tensor(0.5, dtype=D), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson(softplus(x @ w + sd * z)), obs=y)

    x = data("softplus rate")["x"][:, :2]
    with pyro.poutine.seed(rng_seed=1):
        y = pyro.sample("y", dist.Poisson(softplus(1 + x[:, 0] + torch.randn(len(x), dtype=D))))
    found = fit(model, {"x": x, "y": y})
    assert found.converged
    assert found.plan["y"].method == "quadrature"
    assert_is_the_bound(found)


def test_probabilities_that_are_rounded_to_one(fit):
    """Of a probit at 9 nothing is left in the model's own logits; its density there is."""
    x = torch.linspace(-9, 9, 60, dtype=D).unsqueeze(1)
    y = (x[:, 0] > 0).to(D)
    y[[28, 31]] = torch.tensor([1.0, 0.0], dtype=D)
    found = fit(regression, {"x": x, "y": y, "family": FAMILIES["probit"]})
    assert found.converged
    assert found.plan["y"].method == "quadrature"
    assert_is_the_bound(found)


@pytest.mark.parametrize("name", LINKS)
def test_links_have_inverses_and_derivatives(name):
    link, eta = LINKS[name], torch.linspace(-1.2, 1.2, 9, dtype=D, requires_grad=True)
    assert torch.allclose(link.slot(link.argument(eta)), eta, atol=1e-12)
    assert torch.autograd.gradcheck(link.argument, eta)
    assert torch.autograd.gradgradcheck(link.argument, eta)


def test_a_grid_has_derivatives_of_its_own():
    """In means, in what numbers share, and in a number that is not random."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, aa, ba, bb = (0.3 * torch.randn(4, generator=generator, dtype=D) for _ in range(6))
    inputs = [value.requires_grad_() for value in (a, b, c, aa, ba, bb)]

    def value(a, b, c, aa, ba, bb):
        parts = {("a", 0): aa, ("b", 0): ba, ("b", 1): bb}
        return mean_at_nodes(
            lambda at: torch.exp(at["a"]) * torch.tanh(at["b"]) + at["c"] * at["b"] ** 2,
            {"a": a, "b": b, "c": c}, parts, gauss_hermite(6),
        )  # fmt: skip

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("random", [(RESIDUAL,), ("scale by softplus",), (RESIDUAL, "scale by softplus")])
def test_normal_rows_with_another_scale_need_nodes_in_it_alone(random):
    slots = (RESIDUAL, "scale by softplus")
    spec = Spec("y", td.Normal, slots, (3,), torch.ones(3), torch.zeros(3), None)
    generator = torch.Generator().manual_seed(1)
    mean = {name: torch.randn(3, generator=generator, dtype=D) for name in slots}
    root = 0.4 * torch.randn(3, 2, 2, generator=generator, dtype=D)
    cov = root @ root.mT
    pairs = {(slots[i], slots[j]): cov[:, i, j] for i in range(2) for j in range(i, 2)}
    pairs = {key: value for key, value in pairs.items() if set(key) <= set(random)}
    form = form_of(spec, random)
    assert form.dims == int("scale by softplus" in random)
    noise = torch.randn(2, 400_000, 3, generator=generator, dtype=D)
    lower = torch.linalg.cholesky(cov)
    drawn = dict(mean)
    if random == slots:
        drawn[RESIDUAL] = mean[RESIDUAL] + lower[:, 0, 0] * noise[0]
        drawn[slots[1]] = mean[slots[1]] + lower[:, 1, 0] * noise[0] + lower[:, 1, 1] * noise[1]
    else:
        drawn[random[0]] = mean[random[0]] + pairs[random[0], random[0]].sqrt() * noise[0]
    values = spec.log_density(dict(zip(slots, torch.broadcast_tensors(*drawn.values()), strict=True)))
    error = values.std(0) / len(values) ** 0.5
    assert ((form.rows(mean, pairs, 32) - values.mean(0)).abs() < 5 * error).all()


def test_weibull_rows_have_the_density_of_torch():
    """Written out: torch's own takes an absolute value, whose second derivatives load its compiler."""
    generator = torch.Generator().manual_seed(0)
    scale, shape, value = (0.5 + torch.rand(6, generator=generator, dtype=D) for _ in range(3))
    for fn in (dist.Weibull(scale, shape), dist.Weibull(scale, shape).expand([2, 6])):
        torch.testing.assert_close(lean_log_prob(fn, value), fn.log_prob(value))
    at_zero = dist.Weibull(scale, shape, validate_args=False)
    assert lean_log_prob(at_zero, torch.zeros(6, dtype=D)).isinf().all()


def mixtures():
    """Mixtures of every kind of part, by name, with values."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 3, generator=generator, dtype=D)
    loc = torch.randn(5, 3, generator=generator, dtype=D)
    parts = dist.Normal(loc, 0.5 + weights)
    vectors = dist.Normal(loc.unsqueeze(-1).expand(5, 3, 2), 1.0).to_event(1)
    scalar, vector = torch.zeros(5, dtype=D), torch.zeros(5, 2, dtype=D)
    read = dist.MixtureSameFamily(dist.Categorical(logits=torch.tensor([0.0, -50.0, 1.0]).double()), parts)
    assert read.mean.isfinite().all()  # reads probabilities of the logits, cut at the smallest number
    yield read, scalar + 3
    yield dist.MixtureSameFamily(dist.Categorical(weights), parts), scalar
    yield dist.MixtureSameFamily(dist.Categorical(weights[0]).expand([5]), parts).expand([4, 5]), scalar
    yield dist.MixtureSameFamily(dist.Categorical(logits=loc), vectors), vector
    yield dist.MixtureSameFamily(dist.Categorical(torch.tensor([1.0, 0.0, 1.0]).double()), parts), scalar
    yield dist.MixtureSameFamily(dist.Categorical(weights), dist.Poisson(weights)), scalar + 2


@pytest.mark.parametrize("number", range(6))
def test_mixtures_have_the_density_of_torch(number):
    fn, value = list(mixtures())[number]
    torch.testing.assert_close(lean_log_prob(fn, value), fn.log_prob(value))


@pytest.mark.parametrize("first", [0.5, 1.0, 2.0])
def test_shares_have_the_density_of_torch(first):
    value = torch.tensor([0.0, 0.3, 1.0], dtype=D)
    fn = dist.Beta(torch.tensor(first, dtype=D), torch.tensor([1.0, 2.0, 1.0], dtype=D), validate_args=False)
    torch.testing.assert_close(lean_log_prob(fn, value), fn.log_prob(value))


def test_normals_have_the_density_of_torch():
    scale, value = torch.tensor([0.5, 2.0], dtype=D), torch.arange(6.0, dtype=D).reshape(3, 2)
    for fn in (dist.Normal(1.0, scale), dist.Normal(value, scale.expand(3, 2)), dist.Normal(0.0, 2.0)):
        torch.testing.assert_close(lean_log_prob(fn, value), fn.log_prob(value))
