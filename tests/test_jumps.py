"""Terms whose gradient does not show how they change: no fit of them has converged."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats

import pyro_vem as vem

GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(24, generator=GENERATOR)
Y = 1 + 0.5 * X + 0.7 * torch.randn(24, generator=GENERATOR)


def rounded(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(torch.floor(20 * a) / 20, 1.0), obs=y)


def detached(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.StudentT(3.0, torch.tanh(a.detach()) * x, 1.0), obs=y)


@pytest.mark.parametrize("model", [rounded, detached])
def test_a_term_that_jumps_has_not_converged(fit, model):
    with pytest.warns(UserWarning, match="site y: it changes with latents"):
        result = fit(model, {"x": X, "y": Y}, guide=vem.MeanFieldNormal(model))
    assert result.status is vem.Status.stalled
    assert any("y: it changes with latents" in note for note in result.plan.notes)


def test_a_jump_that_only_an_sd_feels_is_seen(fit):
    """A threshold in the middle of odd data: the bound has no slope in its mean."""
    x = torch.linspace(-2, 2, 60)

    def model(x, y):
        a, b = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in "ab")
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(torch.where(x < c, a, b), 0.5), obs=y)

    with pytest.warns(UserWarning, match="site y: it changes with latents"):
        result = fit(model, {"x": x, "y": torch.sin(2 * x)})
    assert result.status is vem.Status.stalled


def test_a_jump_beside_a_slope_is_named_where_a_fit_stalls(fit):
    """The gradient never vanishes at draws: no convergence is left to refuse."""

    def model(x, y):
        a, b, c, d = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in "abcd")
        mean = a * x + b * x.abs() + c * x**2 + d
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.StudentT(4.0, mean + 2 * (mean > 0.3).double(), 0.5), obs=y)

    with pytest.warns(UserWarning, match="site y: it changes with latents"):
        result = fit(model, {"x": X, "y": Y})
    assert result.status is vem.Status.stalled


def smooth(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("y", dist.StudentT(3.0, torch.tanh(a * x) + z, 0.5), obs=y)


def kinked(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.StudentT(3.0, torch.relu(a * x) + (b * x).abs(), 0.5), obs=y)


def heavy(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Poisson(torch.exp(a + torch.sin(a)) + 1e-3), obs=torch.zeros(3))


@pytest.mark.parametrize("model", [smooth, kinked, heavy])
def test_a_continuous_term_is_not_flagged(fit, model):
    assert fit(model, {"x": X, "y": Y}, guide=vem.MeanFieldNormal(model)).status is vem.Status.converged


def test_hinges_end_at_their_optimum(fit):
    """Kinks at draws, whose curvature autograd does not see: E relu(1 - t) of a Gaussian t is known."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(80, 2, generator=draw)
    side = torch.sign(x @ torch.tensor([0.6, -0.4]) + 0.3 * torch.randn(80, generator=draw))

    def model(x, side):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.factor("hinges", -torch.relu(1 - side * (x @ w)).sum())

    rows = (side.unsqueeze(1) * x).double().numpy()

    def minus_bound(v):
        mean, sd = v[:2], np.exp(v[2:])
        gap, width = 1 - rows @ mean, np.sqrt(rows**2 @ sd**2)
        hinge = gap * stats.norm.cdf(gap / width) + width * stats.norm.pdf(gap / width)
        kl = np.log(2 / sd) + (sd**2 + mean**2) / 8 - 0.5
        return hinge.sum() + kl.sum()

    best = optimize.minimize(minus_bound, np.zeros(4), method="BFGS")
    result = fit(model, {"x": x, "side": side})
    assert result.status is vem.Status.converged
    assert sum(row.evaluations for row in result.history) < 1000
    assert any("kinks" in note for note in result.plan.notes)
    assert abs(result.elbo + best.fun) < 4 * result.elbo_se + 1e-3
    mean, sd = (result.guide_params[f"guide.{name}.w"].numpy() for name in ("loc", "scale"))
    assert np.abs(mean - best.x[:2]).max() < 0.05 * sd.min()
    assert np.abs(np.log(sd) - best.x[2:]).max() < 0.05


def test_kinks_of_few_rows_take_more_draws(fit):
    """Five rows at 256 draws: the gradient jumps by more than an optimum may have."""

    def model(y):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Laplace(a.exp() + b, 1.0), obs=y)

    data = {"y": torch.tensor([0.5, 2.0, 2.5, 3.0, 7.0])}
    result = fit(model, data, options=vem.FitOptions(compiled=False))
    assert result.status is vem.Status.converged
    assert any("draws: the gradient jumps" in row.note for row in result.history)


def test_a_flat_direction_is_no_kink(fit):
    """Covariates that are nearly the same: a check fails at a gradient that is small, and nothing jumps."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(25, 1, generator=draw) + 0.01 * torch.randn(25, 4, generator=draw)
    y = torch.sinh(0.15 * x.sum(-1)) + 0.3 * torch.randn(25, generator=draw)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 30.0).to_event(1))
        mean = (x * w).sum(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.StudentT(4.0, mean + 0.3 * mean**2 * torch.tanh(mean), 0.3), obs=y)

    data, tol = {"x": x, "y": y}, 1e-3
    result = fit(model, data, tol=tol)
    assert result.status is vem.Status.converged
    assert result.history[-1].draws > 0
    assert not any("kinks" in note for note in result.plan.notes)
    assert result.history[-1].after > fit(model, data, tol=1e-8).history[-1].after - tol
