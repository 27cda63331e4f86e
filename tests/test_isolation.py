"""A fit leaves no trace: blocks, global state, seeds, other fits."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from torch import nn

import pyro_vem as vem
from pyro_vem.fit.state import State

ROOT = Path(__file__).parent.parent


def saturated(y):
    """A likelihood that is sampled, with a parameter."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(3.0, 4 * torch.tanh(z / 4), scale), obs=y)


def test_each_step_leaves_the_other_block_bitwise_unchanged(fit, monkeypatch):
    from pyro_vem.fit import run

    original, seen = run.step, []

    def watched(setup, state, block, scale, **kwargs):
        phi, theta = state.phi.copy(), state.theta.copy()
        new, *rest = original(setup, state, block, scale, **kwargs)
        assert np.array_equal(state.phi, phi)  # a state is never changed in place
        assert np.array_equal(state.theta, theta)
        same_phi, same_theta = np.array_equal(new.phi, phi), np.array_equal(new.theta, theta)
        seen.append((block, same_phi, same_theta))
        assert isinstance(new, State)
        return new, *rest

    monkeypatch.setattr(run, "step", watched)
    fit(zoo.pumps, zoo.PUMPS)
    assert ("E", False, True) in seen  # phi moved, theta did not
    assert ("M", True, False) in seen
    assert all(same_theta for block, _, same_theta in seen if block == "E")
    assert all(same_phi for block, same_phi, _ in seen if block == "M")


def test_global_state_is_untouched_by_a_fit(fit, global_state):
    snapshot, same = global_state
    pyro.param("mine", torch.tensor(3.0))
    pyro.enable_validation(False)
    torch.set_default_dtype(torch.float32)
    before = snapshot()
    result = fit(zoo.pumps, zoo.PUMPS)
    result.diagnose(num_draws=500)
    result.sample(10)
    result.to_arviz(num_draws=50)
    same(before)
    pyro.enable_validation(True)


