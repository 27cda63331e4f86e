"""Compiled terms: exact expectations, found by probing values and believed only when checked."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.bound.compiled.affine import Probe
from pyro_vem.bound.compiled.compile import Compiled
from pyro_vem.bound.compiled.fit_slots import SlotFitter
from pyro_vem.model.runtime import isolated

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()
GROUP = torch.arange(12) % 4
COUNT = torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0, 0.0, 1.0, 2.0, 4.0, 1.0, 0.0, 2.0])
ENDS = torch.tensor([-1.0, 0.5, 0.8]).double()  # of ordered categories
REAL = torch.linspace(-1.5, 2.5, 12).double()
BINARY = (REAL > 0.3).double()


def hierarchy(observe):
    """mu, tau, groups, and a likelihood for each row."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 4):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("rows", 12):
            observe(a[GROUP])

    return model


def regression():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=REAL)


def non_centred():
    """A Poisson likelihood here has an infinite expectation: exp(tau t) with log tau Gaussian."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 4):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Binomial(6, logits=0.3 * (mu + tau * t[GROUP])), obs=COUNT)


def two_parameter_logistic():
    with pyro.plate("items", 3, dim=-1):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.3))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("people", 4, dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=BINARY.reshape(4, 3))


def walk():
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.3))
    x = torch.zeros(())
    for i in range(6):
        x = pyro.sample(f"x{i}", dist.Normal(x, scale))
        pyro.sample(f"y{i}", dist.Normal(x, 0.5), obs=REAL[2 * i])


def student():
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.4))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.StudentT(4.0, beta * REAL, scale), obs=REAL)


def student_of_random_degrees():
    """Degrees of freedom that the scale depends on too."""
    df = pyro.sample("df", dist.Gamma(2.0, 0.3))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.4))
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.StudentT(df, 0.0, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.StudentT(df, a[GROUP], scale / df.sqrt()), obs=REAL)


def weighted():
    with pyro.plate("rows", 12):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=0.7), pyro.poutine.mask(mask=BINARY.bool()):
            pyro.sample("y", dist.Normal(z, 0.5), obs=REAL)


def rates():
    alpha = pyro.sample("alpha", dist.Exponential(1.0))
    beta = pyro.sample("beta", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", 12):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
        pyro.sample("y", dist.Poisson(rate), obs=COUNT)


def scales():
    """Every family of a positive value, with a random scale or rate where that is finite."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
    a = pyro.sample("a", dist.Gamma(3.0, 1.0))
    half = pyro.sample("half", dist.HalfNormal(s))
    pyro.sample("cauchy", dist.HalfCauchy(s))
    pyro.sample("wait", dist.Exponential(s))
    pyro.sample("inverse", dist.InverseGamma(a, s))
    pyro.sample("weibull", dist.Weibull(s, 1.5))
    with pyro.plate("rows", 12):
        pyro.sample("gamma", dist.Gamma(a, s), obs=COUNT + 0.5)
        pyro.sample("inverted", dist.InverseGamma(a, half), obs=COUNT + 0.5)
        pyro.sample("zeros", dist.HalfNormal(s), obs=COUNT)
        pyro.sample("log", dist.LogNormal(half.log(), s), obs=COUNT + 0.5)


def mixed_conditions():
    """Residuals that a latent scales linearly, by an exponential, and by two at once."""
    m, b = pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(1.0, 0.5))
    tau = pyro.sample("tau", dist.LogNormal(-1.0, 0.3))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    with pyro.plate("groups", 4):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Normal(m + b * t[GROUP] + tau * u[GROUP], sigma), obs=REAL)


