"""What a fit returns: results as Pyro programs, files, ArviZ data, NUTS beside it, and its verdict."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.infer import MCMC, NUTS, Predictive
from torch.distributions import constraints

import pyro_vem as vem

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def schools():
    return vem.fit_vem(zoo.eight_schools, zoo.SCHOOLS, progress=False)


@pytest.fixture(scope="module")
def pumps():
    return vem.fit_vem(zoo.pumps, zoo.PUMPS, progress=False)


def test_a_result_is_frozen_and_prints_a_card(schools, pumps):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schools.elbo = 0.0
    card = str(pumps)
    for part in ("converged", "ELBO", "k-hat", "mu = ", "tau = ", "exact", "rate", "verdict"):
        assert part in card, card
    assert "GOOD" in card
    assert schools.converged
    assert "predicted remaining gain" in schools.stop_reason
    assert schools.history[-1].gain >= -1e-8
    assert schools.seconds > 0


def test_the_verdict_of_eight_schools_points_at_tau(schools):
    verdict = schools.diagnose()
    assert verdict.khat < 0.7
    assert verdict.verdict is vem.Verdict.USE_WITH_CORRECTION
    assert "'tau'" in verdict.reasons[0]
    assert verdict.elbo == pytest.approx(zoo.SCHOOLS_BEST_ELBO, abs=0.05)


def test_a_bad_fit_is_called_unreliable(fit):
    def banana():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 1):
            pyro.sample("y", dist.Normal(x**2, 0.01), obs=torch.ones(1) * 2.0)

    result = fit(banana)  # two modes: one is found
    verdict = result.diagnose()
    assert verdict.verdict is not vem.Verdict.GOOD or verdict.khat < 0.7

    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 9):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(funnel)
    verdict = result.diagnose()
    assert verdict.verdict is vem.Verdict.UNRELIABLE
    assert "k-hat" in verdict.reasons[0]


def test_an_unfinished_fit_is_unreliable(fit):
    result = fit(zoo.pumps, zoo.PUMPS, max_iter=1)
    assert result.status is vem.Status.max_iterations
    assert result.diagnose(num_draws=500).verdict is vem.Verdict.UNRELIABLE
    assert "max_iterations" in str(result)


def test_model_and_guide_are_plain_pyro(pumps):
    assert not list(pyro.get_param_store())
    prior = Predictive(pumps.model, num_samples=2000)(zoo.PUMP_HOURS)
    log_rate = prior["rate"].log()
    assert float(log_rate.mean()) == pytest.approx(float(pumps.params["mu"]), abs=0.05)
    assert float(log_rate.std()) == pytest.approx(float(pumps.params["tau"]), abs=0.05)
    posterior = Predictive(pumps.model, guide=pumps.guide, num_samples=2000)(zoo.PUMP_HOURS)
    assert torch.allclose(posterior["failures"].mean(0), zoo.PUMP_FAILURES.double(), rtol=0.4, atol=1.0)
    mcmc = MCMC(NUTS(pumps.model), 100, warmup_steps=100, disable_progbar=True)
    mcmc.run(zoo.PUMP_HOURS, zoo.PUMP_FAILURES)
    assert mcmc.get_samples()["rate"].shape == (100, 10)
    assert not list(pyro.get_param_store())


def test_samples_have_the_moments_of_the_guide(pumps):
    draws = pumps.sample(20_000, seed=3)["rate"]
    loc, scale = pumps.guide_params["guide.loc.rate"], pumps.guide_params["guide.scale.rate"]
    assert torch.allclose(draws.log().mean(0), loc, atol=0.03)
    assert torch.allclose(draws.log().std(0), scale, rtol=0.03)
    assert torch.equal(pumps.sample(5, seed=3)["rate"], pumps.sample(5, seed=3)["rate"])
    with pytest.raises(ValueError, match="at least one"):
        pumps.sample(0)


def test_warm_start_needs_few_evaluations(fit, pumps):
    again = fit(zoo.pumps, zoo.PUMPS, init=pumps)
    assert again.converged
    assert again.n_iter < pumps.n_iter
    assert float(again.params["tau"]) == pytest.approx(float(pumps.params["tau"]), abs=1e-4)

    def improper(y):
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    first = fit(improper, {"y": torch.ones(3)}, init={"b": 0.0})
    assert fit(improper, {"y": torch.ones(3)}, init=first).converged


@pytest.mark.parametrize("num_starts", [1, 2])
def test_warm_starts_hold_parameters_where_they_were_left(fit, pumps, num_starts):
    """Not where the model's statements start them."""

    @vem.vem_model(fixed=("mu",))
    def held(hours, failures):
        zoo.pumps(hours, failures)

    found = fit(held, zoo.PUMPS, init=pumps, num_starts=num_starts)
    assert torch.equal(found.params["mu"], pumps.params["mu"])
    assert float(found.params["tau"]) == pytest.approx(float(pumps.params["tau"]), rel=1e-4)


