"""`vem_model`: roles by default, MAP sites, held parameters, modules, and what stays plain Pyro."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_vem as vem

Y = torch.tensor([1.0, 2.0, 4.0, 5.0])


def test_decorator_returns_the_same_object():
    def model(y):
        return y

    assert vem.vem_model(model) is model
    assert vem.vem_model()(model) is model
    assert vem.vem_model(fixed=("a",))(model) is model
    module = PyroModule()
    assert vem.vem_model(module) is module
    with pytest.raises(TypeError, match="give a tuple"):
        vem.vem_model(map_sites="scale")


def test_a_decorated_model_stays_plain_pyro():
    model = vem.vem_model(lambda sigma, y=None: zoo.eight_schools(sigma, y))
    mcmc = MCMC(NUTS(model), 20, warmup_steps=20, disable_progbar=True)
    mcmc.run(zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y)
    assert mcmc.get_samples()["t"].shape == (20, 8)
    prior = Predictive(model, num_samples=5)(zoo.SCHOOLS_SIGMA)
    assert prior["y"].shape == (5, 8)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y))


def scale_model(y):
    sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, sd), obs=y)


def map_only(y):
    sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(2.0, sd), obs=y)


def test_map_sites_maximise_the_density_on_the_constrained_scale(fit):
    result = fit(vem.vem_model(map_sites=("sd",))(map_only), {"y": Y}, tol=1e-12)
    # sd^-(a+1) e^(-b/sd) sd^-n e^(-ss / 2 sd^2): (n + a + 1) sd^2 - b sd - ss = 0, no Jacobian
    a, b, n, ss = 3.0, 2.0, len(Y), float(((Y - 2.0) ** 2).sum())
    exact = (b + (b**2 + 4 * (n + a + 1) * ss) ** 0.5) / (2 * (n + a + 1))
    assert float(result.params["sd"]) == pytest.approx(exact, rel=1e-6)
    log_p = dist.InverseGamma(a, b).log_prob(torch.tensor(exact))
    log_p = log_p + dist.Normal(2.0, exact).log_prob(Y).sum()
    assert result.elbo == pytest.approx(float(log_p), abs=1e-5)
    assert result.plan["sd"].kind == "prior of a MAP site"
    assert result.elbo_se == 0.0
    with pytest.raises(vem.ModelError, match="no guide"):
        _ = result.guide


def test_map_em_agrees_with_the_marginal_posterior_mode(fit):
    result = fit(vem.vem_model(map_sites=("sd",))(scale_model), {"y": Y})
    assert result.converged
    sd = torch.linspace(0.1, 4.0, 40_001, dtype=torch.float64)
    mu = Y.double().mean()
    total = dist.InverseGamma(3.0, 2.0).log_prob(sd)
    total = total + dist.Normal(mu, (1 + sd**2).sqrt().unsqueeze(-1)).log_prob(Y.double()).sum(-1)
    assert float(result.params["sd"]) == pytest.approx(float(sd[total.argmax()]), abs=2e-3)
    assert float(result.params["mu"]) == pytest.approx(float(mu), abs=1e-3)
    assert set(result.params) == {"mu", "sd"}
    assert set(result.guide_params) == {"guide.loc.z", "guide.scale.z"}


@pytest.mark.parametrize("schedule", ["alternate", "joint"])
def test_fixed_is_honoured_by_every_step(fit, schedule):
    model = vem.vem_model(fixed=("tau",))(lambda hours, failures: zoo.pumps(hours, failures))
    result = fit(model, zoo.PUMPS, schedule=schedule)
    assert float(result.params["tau"]) == 1.0
    assert float(result.params["mu"]) != 0.0
    again = fit(model, zoo.PUMPS, schedule=schedule, init={"tau": torch.tensor(1.5)})
    assert float(again.params["tau"]) == 1.5


def test_maximum_likelihood_without_latents(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, sd), obs=y)

    result = fit(model, {"y": Y})
    assert float(result.params["mu"]) == pytest.approx(3.0, abs=1e-5)
    assert float(result.params["sd"]) == pytest.approx(float(Y.std(correction=0)), rel=1e-5)
    assert {row.block for row in result.history} == {"M"}


def test_plain_variational_inference_without_parameters(fit):
    result = fit(zoo.normal_mean, {"y": Y})
    mean, sd, evidence = zoo.normal_mean_exact(Y)
    assert float(result.guide_params["guide.loc.z"]) == pytest.approx(mean, abs=1e-4)
    assert float(result.guide_params["guide.scale.z"]) == pytest.approx(sd, rel=1e-4)
    assert result.elbo == pytest.approx(evidence, abs=1e-5)
    assert {row.block for row in result.history} == {"start", "E"}


X = torch.linspace(-1.0, 1.0, 30).unsqueeze(-1)
LINE = 2.0 * X.squeeze(-1) + 1.0


class Regression(PyroModule):
    """PyroParam, PyroSample and a plain submodule in one."""

    def __init__(self):
        super().__init__()
        self.sd = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.offset = PyroSample(dist.Normal(0.0, 10.0))
        self.slope = PyroModule[nn.Linear](1, 1, bias=False)

    def forward(self, x, y=None):
        mean = self.slope(x).squeeze(-1) + self.offset
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.sd), obs=y)


def test_pyro_module_instances(fit):
    torch.manual_seed(0)
    y = LINE + 0.3 * torch.randn(30)
    model = vem.vem_model(Regression())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fit(model, {"x": X, "y": y})
    assert result.converged
    design = torch.cat([X, torch.ones_like(X)], 1).double()
    slope, offset = torch.linalg.lstsq(design, y.double()).solution
    assert float(result.params["slope.weight"]) == pytest.approx(float(slope), abs=1e-3)
    assert float(result.sample(4000)["offset"].mean()) == pytest.approx(float(offset), abs=5e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    predicted = Predictive(result.model, guide=result.guide, num_samples=200)(X)["y"]
    assert torch.allclose(predicted.mean(0), LINE.to(predicted.dtype), atol=0.4)


def test_fixed_holds_a_whole_module(fit):
    net = nn.Linear(1, 1)

    @vem.vem_model(fixed=("net",))
    def model(x, y):
        module = pyro.module("net", net)
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(module(x).squeeze(-1), sd), obs=y)

    result = fit(model, {"x": X, "y": LINE})
    assert torch.equal(result.params["net$$$weight"].float(), net.weight)
    assert float(result.params["sd"]) != 1.0


def test_weights_are_swapped_in_for_plain_calls_only_while_they_run(fit):
    net = nn.Linear(1, 1)

    def model(x, y=None):
        module = pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(module(x).squeeze(-1), 0.01), obs=y)

    before = net.weight.detach().clone()
    result = fit(model, {"x": X, "y": LINE})
    drawn = Predictive(result.model, num_samples=3)(X)["y"]
    assert torch.allclose(drawn.mean(0), LINE.double(), atol=0.1)
    assert torch.equal(net.weight, before)
    assert not list(pyro.get_param_store())

    def failing(x):
        result.model(x)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        failing(X)
    assert torch.equal(net.weight, before)


def test_two_modules_and_data_of_either_dtype(fit):
    mean, spread = nn.Linear(1, 1), nn.Linear(1, 1)

    def model(x, y=None):
        pyro.module("mean", mean)
        pyro.module("spread", spread)
        sd = nn.functional.softplus(spread(x)).squeeze(-1)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("y", dist.Normal(mean(x).squeeze(-1) + z, sd), obs=y)

    result = fit(model, {"x": X, "y": LINE}, max_iter=2)
    assert {name.split("$$$")[0] for name in result.params} == {"mean", "spread"}
    posterior = result.sample(4)
    for x in (X.float(), X.double(), X.numpy()):
        assert Predictive(result.model, guide=result.guide, num_samples=4)(x)["y"].shape == (4, len(X))
        assert Predictive(result.model, posterior_samples=posterior)(x)["y"].shape == (4, len(X))


@pytest.mark.parametrize("wrap", ["partial", "condition", "scale"])
def test_roles_are_seen_through_handlers_and_partials(fit, wrap):
    @vem.vem_model(map_sites=("s",))
    def model(y, sd=1.0):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("y", dist.Normal(z, sd), obs=y)

    wrapped = {
        "partial": functools.partial(model, sd=2.0),
        "condition": pyro.condition(model, data={"y": torch.tensor(1.0)}),
        "scale": pyro.poutine.scale(model, 2.0),
    }[wrap]
    result = fit(wrapped, {"y": torch.tensor(1.0)}, max_iter=2)
    assert list(result.params) == ["s"]


def test_data_as_arrays_frames_and_tuples(fit):
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame({"y": Y.numpy()})
    locked = Y.numpy().copy()
    locked.flags.writeable = False
    reference = fit(zoo.normal_mean, {"y": Y}).elbo
    for data in (
        {"y": Y.numpy()},
        {"y": frame["y"]},
        {"y": locked},
        {"y": np.asfortranarray(np.stack([Y, Y], 1))[:, 0]},
        (Y,),
        {"y": Y, "prior_sd": 1.0},
    ):
        assert fit(zoo.normal_mean, data).elbo == pytest.approx(reference, abs=1e-12)
    assert fit(zoo.normal_mean, {"y": Y[:1]}).converged  # one row
