"""Fits run in float64, also where a prior or an initial value was made outside of the model, in float32."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_vem as vem

D = torch.float64
X, Y = torch.eye(6, 2), torch.arange(6.0)
WEIGHTS = dist.Normal(torch.zeros(2), 1.0).to_event(1)
IDENTITY = torch.eye(2)


def prior_outside(x, y=None):
    b = pyro.sample("b", WEIGHTS)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ b + z, 1.0), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mean + z, 1.0), obs=y)


@pytest.mark.parametrize("make", [lambda: prior_outside, Regression])
def test_priors_made_outside_are_drawn_in_float64(fit, make):
    found = fit(make(), {"x": X, "y": Y})
    for draws in (found.predict({"x": X[:3]}, num_draws=2), found.predict(kind="prior", num_draws=2)):
        assert all(value.dtype is D for value in draws.values())
    assert found.log_likelihood({"x": X[:3], "y": Y[:3]}, num_draws=2)["y"].shape == (2, 3)
    assert "prior" in found.to_arviz(num_draws=20, groups=["posterior", "prior"])
    assert found.infer({"x": X[:4], "y": Y[:4]}).guide_params["guide.loc.z"].shape == (4,)
    assert found.model(X) is None  # an ordinary Pyro program


def test_initial_values_made_outside_are_cast(fit):
    def model(y, start):
        t = pyro.param("t", IDENTITY if start is None else start, constraint=dist.constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=t))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    y = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) * 2
    found, given = fit(model, {"y": y, "start": None}), fit(model, {"y": y, "start": IDENTITY})
    assert found.params["t"].dtype is D
    assert torch.equal(found.params["t"], given.params["t"])


def test_a_clash_that_is_left_says_how_to_mend_it(fit):
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=IDENTITY))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    with pytest.raises(vem.ModelError, match=r"site 'z' has no initial value.*fits run in float64: pass"):
        fit(model, {"y": torch.ones(4, 2)})
