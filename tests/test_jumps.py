"""Terms whose gradient does not show how they change: no fit of them has converged."""

import pyro
import pyro.distributions as dist
import pytest
import torch

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
