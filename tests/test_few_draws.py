"""Fixed draws: few on the way, and all of them where a fit ends."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vem as vem
from pyro_vem.fit import capture as graphs
from pyro_vem.fit import costly, exactness, few
from pyro_vem.fit.checkpoint import Checkpoint
from pyro_vem.model.runtime import isolated


def scores(y):
    """Factor analysis: quadratic in the scores, which is exact on any matched draws."""
    start = torch.tensor([[1.0, -0.5, 0.3, 0.2], [0.1, 0.8, 0.5, -0.4]])
    w = pyro.param("w", start)
    sd = pyro.param("sd", torch.ones(4), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.MultivariateNormal(z @ w, scale_tril=sd.diag()), obs=y)  # with no slots


def bent(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(torch.tanh(z.prod(-1)), 0.5), obs=y[:, 0])


def factor_data():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return {"y": z @ w + 0.5 * torch.randn(40, 4, generator=generator, dtype=torch.float64)}


def drawn(result):
    (note,) = [note for note in result.plan.notes if "fixed draws" in note]
    return int(note.split()[0].replace(",", ""))


def test_quadratic_terms_take_few_draws_on_the_way(fit):
    result = fit(scores, factor_data())
    assert result.converged
    assert drawn(result) == 32
    assert result.setup.objective.num_draws == 256  # what comes after the fit has all of them
    more = fit(scores, factor_data(), options=vem.FitOptions(num_draws=1024))
    assert result.elbo == pytest.approx(more.elbo, abs=1e-6)


def test_their_bound_is_the_evidence_of_factors_that_are_known(fit):
    """One factor: the posterior of each score is Gaussian, so that the bound is the log likelihood."""
    y = factor_data()["y"]

    def model(y):
        w = pyro.param("w", torch.tensor([1.0, -0.5, 0.3, 0.2]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1) * w, 1.0).to_event(1), obs=y)

    result = fit(model, {"y": y})
    w = result.params["w"]
    cov = torch.eye(4, dtype=torch.float64) + w.unsqueeze(-1) * w
    evidence = dist.MultivariateNormal(torch.zeros(4, dtype=torch.float64), cov).log_prob(y).sum()
    assert result.elbo == pytest.approx(float(evidence), abs=1e-5)


def test_terms_that_are_no_polynomial_keep_their_draws(fit):
    result = fit(bent, {"y": factor_data()["y"][:6]}, max_iter=20, options=vem.FitOptions(compiled=False))
    assert drawn(result) >= 256


def test_history_has_the_draws_of_each_bound(fit):
    result = fit(scores, factor_data())
    assert {row.draws for row in result.history} == {32}
    z = torch.tensor([0.3, -0.8])

    def exact(y):
        pyro.sample(
            "y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand([2]).to_event(1), obs=y
        )

    assert {row.draws for row in fit(exact, {"y": z}).history} == {0}
    curve = vem.plots.elbo(result).lines[0].get_ydata()
    assert (curve[1:] <= curve[:-1] + 1e-9).all()


# -- terms that are not the same on few draws --


def mixture(y):
    """Five numbers: no grid, and no closed form of a log of a sum."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    weights = torch.stack([0.5 * weight, 0.5 * torch.ones_like(weight), 0.5 * (1 - weight)], -1)
    with pyro.plate("rows", len(y)):
        rows = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mean, sd))
        pyro.sample("y", rows, obs=y)


def mixture_em(y):
    """The same with parameters: an M-step beside the draws."""
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    weights = pyro.param("weights", torch.tensor([0.3, 0.4, 0.3]), constraint=dist.constraints.simplex)
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 3.0).to_event(1))
    ratio = pyro.sample("ratio", dist.LogNormal(0.0, 0.5))
    sds = sd * torch.stack([torch.ones_like(ratio), ratio, torch.ones_like(ratio)], -1)
    with pyro.plate("rows", len(y)):
        rows = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mean, sds))
        pyro.sample("y", rows, obs=y)