def test_callbacks_and_interruption(fit):
    seen = []

    def watch(step, params):
        seen.append((step.block, float(params["tau"])))
        if len(seen) == 4:
            raise KeyboardInterrupt

    result = fit(zoo.pumps, zoo.PUMPS, callbacks=[watch])
    assert [block for block, _ in seen] == ["start", "E", "M", "E"]
    assert result.status is vem.Status.interrupted
    assert len(result.history) == 4
    assert float(result.params["tau"]) == seen[-1][1]


def test_the_first_callback_may_interrupt(fit):
    def stop(step, params):
        raise KeyboardInterrupt

    result = fit(zoo.pumps, zoo.PUMPS, callbacks=[stop])
    assert result.status is vem.Status.interrupted
    assert [row.block for row in result.history] == ["start"]


def test_a_singular_matrix_is_not_stepped_to(fit):
    """A curve without noise: the noise goes to zero, and with it what keeps the covariance regular."""
    x = torch.linspace(0.0, 3.0, 12, dtype=torch.float64)

    def curve(y):
        length = pyro.param("length", torch.tensor(1.0), constraint=constraints.positive)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        covariance = torch.exp(-((x[:, None] - x) ** 2) / (2 * length**2))
        covariance = covariance + noise**2 * torch.eye(12)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(12), covariance), obs=y)

    result = fit(curve, {"y": x.sin()}, max_iter=30)
    assert not result.converged
    assert result.elbo > 40
    assert float(result.params["noise"]) < 1e-4


def test_a_grid_that_meets_a_singular_matrix_gives_way_to_draws(fit):
    x = torch.linspace(0.0, 3.0, 12, dtype=torch.float64)

    def curve(y):
        length = pyro.sample("length", dist.LogNormal(0.0, 2.0))
        noise = pyro.sample("noise", dist.LogNormal(-3.0, 1.0))
        covariance = torch.exp(-((x[:, None] - x) ** 2) / (2 * length**2))
        covariance = covariance + noise**2 * torch.eye(12)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(12), covariance), obs=y)

    wave = x.sin() + 0.1 * torch.cos(40 * x)
    assert fit(curve, {"y": wave}).converged


def test_progress_bar_is_shown_on_request(capsys):
    vem.fit_vem(zoo.pumps, zoo.PUMPS, progress=True, max_iter=2)
    assert "ELBO" in capsys.readouterr().err
    vem.fit_vem(zoo.pumps, zoo.PUMPS, max_iter=2)  # no terminal here
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
def test_both_optimisers_reach_the_same_point(fit, pumps, method):
    result = fit(zoo.pumps, zoo.PUMPS, e_step=method, m_step=method)
    assert result.converged
    assert float(result.params["tau"]) == pytest.approx(float(pumps.params["tau"]), abs=1e-3)


def test_joint_schedule_reaches_the_same_point_in_fewer_rounds(fit, pumps):
    result = fit(zoo.pumps, zoo.PUMPS, schedule="joint")
    assert result.converged
    assert result.n_iter < pumps.n_iter
    assert float(result.params["tau"]) == pytest.approx(float(pumps.params["tau"]), abs=1e-3)
    assert {row.block for row in result.history} == {"start", "joint"}


def test_saving_and_loading(tmp_path, schools):
    path = tmp_path / "fit.safetensors"
    schools.save(path)
    back = vem.VEMResult.load(path, zoo.eight_schools, zoo.SCHOOLS)
    assert torch.equal(back.sample(50)["theta"], schools.sample(50)["theta"])
    assert back.history == schools.history
    assert back.terms == schools.terms
    assert back.plan == schools.plan
    assert (back.elbo, back.status, back.seed) == (schools.elbo, schools.status, schools.seed)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]
    bare = vem.VEMResult.load(path, zoo.eight_schools)
    assert torch.equal(bare.guide_params["guide.loc.t"], schools.guide_params["guide.loc.t"])
    with pytest.raises(vem.ModelError, match="loaded without data"):
        bare.sample(3)
    assert "converged" in str(bare)


@pytest.mark.parametrize("guide", [None, "auto"])
def test_a_result_is_copied_but_not_pickled(fit, guide, tmp_path):
    """Nothing is kept of the runs that were made under vmap, whose tensors have no storage."""
    found = fit(zoo.eight_schools, zoo.SCHOOLS, guide=guide)
    for _ in range(2):
        for twin in (copy.copy(found), copy.deepcopy(found)):
            assert twin.elbo == found.elbo
            assert torch.equal(twin.sample(3)["tau"], found.sample(3)["tau"])
        found.diagnose()  # keeps results of its own
    with pytest.raises(TypeError, match=r"fit.save\(path\).*VEMResult.load\(path"):
        pickle.dumps(found)
    found.save(tmp_path / "fit.vem")
    alone = vem.VEMResult.load(
        tmp_path / "fit.vem", zoo.eight_schools
    )  # without data, and so without a model
    assert pickle.loads(pickle.dumps(alone)).elbo == found.elbo


