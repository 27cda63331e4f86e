"""Negative binomial terms with a random total count: quadratures of one dimension."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributions as td

from pyro_vem.bound.compiled.counts import mean_rising
from pyro_vem.bound.compiled.forms import _grid as grid
from pyro_vem.bound.compiled.forms import form_of, gauss_hermite, trapezoid
from pyro_vem.bound.compiled.slots import Spec

NAMES = ("total_count", "logits")
Y = torch.tensor([0.0, 1.0, 1.0, 4.0, 30.0], dtype=torch.float64)
D = torch.float64


def moments(random):
    """Means of both slots, and a full covariance of those that are random."""
    generator = torch.Generator().manual_seed(3)
    mean = {name: torch.randn(len(Y), generator=generator, dtype=D) for name in NAMES}
    root = 0.3 * torch.randn(len(Y), len(random), len(random), generator=generator, dtype=D)
    cov = root @ root.mT + 0.05 * torch.eye(len(random))
    pairs = [(i, j) for i in range(len(random)) for j in range(i, len(random))]
    return mean, {(random[i], random[j]): cov[:, i, j] for i, j in pairs}


def rows_spec():
    return Spec("y", td.NegativeBinomial, NAMES, (len(Y),), torch.ones(len(Y)), Y, None)


@pytest.mark.parametrize("random", [("total_count",), ("logits",), NAMES])
def test_expectations_are_those_of_a_grid(random):
    """Over both slots at once, correlated as they may be."""
    mean, cov = moments(random)
    form = form_of(rows_spec(), random)
    assert form.dims == 1
    truth = grid(rows_spec(), random, mean, cov, trapezoid(64))
    assert torch.allclose(form.rows(mean, cov, 64), truth, rtol=1e-9)


def test_derivatives_are_those_of_the_value():
    """First and second ones, in all means and covariances."""
    mean, cov = moments(NAMES)
    inputs = [value.clone().requires_grad_() for value in (*mean.values(), *cov.values())]

    def rows(*values):
        here = dict(zip(NAMES, values[:2], strict=True)), dict(zip(cov, values[2:], strict=True))
        return form_of(rows_spec(), NAMES).rows(*here, 6)

    assert torch.autograd.gradcheck(rows, inputs)
    assert torch.autograd.gradgradcheck(rows, inputs)


@pytest.mark.parametrize("log_count", [-20.0, 0.0, np.log(9.9), np.log(10.1), 6.0])
def test_rising_powers_of_one_count_for_all_rows(log_count):
    m = torch.tensor([log_count], dtype=D, requires_grad=True)
    s = torch.tensor([0.2], dtype=D, requires_grad=True)
    k = m.detach().exp()
    truth = torch.lgamma(k + Y) - torch.lgamma(k)
    assert torch.allclose(mean_rising(m, torch.zeros(1, dtype=D), Y, *gauss_hermite(6)), truth, atol=1e-10)
    apart = mean_rising(m.expand(len(Y)), s.expand(len(Y)), Y, *gauss_hermite(6))
    assert torch.allclose(mean_rising(m, s, Y, *gauss_hermite(6)), apart, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda m, s: mean_rising(m, s, Y, *gauss_hermite(6)), (m, s))
    assert torch.autograd.gradgradcheck(lambda m, s: mean_rising(m, s, Y, *gauss_hermite(6)), (m, s))


def test_many_failures_are_poisson_rows():
    """log Gamma(k) alone is 1e13 here: its rounding is a hundredth of a nat."""
    log_count, log_rate = torch.full((len(Y),), 26.0, dtype=D), torch.linspace(-1, 3, len(Y), dtype=D)
    mean = {"total_count": log_count, "logits": log_rate - log_count}
    cov = {(name, name): torch.full((len(Y),), 1e-30, dtype=D) for name in NAMES}
    rows = form_of(rows_spec(), NAMES).rows(mean, cov, 8)
    assert torch.allclose(rows, td.Poisson(log_rate.exp()).log_prob(Y), atol=1e-8)


def counts(x, y, family):
    a, b = pyro.sample("a", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Gamma(2.0, 0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", family(k, a + b * x), obs=y)


FAMILIES = {
    "NegativeBinomial": lambda k, eta: dist.NegativeBinomial(k, logits=eta - k.log()),
    "GammaPoisson": lambda k, eta: dist.GammaPoisson(k, k / eta.exp()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_overdispersed_counts_are_fitted_without_draws(fit, name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, generator=generator, dtype=D)
    rate = (1 + 0.5 * x).exp() * torch.as_tensor(np.random.default_rng(0).gamma(2.0, 0.5, 80))
    y = torch.poisson(rate, generator=generator)
    found = fit(counts, {"x": x, "y": y, "family": FAMILIES[name]})
    assert found.converged
    assert found.plan["y"].method == "quadrature"

    loc, sd = ({n: found.guide_params[f"guide.{part}.{n}"] for n in "abk"} for part in ("loc", "scale"))
    nodes, weight = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(30))
    grid_of = torch.cartesian_prod(nodes, nodes)
    weight = torch.cartesian_prod(weight, weight).prod(1) / weight.sum() ** 2
    log_k = (loc["k"] + sd["k"] * grid_of[:, :1]).double()
    spread = (sd["a"] ** 2 + (sd["b"] * x) ** 2).sqrt()
    eta = loc["a"] + loc["b"] * x + spread * grid_of[:, 1:]
    rows = weight @ td.NegativeBinomial(log_k.exp(), logits=eta - log_k).log_prob(y)
    k = log_k.exp()[:, 0]
    own = td.Normal(loc["k"], sd["k"]).log_prob(log_k[:, 0]) - log_k[:, 0]
    kl = weight @ (own - td.Gamma(2.0, 0.5).log_prob(k))
    for n, prior in (("a", 2.0), ("b", 1.0)):
        kl = kl + td.kl_divergence(td.Normal(loc[n], sd[n]), td.Normal(0.0, prior))
    assert found.elbo == pytest.approx(float(rows.sum() - kl), abs=1e-7)