def mixture_data(rows=120):
    generator = torch.Generator().manual_seed(1)
    kind = torch.randint(0, 3, (rows,), generator=generator)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return {"y": torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)[kind] + 0.7 * noise}


def work(result, draws):
    rows = [row for row in result.history if row.draws == draws]
    return sum(row.evaluations + 2 * row.products for row in rows)


def on_all(fit, model, data, monkeypatch, **settings):
    """The same fit without few draws."""
    with monkeypatch.context() as patch:
        patch.setattr(few, "SHARE", 0.0)
        return fit(model, data, **settings)


def assert_same_optimum(found, wanted):
    assert found.converged
    assert wanted.converged
    assert found.setup.objective.num_draws == wanted.setup.objective.num_draws
    assert found.history[-1].after == pytest.approx(wanted.history[-1].after, abs=1e-7)
    assert found.elbo == pytest.approx(wanted.elbo, abs=1e-5)  # on the same fresh draws
    for name, value in {**wanted.guide_params, **wanted.params}.items():
        there = {**found.guide_params, **found.params}[name]
        assert torch.allclose(there, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "schedule"),
    [(mixture, "auto"), *((mixture_em, schedule) for schedule in ("auto", "joint", "alternate", "profile"))],
)
def test_fits_climb_on_few_draws_and_end_on_all(fit, monkeypatch, model, schedule):
    monkeypatch.setattr(exactness, "FEW_ERROR", 1e-12)  # sds: few draws are never enough
    found = fit(model, mixture_data(), schedule=schedule)
    wanted = on_all(fit, model, mixture_data(), monkeypatch, schedule=schedule)
    assert {row.draws for row in found.history} == {32, 256}
    assert {row.draws for row in wanted.history} == {256}
    assert_same_optimum(found, wanted)
    assert work(found, 256) + work(found, 32) / 8 < 0.7 * work(wanted, 256)


def test_history_tells_one_bound_from_the_other(fit):
    found = fit(mixture_em, mixture_data())
    rows = found.history
    for before, row in itertools.pairwise(rows):
        assert row.before == before.after
        if row.draws != before.draws:
            assert row.block == "check"
            assert "draws" in row.note
        else:
            assert row.gain >= -1e-9
    assert rows[-1].draws == 256
    objective = found.setup.objective
    with isolated(torch.float64), torch.no_grad():
        at_end = float(objective.value(found.guide_params, found.params))
    assert rows[-1].after == pytest.approx(at_end, abs=1e-9)
    gaps = vem.plots.elbo(found).lines[0].get_ydata()
    assert (gaps[1:] <= gaps[:-1] + 1e-6).all()  # the jumps between draws are no steps
    assert gaps[0] > 1


@pytest.mark.parametrize("reason", ["ran away", "gained nothing", "the bound rose by"])
def test_where_few_draws_lead_astray_a_fit_starts_again(fit, monkeypatch, reason):
    wanted = on_all(fit, mixture, mixture_data(), monkeypatch)
    monkeypatch.setattr(exactness, "FEW_ERROR", 1e-12)
    if reason == "ran away":
        monkeypatch.setattr(few, "runaway", lambda *args: "mean")
    elif reason == "gained nothing":
        monkeypatch.setattr(few.FewDraws, "_is_stuck", True)
    else:
        monkeypatch.setattr(few, "CONFIRMED", 1e3)
    found = fit(mixture, mixture_data())
    (row,) = [row for row in found.history if "from the start again" in row.note]
    assert reason in row.note
    assert row.draws == 256
    assert row.after == found.history[0].before
    assert_same_optimum(found, wanted)
    assert found.n_iter == wanted.n_iter + 1


def in_sds(found, wanted):
    """How far the factors of two fits are apart: means in sds, and logs of sds."""
    gaps = []
    for name, value in wanted.guide_params.items():
        there, sd = found.guide_params[name], wanted.guide_params[name.replace(".loc.", ".scale.")]
        gaps.append((there - value) / sd if ".loc." in name else (there / value).log())
    return max(float(gap.abs().max()) for gap in gaps)