def test_python_and_numpy_generators_are_untouched():
    # in a process of its own: the type checker of the tests itself draws from `random`
    code = """
        import random, sys, warnings
        import numpy as np
        sys.path.insert(0, "tests")
        import zoo, pyro_vem
        random.seed(5)
        np.random.seed(5)
        before = np.random.get_state()[1].copy(), random.getstate()
        fit = pyro_vem.fit_vem(zoo.pumps, zoo.PUMPS, progress=False, max_iter=2)
        fit.sample(10)
        assert np.array_equal(np.random.get_state()[1], before[0])
        assert random.getstate() == before[1]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


@pytest.mark.parametrize("when", ["at once", "at the third run", "in a callback"])
def test_global_state_is_untouched_by_an_exception(fit, global_state, when):
    snapshot, same = global_state
    pyro.param("mine", torch.tensor(3.0))
    runs = []

    def model():
        runs.append(1)
        if when == "at once" or (when == "at the third run" and len(runs) == 3):
            raise RuntimeError("boom")
        zoo.pumps(zoo.PUMP_HOURS, zoo.PUMP_FAILURES)

    def callback(step, params):
        if when == "in a callback":
            raise RuntimeError("boom")

    before = snapshot()
    with pytest.raises((vem.ModelError, RuntimeError), match="boom"):
        fit(model, callbacks=[callback])
    same(before)


def test_handlers_of_the_caller_see_nothing(fit):
    with pyro.poutine.trace() as outer:
        fit(zoo.eight_schools, zoo.SCHOOLS, max_iter=1)
    assert list(outer.trace.nodes) in ([], ["_INPUT"], ["_INPUT", "_RETURN"])


def test_plates_of_the_caller_take_no_dimension(fit, global_state):
    snapshot, same = global_state
    plain = fit(zoo.pumps, zoo.PUMPS, max_iter=2)
    with pyro.plate("pump", 5) as rows:
        before = snapshot()
        there = fit(zoo.pumps, zoo.PUMPS, max_iter=2)
        same(before)
        assert pyro.sample("after", dist.Normal(0.0, 1.0)).shape == rows.shape
    assert there.elbo == plain.elbo


GRADIENTS = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", GRADIENTS)
@pytest.mark.parametrize("model", [zoo.random_effects, saturated])
def test_a_fit_sees_nothing_of_the_callers_gradient_mode(fit, global_state, mode, model):
    snapshot, same = global_state
    y = zoo.random_effects_data() if model is zoo.random_effects else torch.linspace(-3.0, 4.0, 12).double()
    plain = fit(model, {"y": y})
    with mode():
        before = snapshot()
        there = fit(model, {"y": y.clone()})  # in inference mode data that autograd keeps no part of
        same(before)
    assert there.status is plain.status
    assert there.elbo == plain.elbo


def test_tensors_of_inference_mode_in_a_closure_are_named(fit):
    with torch.inference_mode():
        x = torch.ones(3, dtype=torch.float64)

    def model():
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(scale * x, 1.0), obs=torch.ones(3))

    with pytest.raises(vem.ModelError, match="pass tensors of inference mode"):
        fit(model)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_results_see_nothing_of_the_callers_gradient_mode(fit, mode):
    def asked():
        result = fit(saturated, {"y": torch.linspace(-3.0, 4.0, 12)})
        rows = fit(zoo.random_effects, {"y": zoo.random_effects_data()})
        return [
            result.standard_errors()["scale"],
            result.standard_errors(plate="rows")["scale"],
            result.covariance().to_numpy(),
            result.sample(5, correction="linear_response")["z"],
            result.sample(5, correction="psis")["z"],
            result.log_likelihood()["y"],
            result.predict(num_draws=3)["y"],
            rows.infer({"y": zoo.random_effects_data() + 1}).elbo,
        ]

    plain = asked()
    with mode():
        there = asked()
    for one, other in zip(plain, there, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_modules_of_the_caller_are_untouched(fit):
    net = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.linspace(-1, 1, 20).unsqueeze(-1), torch.linspace(-1, 3, 20)

    def model(x, y):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.1), obs=y)

    result = fit(model, {"x": x, "y": y})
    assert result.converged
    assert float(result.params["net$$$weight"]) == pytest.approx(2.0, abs=1e-3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype is torch.float32


def test_buffers_of_the_caller_are_untouched(fit):
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.linspace(-1, 1, 20).unsqueeze(-1), torch.linspace(-1, 3, 20)

    def model(x, y):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.1), obs=y)

    result = fit(model, {"x": x, "y": y}, max_iter=2)
    result.model(x, y)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def steps(result):
    return [(row.block, row.before, row.after, row.gradient, row.evaluations, row.products)
            for row in result.history]  # fmt: skip


def test_same_seed_same_history_bit_for_bit(fit):
    first = fit(zoo.pumps, zoo.PUMPS, seed=4)
    torch.rand(7)  # the caller's generator does not matter
    second = fit(zoo.pumps, zoo.PUMPS, seed=4)
    other = fit(zoo.pumps, zoo.PUMPS, seed=5)
    assert steps(first) == steps(second)
    assert steps(first) != steps(other)
    assert torch.equal(first.params["tau"], second.params["tau"])
    assert first.elbo == second.elbo


def test_two_fits_do_not_see_each_other(fit):
    alone = fit(zoo.pumps, zoo.PUMPS)
    fit(zoo.pumps, {"hours": zoo.PUMP_HOURS, "failures": zoo.PUMP_FAILURES * 100})
    again = fit(zoo.pumps, zoo.PUMPS)
    assert steps(alone) == steps(again)


def test_the_bound_never_falls(fit):
    for result in (fit(zoo.pumps, zoo.PUMPS), fit(zoo.eight_schools, zoo.SCHOOLS)):
        for row in result.history:
            if row.block != "check":  # there the bound itself changes
                assert row.after >= row.before - 1e-9 * (1 + abs(row.before))


def test_import_has_no_side_effect_and_stays_light():
    code = """
        import sys, torch, pyro
        before = (torch.get_default_dtype(), torch.distributions.Distribution._validate_args,
                  pyro.settings.get(), torch.get_num_threads(), torch.initial_seed())
        import pyro_vem
        after = (torch.get_default_dtype(), torch.distributions.Distribution._validate_args,
                 pyro.settings.get(), torch.get_num_threads(), torch.initial_seed())
        assert before == after
        loaded = {"arviz", "matplotlib", "pandas"} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_optional_parts_are_reached_by_name():
    assert vem.plots.elbo
    assert vem.Diagnosis.__name__ == "Diagnosis"
    assert vem.Comparison.__name__ == "Comparison"
    assert {"plots", "Diagnosis", "Comparison"} <= set(dir(vem))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vem.nothing


def test_every_module_with_shapes_is_checked_in_tests():
    with open(ROOT / "pyproject.toml", "rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]["addopts"]
    (checked,) = [o.removeprefix("--jaxtyping-packages=") for o in options if o.startswith("--jaxtyping")]
    files = [p for p in (ROOT / "pyro_vem").rglob("*.py") if "from jaxtyping" in p.read_text()]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    assert modules == set(checked.split(",")) - {"beartype.beartype"}


def test_shapes_beyond_numpys_are_torchs_own():
    """NumPy's arrays end at 64 dimensions and 2^63 numbers; shapes of expanded tensors do not."""
    from pyro_vem.model.runtime import _broadcast_shapes

    assert _broadcast_shapes((2, 1), (3,)) == (2, 3)
    assert _broadcast_shapes((1,) * 70, (2,)) == (1,) * 69 + (2,)
    assert _broadcast_shapes((2**40, 1), (1, 2**40)) == (2**40, 2**40)
    with pytest.raises(RuntimeError, match="broadcast"):
        _broadcast_shapes((2,), (3,))
