"""One fit by several processes is the fit by one: step for step, and after a worker has been lost."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from torch.distributions import constraints

import pyro_vem as vem

HERE = Path(__file__).parent


def _module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launch = _module("launch", HERE / "benchmarks" / "processes.py")
ranks = _module("ranks", HERE / "ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory, worker_id):
    """What two processes found; workers of one test run share it, as it takes them half a minute."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "ranks"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "found.json").exists():
            folder.mkdir(exist_ok=True)
            run = launch.launched(2, ranks.ROWS, str(folder), script=HERE / "ranks.py")
            errors = run.communicate(timeout=300)[1]
            assert run.returncode == 0, errors
    return {**json.loads((folder / "found.json").read_text()), "folder": folder}


def test_a_fit_on_draws_is_loaded_with_all_rows(found, fit):
    """The draws of the processes were their own: the bounds agree to their errors."""
    whole = vem.VEMResult.load(found["folder"] / "drawn.fit", ranks.waves, ranks.WAVES)
    alone = fit(ranks.waves, ranks.WAVES)
    assert "converged" in found["drawn"]["card"]
    assert found["drawn"]["se"] > 0
    error = (found["drawn"]["se"] ** 2 + alone.elbo_se**2) ** 0.5
    assert whole.elbo == pytest.approx(alone.elbo, abs=5 * error)
    assert whole.diagnose().khat > -10


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _rising(trace):
    """The steps before the bound stands still: how many follow there is a matter of rounding."""
    end = trace[-1][1]
    return [step for step in trace if abs(step[1] - end) > 1e-12 * abs(end)]


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_take_the_steps_of_one(found, one_process, name):
    expected, here = ranks.fitted(name, 0, 1), found[name]
    assert here["status"] == expected["status"] == "converged"
    assert here["elbo"] == pytest.approx(expected["elbo"], rel=1e-9)
    assert here["terms"] == pytest.approx(expected["terms"], rel=1e-6, abs=1e-6)
    steps, bounds = zip(*_rising(expected["trace"]), strict=True)
    same_steps, same_bounds = zip(*_rising(here["trace"]), strict=True)
    assert same_steps == steps
    assert same_bounds == pytest.approx(bounds, rel=1e-9)
    assert here["trace"][-1][1] == pytest.approx(expected["trace"][-1][1], rel=1e-9)
    assert here["values"].keys() == expected["values"].keys()
    for key, value in expected["values"].items():
        assert here["values"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "unknown name 'row'.*'?rows"),
        ("outside", "'total' is in none of the plates rows"),
        ("shapes", r"'z' has shape \(50,\) in process 0 and \(51,\) in process 1.*name its plate"),
        ("guide", "takes our guides only, not AutoNormal"),
        ("plates", r"rows are in plate rows, which FitOptions\(sharded=\) does not name"),
        ("groups", "guide.loc.z, guide.scale.z belong to a plate .* not over the rows of batches"),
        ("validation", "validation= is missing in some processes"),
        ("starts", "one fit from one start"),
        ("forms", "closed form of 'y' differs between processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(found, case, message):
    assert re.search(message, found["refused"][case]), found["refused"][case]


@pytest.mark.parametrize("name", ranks.TRAINED)
def test_batches_of_two_processes_have_the_answer_of_one(found, one_process, name):
    """Each takes batches of its own rows; a step is from all of them."""
    expected, here = ranks.trained(name, 0, 1), found["trained"][name]
    assert here["agree"]  # bit for bit, in both processes
    if name == "held out":  # half as many steps
        assert here["elbo"] > expected["first"] + 500
        assert "steps traced" in "".join(here["notes"])
    else:
        error = (here["se"] ** 2 + expected["se"] ** 2) ** 0.5
        assert here["elbo"] == pytest.approx(expected["elbo"], abs=5 * error)
        for key, value in expected["values"].items():
            assert here["values"][key] == pytest.approx(value, rel=0.1, abs=0.02), key


def test_no_thread_outlives_the_process_group(found):
    """Where one does, a process in dozens aborts as it ends."""
    assert not [name for name in found["threads"] if "gloo" in name]


def test_gradients_of_two_processes_add_up(found, one_process):
    assert found["gradient"] == pytest.approx(ranks.gradient(0, 1), rel=1e-10)


def test_streams_of_different_lengths_are_all_seen(found):
    """The shorter one begins again: the fit of the rows that come first would have another mean."""
    assert found["uneven"]["mean"] == pytest.approx(float(ranks.TRENDED.mean()), abs=0.05)
    assert found["uneven"]["sd"] == pytest.approx(float(ranks.TRENDED.std(correction=0)), rel=0.05)


def test_a_prior_counts_once_in_batches_of_two_processes(found):
    """Against the exact posterior, which a prior that counted twice would narrow by a seventh."""
    x, y = ranks.TIGHT["x"], ranks.TIGHT["y"]
    precision = x.T @ x + torch.eye(3) / 0.1**2
    mean, sd = torch.linalg.solve(precision, x.T @ y), precision.diagonal().rsqrt()
    values = found["trained"]["tight"]["values"]
    assert values["guide.scale.b"] == pytest.approx(sd.tolist(), rel=0.05)
    assert values["guide.loc.b"] == pytest.approx(mean.tolist(), abs=0.1 * float(sd.min()))


def test_sharing_needs_an_initialised_group(fit):
    model, data, *_ = ranks.CASES["robust"]
    with pytest.raises(vem.ModelError, match="init_process_group"):
        fit(model, data, options=vem.FitOptions(sharded=("rows",)))


def test_a_fit_that_loses_a_worker_ends_where_it_would_have(tmp_path, fit):
    groups = _module("groups", HERE.parent / "tutorials" / "groups.py")
    printed = launch.interrupted(2, 4000, str(tmp_path))
    assert re.search("2 processes, 1 restarts: converged", printed), printed
    assert not (tmp_path / "groups.checkpoint").exists()
    x, y = groups.simulated(4000)
    whole = vem.VEMResult.load(tmp_path / "groups.fit", groups.counts, {"x": x, "y": y})
    alone = fit(groups.counts, {"x": x, "y": y})
    assert whole.elbo == pytest.approx(alone.elbo, rel=1e-9)
    torch.testing.assert_close(whole.params["sd"], alone.params["sd"], rtol=1e-6, atol=0)
    assert "went on from a checkpoint" in "".join(whole.plan.notes)
    assert whole.status is vem.Status.converged
    assert whole.sample(3)["u"].shape == (3, 4000, 1)  # all rows are there


class Stopped(Exception):
    """An interruption that no one catches."""


def _stop(step, params):
    if step.iteration == 3:
        raise Stopped


def _interrupted(fit, path):
    """A model, its data, and what a fit of them has left at a path."""
    model, data, *_ = ranks.CASES["counts"]
    model = vem.vem_model(model)
    with pytest.raises(Stopped):
        fit(model, data, checkpoint=path, callbacks=[_stop])
    return model, data, vem.VEMResult.load(path, model)


def test_an_interrupted_fit_goes_on_from_its_checkpoint(tmp_path, fit):
    path = tmp_path / "fit.checkpoint"
    model, data, left = _interrupted(fit, path)
    again, alone = fit(model, data, checkpoint=path), fit(model, data)
    assert left.elbo < alone.elbo - 1e-3  # it had not arrived
    assert again.n_iter < alone.n_iter
    assert again.elbo == pytest.approx(alone.elbo, abs=1e-6)
    assert not path.exists()


def test_a_checkpoint_keeps_what_the_caller_holds(tmp_path, fit):
    """Held parameters are no state of the fit: they are what the call says again."""

    @vem.vem_model(fixed=("between",))
    def model(y):
        between = pyro.param("between", torch.tensor(1.0), constraint=constraints.positive)
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, between))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    data, path = {"y": torch.tensor([1.0, 2.0, 4.0])}, tmp_path / "fit.checkpoint"
    settings = {"checkpoint": path, "init": {"between": torch.tensor(1.5)}}
    with pytest.raises(Stopped):
        fit(model, data, callbacks=[_stop], **settings)
    again = fit(model, data, **settings)
    assert "went on from a checkpoint" in "".join(again.plan.notes)
    assert float(again.params["between"]) == 1.5


def test_one_process_goes_on_from_the_checkpoint_of_several(tmp_path, fit):
    """Which do not mark it with their data: rows may be shared out anew."""
    path = tmp_path / "fit.checkpoint"
    model, data, left = _interrupted(fit, path)
    notes = tuple(note for note in left.plan.notes if not note.startswith("checkpoint of data"))
    replace(left, plan=replace(left.plan, notes=notes)).save(path)
    assert "went on from a checkpoint" in "".join(fit(model, data, checkpoint=path).plan.notes)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, fit):
    path = tmp_path / "fit.checkpoint"
    with pytest.raises(Stopped):
        fit(vem.vem_model(ranks.counts), ranks.CASES["counts"][1], checkpoint=path, callbacks=[_stop])
    with pytest.raises(
        vem.ModelError, match=r"is of another fit: its 'guide\.loc\.b' has shape \(2,\), here None"
    ):
        fit(ranks.robust, ranks.CASES["robust"][1], checkpoint=path)
    assert path.exists()