def test_fits_end_on_few_draws_where_others_would_not_move_them(fit, monkeypatch, tmp_path):
    data, kept = mixture_data(2000), []
    wanted = on_all(fit, mixture, data, monkeypatch)
    save = Checkpoint.save

    def looked_at(self, make, is_last=False):
        save(self, make, is_last=True)
        kept.append(vem.VEMResult.load(tmp_path / "fit.safetensors", mixture, data))

    monkeypatch.setattr(Checkpoint, "save", looked_at)
    found = fit(mixture, data, checkpoint=tmp_path / "fit.safetensors")
    (row,) = [row for row in found.history if "draws are enough" in row.note]
    assert row.draws == 32
    assert {row.draws for row in found.history[:-1]} == {32}
    assert found.history[-1].draws == 256
    assert found.setup.objective.num_draws == 256
    assert {fit.history[-1].draws for fit in kept} == {256}
    assert sum("fixed draws: they move the optimum" in note for note in found.plan.notes) == 1
    assert in_sds(found, wanted) < 2 * exactness.FEW_ERROR
    assert found.elbo == pytest.approx(wanted.elbo, abs=1e-4)
    with isolated(torch.float64), torch.no_grad():
        at_end = float(found.setup.objective.value(found.guide_params, found.params))
    assert found.history[-1].after == pytest.approx(at_end, abs=1e-9)


def test_many_rows_of_few_latents_begin_at_their_mode(fit, monkeypatch):
    """Where the factors are almost those of the end, whatever the way from the start."""

    def robust(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        outlier = pyro.sample("outlier", dist.Beta(1.0, 9.0))
        weights = torch.stack([1 - outlier, outlier], -1)
        with pyro.plate("rows", len(y)):
            sds = dist.Normal((x @ w).unsqueeze(-1), torch.tensor([0.5, 5.0]))
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), sds), obs=y)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    y = x.sum(1) * 3 + torch.where(torch.arange(1000) % 10 == 0, 5 * noise[0], 0.5 * noise[1])
    found = fit(robust, {"x": x, "y": y})
    with monkeypatch.context() as patch:
        patch.setattr(costly, "COSTLY", 10**12)
        wanted = fit(robust, {"x": x, "y": y})
    start, first = (next(row for row in found.history if row.block == block) for block in ("start", "E"))
    way = wanted.history[-1].after - wanted.history[0].before
    assert start.after - start.before > 0.999 * way  # almost all of it, at the price of one draw
    on_the_way = [
        row.evaluations for row in wanted.history if row.iteration <= 1 and row.block in ("start", "E")
    ]
    assert first.evaluations <= 6 < sum(on_the_way)
    assert in_sds(found, wanted) < 2 * exactness.FEW_ERROR


def test_too_few_draws_cost_nothing_but_time(fit, monkeypatch):
    """Two pairs for five latents: their optimum is of no use, and the fit knows."""
    wanted = on_all(fit, mixture, mixture_data(40), monkeypatch)
    monkeypatch.setattr(few, "FEW_DRAWS", (4,))
    monkeypatch.setattr(few, "PER_LATENT", 0)
    monkeypatch.setattr(few, "widest", lambda *args: 1)
    monkeypatch.setattr(few, "SHARE", 1.0)
    found = fit(mixture, mixture_data(40))
    assert any(row.draws == 4 for row in found.history)
    assert_same_optimum(found, wanted)


def test_fits_with_little_way_to_go_take_all_draws(fit):
    data, first = mixture_data(), fit(mixture, mixture_data())
    for settings in ({"init": first}, {"max_iter": 5}, {"tol": 0.01}):
        again = fit(mixture, data, **settings)
        assert {row.draws for row in again.history} == {256}
        assert again.converged