def medians():
    """Laplace densities, one of a latent, with random scales and a random asymmetry."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    k = pyro.sample("k", dist.LogNormal(0.5, 0.4))
    pyro.sample("known", dist.Laplace(0.0, b), obs=torch.tensor(0.8).double())
    with pyro.plate("rows", 12):
        e = pyro.sample("e", dist.Laplace(a, b))
        pyro.sample("y", dist.Laplace(e, b), obs=REAL)
        pyro.sample("skew", dist.AsymmetricLaplace(a, b, 2.0), obs=REAL)
        # Here the residual and the scale share a latent.
        pyro.sample("tied", dist.AsymmetricLaplace(a, (0.3 * a + b.log()).exp(), k), obs=REAL)


def simplex_and_interval():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]).double()))
    u = pyro.sample("u", dist.Uniform(-1.0, 2.0))
    with pyro.plate("rows", 12):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=REAL)
    pyro.sample("w", dist.Normal(u * p[0], 1.0), obs=torch.tensor(0.4))


MODELS = {
    "Normal": hierarchy(lambda a: pyro.sample("y", dist.Normal(a, 0.7), obs=REAL)),
    "Laplace": hierarchy(lambda a: pyro.sample("y", dist.Laplace(a, 0.7), obs=REAL)),
    "Poisson": hierarchy(lambda a: pyro.sample("y", dist.Poisson((0.4 * a).exp()), obs=COUNT)),
    "Bernoulli": hierarchy(lambda a: pyro.sample("y", dist.Bernoulli(logits=a), obs=BINARY)),
    "Bernoulli by probs": hierarchy(lambda a: pyro.sample("y", dist.Bernoulli(a.sigmoid()), obs=BINARY)),
    "Binomial": hierarchy(lambda a: pyro.sample("y", dist.Binomial(6, logits=a), obs=COUNT)),
    "Exponential": hierarchy(lambda a: pyro.sample("y", dist.Exponential((-a).exp()), obs=COUNT + 0.1)),
    "Gamma": hierarchy(lambda a: pyro.sample("y", dist.Gamma(2.0, (-a).exp()), obs=COUNT + 0.1)),
    "NegativeBinomial": hierarchy(
        lambda a: pyro.sample("y", dist.NegativeBinomial(3.0, logits=0.5 * a), obs=COUNT)
    ),
    "Geometric": hierarchy(lambda a: pyro.sample("y", dist.Geometric(logits=a), obs=COUNT)),
    "LogNormal": hierarchy(lambda a: pyro.sample("y", dist.LogNormal(a, 0.7), obs=COUNT + 0.1)),
    "regression": regression,
    "non-centred": non_centred,
    "two-parameter logistic": two_parameter_logistic,
    "walk": walk,
    "Student": student,
    "Student of random degrees": student_of_random_degrees,
    "ordered": hierarchy(lambda a: pyro.sample("y", dist.OrderedLogistic(a, ENDS), obs=COUNT.long() % 4)),
    "weighted": weighted,
    "rates": rates,
    "scales": scales,
    "medians": medians,
    "mixed conditions": mixed_conditions,
    "simplex and interval": simplex_and_interval,
}
PARTLY = {"simplex and interval": {"w"}}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_terms_are_the_averages_of_draws(fit, name):
    """Each term at the fitted guide, against 20,000 draws through the ordinary model."""
    with pyro.poutine.block():
        result = fit(MODELS[name], max_iter=20)
    objective = result.setup.objective
    exact = objective.exact
    names = {row.site for row in objective.plan.rows}
    assert exact.names == names - PARTLY.get(name, set()), exact.compiled.refused
    at = result.guide_params, result.params
    with isolated(torch.float64):
        found = objective.sample(*at, 20_000, 5, ("densities", "terms"))
        terms = objective.terms(*at)
    if objective.is_exact:
        ratio = found["densities"]["log_p"] - found["densities"]["log_q"]
        se = float(ratio.std()) / 20_000**0.5
        assert abs(result.elbo - float(ratio.mean())) <= 4 * se + 1e-8
        assert result.elbo_se == 0.0
    for site in exact.names:
        draws = found["terms"][site]
        se = float(draws.std()) / 20_000**0.5
        assert abs(float(terms[site]) - float(draws.mean())) <= 4.5 * se + 1e-7, site


def test_eight_schools_reach_the_exact_optimum(fit):
    def centred(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    for model, best in ((centred, -33.404050), (zoo.eight_schools, -31.597301)):
        result = fit(model, zoo.SCHOOLS)
        assert result.elbo == pytest.approx(best, abs=1e-5)
        assert result.elbo_se == 0.0
        assert sum(row.evaluations for row in result.history) <= 100


@pytest.mark.parametrize("kind", ["diagonal", "equicorrelated", "autoregressive"])
@pytest.mark.parametrize("size", [10, 100])
def test_gaussian_posteriors_are_exact(fit, kind, size):
    """Mean-field means are the posterior's, sds are those of the conditionals."""
    i = np.arange(size)
    covariance = {
        "diagonal": np.diag(0.5 + i / size),
        "equicorrelated": 0.1 * np.eye(size) + 0.9,
        "autoregressive": 0.95 ** np.abs(i[:, None] - i),
    }[kind]
    precision = np.linalg.inv(covariance)
    root = torch.from_numpy(np.linalg.cholesky(precision).T.copy())
    target = torch.sin(torch.arange(size, dtype=torch.float64))

    def model(design, y):  # a flat enough prior, so that the likelihood is the posterior
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (size,)))
        pyro.sample("y", dist.Normal(design @ z, 1.0).to_event(1), obs=y)

    init = {"z": torch.zeros(size)}
    result = fit(model, {"design": root, "y": root @ target}, init=init, tol=1e-12)
    assert result.converged
    assert torch.allclose(result.guide_params["guide.loc.z"], target, atol=1e-6)
    sds = torch.from_numpy(np.diag(precision) ** -0.5)
    assert torch.allclose(result.guide_params["guide.scale.z"], sds, rtol=1e-6)


def test_parameters_are_compiled_too(fit):
    result = fit(zoo.pumps, zoo.PUMPS)
    assert result.setup.objective.is_exact
    assert result.elbo == pytest.approx(-32.1525, abs=1e-4)
    assert result.plan["failures"].method == "closed form"
    assert "affine in rate" in result.plan["failures"].proof


