"""Bad input ends in an error that names the site and what to do."""

import inspect

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vem as vem

Y = torch.tensor([1.0, 2.0, 4.0])


def rows(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def raising(y):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    raise RuntimeError("no such file")


def nothing(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def wrong_plate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def no_plate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def discrete(y):
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def twice(y):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(0.0, 1.0))


def subsampled(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def hidden_noise(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z + torch.randn(()), 1.0), obs=y)


def moving_support(y):
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("w", dist.Uniform(0.0, z))


def support_moves_with_parameter(y):
    top = pyro.param("top", torch.tensor(10.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Uniform(0.0, top))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def given_subsample(y):
    with pyro.plate("rows", 10, subsample=torch.arange(3)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def zero_scale(y):
    sd = pyro.param("sd", torch.tensor(0.0), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0 + sd), obs=y)


def certain_probability(y):
    p = pyro.param("p", torch.tensor(1.0), constraint=dist.constraints.unit_interval)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(p, 1.0), obs=y)


def changing(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0.05:
        pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def vanishing(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > -2.0:  # as it is wherever the prototype runs
        pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def appearing(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    if z < -2.0:  # nowhere where the prototype runs
        pyro.sample("seen", dist.Normal(z, 1.0), obs=torch.zeros(()))


class Own(dist.Normal):
    """A caller's distribution whose quantiles are another function's."""

    def icdf(self, value, tail):
        return super().icdf(value)


def test_a_prior_whose_quantiles_fail_is_drawn(fit):
    def model(y):
        z = pyro.sample("z", Own(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert fit(model, {"y": torch.tensor(1.0)}).converged


def negative_scale(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, -1.0), obs=y)


def improper(y):
    b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def integer_parameter(y):
    mu = pyro.param("mu", torch.tensor(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def nan_parameter(y):
    mu = pyro.param("mu", torch.tensor(float("nan")))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def point(y):
    pyro.sample("z", dist.Delta(torch.tensor(1.0)))


def logits(y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=b), obs=y)


CASES = {
    "model raises": (raising, Y, vem.ModelError, ["at or after 'z'", "RuntimeError", "no such file"]),
    "nothing to fit": (nothing, Y, vem.ModelError, ["neither latent sites nor parameters", "obs="]),
    "wrong plate size": (wrong_plate, Y, vem.ModelError, ["'y'", "'rows'", "5", "3"]),
    "no plate": (no_plate, Y, vem.ModelError, ["'y'", "pyro.plate", "to_event"]),
    "discrete latent": (discrete, Y, vem.UnsupportedModelError, ["'k'", "Bernoulli", "sum it out"]),
    "point": (point, Y, vem.UnsupportedModelError, ["'z'", "Delta", "pyro.deterministic"]),
    "whole numbers": (logits, Y.long().clamp(0, 1), vem.ModelError, ["'y'", "floating numbers"]),
    "booleans": (logits, Y > 0, vem.ModelError, ["'y'", "floating numbers"]),
    "site twice": (twice, Y, vem.ModelError, ["'z'", "twice"]),
    "subsample": (subsampled, Y, vem.UnsupportedModelError, ["'rows'", "batch_size="]),
    "given subsample": (given_subsample, Y, vem.UnsupportedModelError, ["'rows'", "batch_size="]),
    "support by parameter": (
        support_moves_with_parameter,
        Y,
        vem.UnsupportedModelError,
        ["'z'", "pyro.deterministic"],
    ),
    "parameter on the edge": (zero_scale, Y, vem.ModelError, ["'sd'", "edge", "inside"]),
    "parameter on a closed edge": (certain_probability, Y, vem.ModelError, ["'p'", "edge"]),
    "hidden noise": (hidden_noise, Y, vem.UnsupportedModelError, ["'y'", "no pyro.sample site"]),
    "moving support": (moving_support, Y, vem.UnsupportedModelError, ["'w'", "pyro.deterministic"]),
    "changing structure": (changing, Y, vem.UnsupportedModelError, ["'w'", "some runs"]),
    "vanishing site": (vanishing, Y, vem.UnsupportedModelError, ["'w'", "some runs"]),
    "appearing data": (appearing, Y, vem.UnsupportedModelError, ["'seen'", "some runs"]),
    "negative scale": (negative_scale, Y, vem.ModelError, ["at or after 'rows'", "scale"]),
    "NaN data": (rows, Y * float("nan"), vem.ModelError, ["'y'", "NaN"]),
    "infinite data": (rows, torch.tensor([1.0, float("inf")]), vem.ModelError, ["'y'", "infinite"]),
    "no initial value": (improper, Y, vem.ModelError, ["'b'", "init={'b'"]),
    "integer parameter": (integer_parameter, Y, vem.ModelError, ["'mu'", "floating value"]),
    "NaN parameter": (nan_parameter, Y, vem.ModelError, ["'mu'", "non-finite"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_models_name_the_site(fit, global_state, case):
    model, y, error, words = CASES[case]
    snapshot, same = global_state
    before = snapshot()
    with pytest.raises(error) as caught:
        fit(model, {"y": y})
    for word in words:
        assert word in str(caught.value), str(caught.value)
    same(before)


SETTINGS = {
    "data": ({"data": {"yy": Y}}, vem.ModelError, "did you mean 'y'"),
    "missing": ({"data": {}}, vem.ModelError, "missing a required argument"),
    "one array": ({"data": Y}, vem.ModelError, "mapping"),
    "list": ({"data": {"y": [1.0, 2.0, 4.0]}}, vem.ModelError, "'y': its value is a list: give an array"),
    "strings": ({"data": {"y": np.array(["a", "b"])}}, vem.ModelError, "factorize"),
    "loader": (
        {"data": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(Y))},
        vem.ModelError,
        "yield mappings",
    ),
    "init name": ({"init": {"zz": torch.zeros(3)}}, vem.ModelError, "did you mean 'z'"),
    "init shape": ({"init": {"z": torch.zeros(2)}}, vem.ModelError, "shape"),
    "init kind": ({"init": 3}, vem.ModelError, "init_to_median"),
    "guide class": ({"guide": AutoNormal}, vem.ModelError, "AutoNormal(model)"),
    "guide kind": ({"guide": 3}, vem.ModelError, "MeanFieldNormal"),
    "guide without z": ({"guide": lambda y: None}, vem.ModelError, "'z' is latent in the model"),
    "schedule": ({"schedule": "both"}, ValueError, "'alternate'"),
    "e_step": ({"e_step": "adam"}, ValueError, "'newton'"),
    "tol": ({"tol": 0.0}, ValueError, "positive"),
    "max_iter": ({"max_iter": 0}, ValueError, "at least one"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_say_what_to_type(case):
    settings, error, words = SETTINGS[case]
    unchecked = inspect.unwrap(vem.fit_vem)  # without the type checker of the tests
    with pytest.raises(error) as caught:
        unchecked(rows, **{"data": {"y": Y}, **settings})
    assert words in str(caught.value), str(caught.value)


def test_lists_that_the_model_computes_with_are_named(fit):
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match="data 'x' are lists: give arrays"):
        fit(model, {"x": [1.0, 2.0, 3.0], "y": Y})


def test_lists_may_say_how_the_model_is_built(fit):
    def model(sizes, y):
        groups = [pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)).expand(n) for i, n in enumerate(sizes)]
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.cat(groups), 1.0), obs=y)

    assert fit(model, {"sizes": [1, 2], "y": Y}).converged


def test_a_data_frame_is_its_columns(fit):
    """In one step, in batches, and for new rows."""

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    frame = pd.DataFrame({"x": np.arange(8.0), "y": np.arange(8.0)})
    found = fit(model, frame)
    assert found.elbo == fit(model, {"x": frame["x"], "y": frame["y"]}).elbo
    assert found.predict(frame[["x"]], num_draws=2)["y"].shape == (2, 8)
    assert fit(model, frame, batch_size=4, max_iter=2).params == {}
    with pytest.raises(vem.ModelError, match="unknown name 'w'"):
        fit(model, frame.assign(w=1.0))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="even number"):
        vem.FitOptions(num_draws=33)
    with pytest.raises(ValueError, match="step_iterations"):
        vem.FitOptions(step_iterations=0)


def test_trace_elbo_is_refused():
    with pytest.raises(ValueError, match="takes an AnalyticKL_ELBO"):
        inspect.unwrap(vem.fit_vem)(rows, {"y": Y}, elbo=pyro.infer.Trace_ELBO())


def test_init_outside_the_support_names_the_site(fit):
    with pytest.raises(vem.ModelError, match=r"'rate'.*support"):
        fit(zoo.pumps, zoo.PUMPS, init={"rate": -torch.ones(10)})
    with pytest.raises(vem.ModelError, match=r"'tau'.*constraint"):
        fit(zoo.pumps, zoo.PUMPS, init={"tau": torch.tensor(-1.0)})


@pytest.mark.parametrize("argument", ["map_sites", "fixed"])
def test_unknown_roles_have_close_matches(fit, argument):
    model = vem.vem_model(**{argument: ("rates",)})(lambda hours, failures: zoo.pumps(hours, failures))
    with pytest.raises(vem.ModelError, match=rf"{argument}.*'rates'"):
        fit(model, zoo.PUMPS)
    close = {"map_sites": "rte", "fixed": "taw"}[argument]
    model = vem.vem_model(**{argument: (close,)})(lambda hours, failures: zoo.pumps(hours, failures))
    with pytest.raises(vem.ModelError, match=r"did you mean '(rate|tau)'"):
        fit(model, zoo.PUMPS)


def test_a_parameter_shared_with_the_guide_is_refused(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(mu, 1.0))

    with pytest.raises(vem.ModelError, match="'mu' is used by both model and guide"):
        fit(model, {"y": Y}, guide=guide)


def test_a_module_shared_with_the_guide_is_refused(fit):
    net = nn.Linear(1, 1)

    def model(y):
        pyro.module("decoder", net)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    def guide(y):
        pyro.module("encoder", net)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(net(y.unsqueeze(-1)).squeeze(-1), 1.0))

    with pytest.raises(vem.ModelError, match=r"'decoder\$\$\$.*both model and guide"):
        fit(model, {"y": Y}, guide=guide)


def test_a_module_shared_with_a_guide_module_is_refused_before_it_is_copied(fit):
    net = nn.Linear(1, 1)

    def model(y):
        pyro.module("decoder", net)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, y):
            pyro.module("encoder", self.net)
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(self.net(y.unsqueeze(-1)).squeeze(-1), 1.0))

    with pytest.raises(vem.ModelError, match=r"'decoder\$\$\$.*both model and guide"):
        fit(model, {"y": Y}, guide=Guide())


def test_a_parameter_without_effect_is_held_and_noted(fit):
    def model(y):
        scale = pyro.param("unused", torch.tensor(2.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("scaled", scale * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = fit(model, {"y": Y})
    assert result.converged
    assert float(result.params["unused"]) == 2.0
    assert any("unused" in note for note in result.plan.notes)


def test_a_likelihood_spike_ends_in_a_status(fit):
    def model(y):
        loc = pyro.param("loc", torch.tensor([1.0, 10.0]))
        sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample(
                "y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, sd)), obs=y
            )

    with pytest.warns(UserWarning, match="'sd' has run away"):
        result = fit(model, {"y": torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])})
    assert result.status is vem.Status.diverged


def test_an_unregistered_module_is_refused(fit):
    net = nn.Linear(1, 1)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    with pytest.raises(vem.ModelError, match=r"'weight'.*pyro.module"):
        fit(model, {"y": Y})
    net.requires_grad_(False)
    assert fit(model, {"y": Y}).converged


def test_a_closed_over_float32_tensor_gets_a_hint(fit):
    x = torch.ones(3, 2)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match="pass float32 tensors"):
        fit(model, {"y": Y})


def test_a_state_that_is_written_over_gets_a_remedy(fit):
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        h = torch.zeros(len(y))
        for t in range(1, len(y)):
            h[t] = a * h[t - 1] + y[t - 1]
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(h, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match=r"in a list, and put them together by torch\.stack"):
        fit(model, {"y": torch.arange(6.0)})


def test_no_observed_site_fits_the_prior_and_says_so(fit):
    def model(y=None):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(2.0, 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"no observed site.*obs="):
        result = fit(model)
    assert torch.allclose(result.guide_params["guide.loc.z"], torch.full((3,), 2.0).double(), atol=1e-3)


def test_a_runaway_fit_says_which_site(fit):
    def model(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, sd), obs=y)

    with pytest.warns(UserWarning, match="'sd' has run away"):
        result = fit(model, {"y": torch.zeros(3)})
    assert result.status is vem.Status.diverged
    assert not result.converged