def test_loading_refuses_what_is_no_result(tmp_path, schools):
    path = tmp_path / "fit.safetensors"
    schools.save(path)
    with pytest.raises(vem.ModelError, match=r"does not fit this model.*unknown name"):
        vem.VEMResult.load(path, zoo.normal_mean, {"y": torch.ones(3)})
    (tmp_path / "text").write_text("not a result")
    with pytest.raises(vem.ModelError, match="not a saved"):
        vem.VEMResult.load(tmp_path / "text", zoo.eight_schools)
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(vem.ModelError, match="not a saved"):
        vem.VEMResult.load(tmp_path / "pickle", zoo.eight_schools)
    with pytest.raises(FileNotFoundError):
        vem.VEMResult.load(tmp_path / "missing", zoo.eight_schools)


def test_a_kill_while_saving_never_leaves_a_broken_file(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, "tests")
        import zoo, pyro_vem as vem
        fit = vem.fit_vem(zoo.normal_mean, {{"y": [1.0] and __import__("torch").ones(3)}}, progress=False)
        fit.save({str(tmp_path / "fit")!r})
        print("saving", flush=True)
        while True:
            fit.save({str(tmp_path / "fit")!r})
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout.readline() == "saving\n"
    time.sleep(0.3)
    child.kill()
    child.wait()
    child.stdout.close()
    back = vem.VEMResult.load(tmp_path / "fit", zoo.normal_mean, {"y": torch.ones(3)})
    assert back.converged


def test_compare_with_nuts(fit):
    y = torch.tensor([1.0, 2.0, 6.0])
    result = fit(zoo.normal_mean, {"y": y})
    comparison = result.compare_nuts(num_chains=2, num_samples=400, warmup_steps=200, progress=False)
    row = comparison.table.loc["z"]
    ess = row["ess_bulk"]
    assert abs(row["mean_diff_sd"]) < 5 * (1 / ess + 1 / 4000) ** 0.5
    assert row["sd_ratio"] == pytest.approx(1.0, abs=5 * (0.5 / ess + 0.5 / 4000) ** 0.5)
    assert row["r_hat"] < 1.05
    mean, sd, _ = zoo.normal_mean_exact(y)
    assert row["nuts_mean"] == pytest.approx(mean, abs=5 * sd / ess**0.5)
    assert comparison.seconds_nuts > 0
    assert "z" in repr(comparison)
    assert comparison.idata_nuts.posterior.sizes["chain"] == 2
    assert "diverging" in comparison.idata_nuts.sample_stats


def test_compare_with_draws_that_the_user_has(fit, schools):
    mcmc = MCMC(NUTS(zoo.eight_schools), 50, warmup_steps=50, disable_progbar=True)
    mcmc.run(**zoo.SCHOOLS)
    from_mcmc = schools.compare_nuts(posterior=mcmc)
    assert {"mu", "tau", "t[0]"} <= set(from_mcmc.table.index)
    again = schools.compare_nuts(posterior=from_mcmc.idata_nuts)
    assert again.table.equals(from_mcmc.table)
    other = fit(zoo.normal_mean, {"y": torch.ones(2)})
    with pytest.raises(vem.ModelError, match="have none of the fit's sites"):
        other.compare_nuts(posterior=from_mcmc.idata_nuts)


def test_nuts_holds_parameters_and_map_sites_at_their_estimates(fit):
    @vem.vem_model(map_sites=("sd",))
    def model(y):
        sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    result = fit(model, {"y": torch.tensor([1.0, 2.0, 4.0])})
    comparison = result.compare_nuts(num_chains=1, num_samples=200, warmup_steps=100, progress=False)
    assert "held at their estimates" in comparison.note
    assert set(comparison.idata_nuts.posterior.data_vars) == {"z"}
    assert float(comparison.table["mean_diff_sd"].abs().max()) < 0.5
    point = fit(vem.vem_model(map_sites=("sd", "z"))(inspectable(model)), {"y": torch.ones(3)})
    with pytest.raises(vem.ModelError, match="nothing to compare"):
        point.compare_nuts()


def inspectable(model):
    """The same model as a new object, so that other roles can be attached."""
    return lambda y: model(y)


def test_plots_take_and_return_axes(tmp_path, pumps):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert vem.plots.elbo(pumps, ax=ax) is ax
    assert vem.plots.elbo(pumps) is not ax
    comparison = pumps.compare_nuts(posterior=pumps.to_arviz(num_draws=100), num_draws=100)
    axes = vem.plots.forest(comparison)
    axes.figure.savefig(tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 5000
    plt.close("all")