def test_draws_of_few_numbers_are_as_dear_as_many(fit):
    def loop(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        x = torch.zeros(())
        for _ in range(len(y)):
            x = torch.tanh(a[0] + b[0] * x) + a[1] * b[1]
        pyro.sample("y", dist.Normal(x, 1.0).expand([len(y)]).to_event(1), obs=y)

    result = fit(loop, {"y": mixture_data(20)["y"]})
    assert {row.draws for row in result.history} == {256}


def test_cliques_need_draws(fit):
    """Few draws hold their moments where they are more than twice the latents of a clique."""

    def regression(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        mean = torch.tanh(x @ w) + torch.sin(x[:, 0] * w[..., 1])
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    generator = torch.Generator().manual_seed(3)
    for width, draws in ((8, 32), (12, 64), (40, 256)):
        x = torch.randn(400, width, generator=generator, dtype=torch.float64)
        y = torch.tanh(x[:, 0]) + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64)
        result = fit(regression, {"x": x, "y": y}, options=vem.FitOptions(compiled=False))
        assert min(row.draws for row in result.history if row.block != "start") == draws


def test_an_interrupted_fit_is_one_on_all_draws_and_goes_on(fit, tmp_path):
    path, data = tmp_path / "fit.safetensors", mixture_data()
    wanted, seen = fit(mixture_em, data), []

    def stop(step, params):
        seen.append(step)
        if step.draws == 32 and step.block == "M":
            raise KeyboardInterrupt

    left = fit(mixture_em, data, checkpoint=path, callbacks=[stop])
    assert left.status is vem.Status.interrupted
    assert seen[-1].draws == 32
    assert left.history[-1].draws == 256
    assert left.history[-1].after > left.history[0].before
    assert left.setup.objective.num_draws == 256
    kept = vem.VEMResult.load(path, mixture_em, data)  # which holds the bound against the data
    assert kept.history[-1].after == left.history[-1].after
    on = fit(mixture_em, data, checkpoint=path)
    assert on.converged
    assert on.history[-1].after == pytest.approx(wanted.history[-1].after, abs=exactness.FEW_NATS)


def test_a_checkpoint_on_the_way_is_of_all_draws(fit, tmp_path, monkeypatch):
    path, data, kept = tmp_path / "fit.safetensors", mixture_data(), []
    save = Checkpoint.save

    def looked_at(self, make, is_last=False):
        save(self, make, is_last=True)
        kept.append(vem.VEMResult.load(path, mixture_em, data))

    monkeypatch.setattr(Checkpoint, "save", looked_at)
    found = fit(mixture_em, data, checkpoint=path)
    assert found.converged
    assert any(row.draws == 32 for row in kept[0].history)
    assert {fit.history[-1].draws for fit in kept} == {256}


def test_each_bound_is_traced_by_itself(fit, monkeypatch):
    rows, seen = [], []

    def refused(function, *at):
        seen.append(rows[-1].draws)
        return "not here"

    monkeypatch.setattr(graphs, "capture", refused)
    monkeypatch.setattr(exactness, "FEW_ERROR", 1e-12)
    monkeypatch.setattr(graphs, "WORTH", 0.0)  # seconds: at once, on few draws and again on all
    found = fit(mixture_em, mixture_data(), callbacks=[lambda row, params: rows.append(row)])
    assert found.converged
    assert set(seen) == {32, 256}
    asked = fit(mixture_em, mixture_data(), compile=True)
    assert not any(row.draws == 32 for row in asked.history)


def test_hooks_and_several_starts_on_few_draws(fit, monkeypatch):
    def weights(latents, params):
        return 0.9 * params["weights"] + 0.1 / 3

    settings = {"m_step": {"weights": weights}, "max_iter": 60}
    found = fit(mixture_em, mixture_data(100), **settings)
    assert any(row.draws == 32 for row in found.history)
    wanted = on_all(fit, mixture_em, mixture_data(100), monkeypatch, **settings)
    assert found.history[-1].after == pytest.approx(wanted.history[-1].after, abs=1e-6)
    best = fit(mixture, mixture_data(100), num_starts=3)
    alone = fit(mixture, mixture_data(100))
    assert best.history[-1].after >= alone.history[-1].after - 1e-8