def test_several_factors_with_large_correlations_have_not_run_away(fit):
    """Beside the diagonal a Cholesky factor is real, also where a parameter holds one for each kind."""

    def model(y):
        several = dist.constraints.independent(dist.constraints.lower_cholesky, 1)
        tril = pyro.param("tril", torch.eye(2).repeat(2, 1, 1), constraint=several)
        with pyro.plate("kinds", 2), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=y)

    noise = torch.randn(50, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.stack([noise[..., 0], 300 * noise[..., 0] + noise[..., 1]], -1)
    result = fit(model, {"y": y})
    assert result.status is vem.Status.converged
    expected = torch.linalg.cholesky(torch.einsum("nki,nkj->kij", y, y) / len(y))
    assert torch.allclose(result.params["tril"], expected, rtol=1e-4)


def test_guide_sites_are_checked(fit):
    def extra(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(vem.ModelError, match=r"'other' of the guide does not exist.*is_auxiliary"):
        fit(rows, {"y": Y}, guide=extra)

    def sampled(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(vem.ModelError, match="'y' of the guide is observed"):
        fit(rows, {"y": Y}, guide=sampled)

    def rejecting(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.VonMises(pyro.param("m", torch.zeros(3)), 1.0))

    with pytest.raises(vem.UnsupportedModelError, match="'z'"):
        fit(rows, {"y": Y}, guide=rejecting)
