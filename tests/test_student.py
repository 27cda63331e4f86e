"""Student t terms: quadratures of two dimensions at most, with derivatives of their own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributions as td

from pyro_vem.bound.compiled.forms import _grid as grid
from pyro_vem.bound.compiled.forms import form_of, gauss_hermite, trapezoid
from pyro_vem.bound.compiled.slots import RESIDUAL, Spec
from pyro_vem.bound.compiled.student import mean_normaliser, mean_tail

NAMES = (RESIDUAL, "df", "scale")
ROWS = 5


def rows_spec(family=td.StudentT, slots=NAMES):
    return Spec("y", family, slots, (ROWS,), torch.ones(ROWS), torch.zeros(ROWS), None)


def moments(random):
    """Means of all slots, and a full covariance of those that are random."""
    generator = torch.Generator().manual_seed(3)
    mean = {name: torch.randn(ROWS, generator=generator, dtype=torch.float64) for name in NAMES}
    root = 0.3 * torch.randn(ROWS, len(random), len(random), generator=generator, dtype=torch.float64)
    cov = root @ root.mT + 0.05 * torch.eye(len(random))
    pairs = [(i, j) for i in range(len(random)) for j in range(i, len(random))]
    return mean, {(random[i], random[j]): cov[:, i, j] for i, j in pairs}


SOME = [(RESIDUAL,), ("df",), ("scale",), (RESIDUAL, "df"), (RESIDUAL, "scale"), ("df", "scale"), NAMES]


@pytest.mark.parametrize("random", SOME)
def test_expectations_are_those_of_a_grid(random):
    """Over all random slots at once, correlated as they may be."""
    mean, cov = moments(random)
    form = form_of(rows_spec(), random)
    assert form.dims == int(RESIDUAL in random) + int(random != (RESIDUAL,))
    truth = grid(rows_spec(), random, mean, cov, trapezoid(64))
    assert torch.allclose(form.rows(mean, cov, 128), truth, atol=1e-7)


def test_cauchy_rows_are_student_rows_of_one_degree():
    mean, cov = moments((RESIDUAL, "scale"))
    one = mean | {"df": torch.zeros(ROWS, dtype=torch.float64)}
    del mean["df"]
    cauchy = form_of(rows_spec(td.Cauchy, (RESIDUAL, "scale")), (RESIDUAL, "scale"))
    student = form_of(rows_spec(), (RESIDUAL, "scale"))
    assert torch.allclose(cauchy.rows(mean, cov, 32), student.rows(one, cov, 32), atol=1e-12)


def test_derivatives_of_the_tail_are_those_of_its_value():
    """First and second ones, in all means and covariances."""
    mean, cov = moments((RESIDUAL, "scale"))
    keys = {"rr": (RESIDUAL, RESIDUAL), "rt": (RESIDUAL, "scale"), "tt": ("scale", "scale")}
    inputs = [mean[RESIDUAL], mean["scale"], *(cov[pair] for pair in keys.values())]
    inputs = [value.clone().requires_grad_() for value in inputs]

    def tail(r, t, *covs):
        return mean_tail({"r": r, "t": t}, dict(zip(keys, covs, strict=True)), *gauss_hermite(6))

    assert torch.autograd.gradcheck(tail, inputs)
    assert torch.autograd.gradgradcheck(tail, inputs)


@pytest.mark.parametrize("log_df", [-20.0, 0.0, math.log(59.9), math.log(60.1), 8.0])
def test_the_normaliser_and_its_derivatives(log_df):
    m = torch.tensor([log_df], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)

    def value(m, s):
        return mean_normaliser(m, s, *gauss_hermite(6))

    half = m.detach().exp() / 2
    truth = torch.lgamma(half + 0.5) - torch.lgamma(half) - m.detach() / 2
    assert torch.allclose(value(m, torch.zeros(1).double()), truth, atol=1e-11)
    assert torch.autograd.gradcheck(value, (m, s))
    assert torch.autograd.gradgradcheck(value, (m, s))


def test_random_degrees_of_freedom_take_no_third_dimension(fit):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(21, 3, generator=generator, dtype=torch.float64)
    y = x.sum(-1) + torch.randn(21, generator=generator, dtype=torch.float64)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(5.0))
        df = pyro.sample("df", dist.Gamma(2.0, 0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.StudentT(df, x @ b, scale), obs=y)

    result = fit(model, {"x": x, "y": y})
    assert result.converged
    assert result.elbo_se == 0.0
    term = result.setup.objective.exact.compiled.terms["y"]
    assert set(term.random_slots) == set(NAMES)
    assert term.form.dims == 2