def test_a_kink_that_no_probe_meets_is_found_at_the_end(fit):
    """The clamp is out of reach of the probes; the fit ends inside of it."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 30.0))
        pyro.sample("y", dist.Normal(z.clamp(max=9.0), 1.0), obs=y)

    result = fit(model, {"y": torch.tensor(8.9)})
    assert result.plan["y"].method == "draws"
    assert any("sampled from here on" in note and "y" in note for note in result.plan.notes)
    assert any(row.block == "check" for row in result.history)


def test_draws_demote_the_term_that_they_disagree_with_and_no_other(fit, monkeypatch):
    """The same kink, with the comparison of slots switched off."""
    monkeypatch.setattr(Compiled, "recheck", lambda self, moments, seed: [])

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 30.0))
        pyro.sample("y", dist.Normal(z.clamp(max=9.0), 1.0), obs=y)

    result = fit(model, {"y": torch.tensor(8.9)})
    assert "z" in result.setup.objective.exact.compiled.terms
    assert "standard errors" in result.setup.objective.exact.compiled.refused["y"]
    assert any(note.startswith("y: sampled from here on") for note in result.plan.notes)


@pytest.mark.parametrize(
    "bend",
    [lambda z: float(z) if z > 100 else z, lambda z: z.detach() + z.relu(), lambda z: torch.tanh(z)],
    ids=["branch", "relu", "tanh"],
)
def test_what_is_not_affine_is_not_compiled_or_right(fit, bend):
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(bend(z[0]) + bend(z[1]), 0.5), obs=y[0])

    few = vem.FitOptions(step_iterations=20)  # a kink is climbed slowly, and that is not the question
    result = fit(model, {"y": torch.tensor([0.5, 1.0])}, max_iter=2, options=few)
    assert "y" not in result.setup.objective.exact.names or bend(torch.tensor(-2.0)) == -2.0


def test_an_infinite_expectation_is_not_called_exact(fit):
    def model(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((tau * t).exp()), obs=y)

    result = fit(model, {"y": COUNT})
    assert result.plan["y"].method == "draws"
    assert "no finite expectation" in result.plan["y"].proof


def test_compilation_can_be_switched_off(fit):
    result = fit(zoo.eight_schools, zoo.SCHOOLS, options=vem.FitOptions(compiled=False))
    assert result.plan["y"].method == "draws"
    assert result.elbo_se > 0
    assert result.elbo == pytest.approx(-31.5973, abs=0.05)


def test_index_maps_are_read_off_bits():
    index = torch.randint(0, 300, (1000,), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    design = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def evaluate(batch):
        a, s, b = batch["a"], batch["s"], batch["b"]
        return {
            "local": weights * a[:, index],
            "conditional": weights * a[:, index] * s.exp() + 2.0 * s - 1.0,
            "dense": b @ design.T + 3.0,
            "nonlinear": (a[:, :5] * a[:, 5:10]),
        }

    generator = torch.Generator().manual_seed(3)
    probe = Probe(evaluate, {"a": 300, "s": 1, "b": 7}, generator)
    fitter = SlotFitter(probe, list(probe.here), generator)
    local, conditional, dense = (fitter.fit(key) for key in ("local", "conditional", "dense"))
    assert torch.equal(local.locals["a"].index, index)
    assert torch.allclose(local.locals["a"].coefficient, weights)
    assert list(conditional.conditions) == ["s"]
    assert torch.allclose(conditional.locals["a"].rate["s"], torch.ones(1000).double(), atol=1e-6)
    assert torch.allclose(dense.denses["b"].matrix, design)
    assert isinstance(fitter.fit("nonlinear"), str)


def test_a_fit_loads_no_compiler():
    """torch._dynamo costs a second, sympy half of one: neither is needed."""
    import subprocess
    import sys

    code = """
import sys, warnings; warnings.simplefilter("ignore")
import torch, pyro, pyro.distributions as dist, pyro_vem as vem
def model(y):
    m = pyro.sample("m", dist.Normal(0., 1.)); s = pyro.sample("s", dist.HalfCauchy(1.))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(m, s)); pyro.sample("y", dist.Bernoulli(logits=z), obs=y)
    pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
fit = vem.fit_vem(model, {"y": torch.tensor([1., 0., 1.])}, progress=False)
print(fit.status.name, "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["converged", "False", "False"]


def test_row_reduced_softplus_has_both_derivatives():
    from pyro_vem.bound.compiled.forms import trapezoid
    from pyro_vem.bound.compiled.reduced import mean_softplus

    m = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.5, 1.5, 0.1], dtype=torch.float64, requires_grad=True)

    def value(m, s):
        return mean_softplus(m, s, *trapezoid(96))

    assert torch.autograd.gradcheck(value, (m, s))
    assert torch.autograd.gradgradcheck(value, (m, s))
