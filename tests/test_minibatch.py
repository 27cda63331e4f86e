"""Fits on batches of rows: what they agree with, what they refuse, encoders, new rows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from torch import nn
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.fit import minibatch, network
from pyro_vem.model.batches import Source
from pyro_vem.model.rows import rows_of
from pyro_vem.model.runtime import isolated

D = torch.float64


def regression_data(groups=240, size=3):
    rng = np.random.default_rng(0)
    x, u = rng.normal(size=(groups, size)), 0.7 * rng.normal(size=groups)
    y = 1.5 + 2 * x + u[:, None] + 0.8 * rng.normal(size=(groups, size))
    return {"x": torch.tensor(x), "y": torch.tensor(y)}


def regression(x, y):
    sd_u = pyro.param("sd_u", torch.tensor(1.0), constraint=constraints.positive)
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    a, b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in "ab")
    with pyro.plate("groups", x.shape[0], dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sd_u))
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a + b * x + u, sd), obs=y)


def test_batches_find_what_a_full_fit_finds(fit, global_state):
    """A conjugate hierarchical regression: parameters within 1 %, sds within 5 %."""
    snapshot, same = global_state
    data, before = regression_data(), snapshot()
    full = fit(regression, data)
    found = fit(regression, data, batch_size=80)
    pilot = fit(regression, {name: value[:80] for name, value in data.items()})
    assert found.status is vem.Status.converged
    for name, value in full.params.items():
        assert float(found.params[name]) == pytest.approx(float(value), rel=0.01)
    assert abs(float(pilot.params["sd_u"] / full.params["sd_u"]) - 1) > 0.01  # one batch alone is off
    for name, value in full.guide_params.items():
        other = found.guide_params[name]
        assert other.shape == value.shape
        if ".scale." in name:
            torch.testing.assert_close(other, value, rtol=0.05, atol=0)
        else:
            sd = full.guide_params[name.replace(".loc.", ".scale.")]
            assert float(((other - value) / sd).abs().max()) < 0.1
    assert abs(found.elbo - full.elbo) < 5 * found.elbo_se + 0.05
    assert found.sample(10)["u"].shape == (10, 240, 1)  # methods see all rows
    same(before)


def test_a_last_batch_may_be_smaller(fit):
    found = fit(regression, regression_data(), batch_size=100, max_iter=1)  # 240 = 100 + 100 + 40
    assert found.status is vem.Status.max_iterations
    assert found.history[0].evaluations == 3
    assert found.guide_params["guide.loc.u"].shape == (240, 1)
    assert math.isfinite(found.elbo)


def test_every_row_is_in_one_batch():
    for total, size, expected in (
        (10, 4, [4, 6]),
        (11, 4, [4, 7]),
        (12, 4, [4, 4, 4]),
        (9, 5, [5, 4]),
        (5, 8, [5]),
    ):
        data = {"x": torch.arange(total), "y": torch.arange(total)}
        source = Source.of(lambda x, y: None, data, size, 0)
        batches = [index for index, _ in source.epoch(("x", "y"), total, 0)]
        assert [len(index) for index in batches] == expected
        assert sorted(torch.cat(batches).tolist()) == list(range(total))


def test_the_plates_of_the_rows_are_found():
    data = regression_data()
    with isolated(D):
        rows = rows_of(Source.of(regression, data, 64, 0))
    assert rows.names == ("x", "y")
    assert rows.total == 240
    assert rows.all_plates == {"groups"}


def outside(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("noise", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def told_wrongly(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 1200, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def scaled_twice(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=1000 / len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def centred(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * (x - x.mean()), 1.0), obs=y)


def centred_later(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.param("b", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b * (x - x.mean()), 1.0), obs=y)


def indexed(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.param("b", torch.zeros(1000))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b[: len(y)], 1.0), obs=y)


@vem.vem_model(map_sites=["m"])
def mapped(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        m = pyro.sample("m", dist.Normal(b * x, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def fixed_size(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 1000):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def own_rows(x, y):
    b = pyro.param("b", torch.zeros(len(y)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def local(x, y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


@pytest.mark.slow
def test_steps_of_rows_do_not_overshoot_where_the_bound_is_flat(fit, monkeypatch):
    """Supports of very different widths; a factor beyond the limit of sds is told."""
    generator = torch.Generator().manual_seed(0)
    u = 0.5 + 4 * torch.rand(200, generator=generator)
    y = 1 + u * torch.rand(200, generator=generator) + 0.5 * torch.randn(200, generator=generator)

    def model(u, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(u), u))
            pyro.sample("y", dist.Normal(mu + z, 0.5), obs=y)

    data = {"u": u, "y": y}
    whole = fit(model, data, guide=vem.MeanFieldNormal(model))
    found = fit(model, data, batch_size=20, max_iter=200)
    mean, sd = (whole.guide_params[f"guide.{name}.mu"] for name in ("loc", "scale"))
    assert abs(float(found.guide_params["guide.loc.mu"] - mean)) < 0.5 * float(sd)
    assert found.elbo == pytest.approx(whole.elbo, abs=1.0)
    monkeypatch.setattr("pyro_vem.fit.stopping.RUNAWAY", 3.0)
    with pytest.warns(UserWarning, match="has run away"):
        found = vem.fit_vem(model, data, batch_size=20, max_iter=60, progress=False)
    assert found.status is vem.Status.diverged


def test_a_saved_inference_holds_what_it_held(fit, tmp_path):
    def model(y):
        tau = pyro.param("tau", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y, rows = torch.linspace(-2, 8, 40), {"y": torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0])}
    new = fit(model, {"y": y}, guide=vem.MeanFieldNormal(model)).infer(rows)
    new.save(tmp_path / "new.vem")
    back = vem.VEMResult.load(tmp_path / "new.vem", model, rows, guide=vem.MeanFieldNormal(model))
    for one in (new, back):
        with pytest.raises(vem.ModelError, match="no free parameters"):
            one.standard_errors()
        with pytest.raises(vem.ModelError, match="held"):
            one.sample(10, correction="linear_response")
    assert torch.equal(back.sample(10)["z"], new.sample(10)["z"])


def test_inference_refuses_to_hold_map_values_of_rows(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            m = pyro.sample("m", dist.Normal(mu, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + m, 1.0), obs=y)

    y = torch.tensor([1.0, 2, 4, 5, 3, 2])
    found = fit(vem.vem_model(model, map_sites=["m"]), {"y": y})
    with pytest.raises(vem.ModelError, match="'m' has one for each row"):
        found.infer({"y": y + 10})


def test_too_few_rows_to_tell_their_plates(fit):
    found = fit(local, {"x": torch.ones(3), "y": torch.arange(3.0)})
    with pytest.raises(vem.ModelError, match="3 rows are too few"):
        found.infer({"x": torch.ones(5), "y": torch.arange(5.0)})


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (outside, ["'noise'", "outside plate 'rows'"]),
        (told_wrongly, ["'rows'", "1,200 rows", "1,000"]),
        (scaled_twice, ["'y'", "'rows'", "do not average"]),
        (centred, ["'y'", "'rows'", "do not average"]),
        (centred_later, ["'y'", "'rows'", "do not average"]),
        (indexed, ["'y'", "'rows'", "do not average"]),
        (mapped, ["map site 'm'", "map_sites=", "batch_size="]),
        (fixed_size, ["no plate of the model follows", "1000"]),
        (own_rows, ["parameter 'b'", "plate 'rows'"]),
    ],
)
def test_what_batches_cannot_stand_for_is_refused_before_the_fit(fit, model, told):
    data = {"x": torch.arange(1000.0) / 1000, "y": torch.arange(1000.0) / 500}
    with pytest.raises(vem.ModelError) as error:
        fit(model, data, batch_size=100)
    for text in told:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("model", "arguments", "told"),
    [
        (local, {"batch_size": 2}, "at least 4 rows"),
        (local, {"batch_size": 10, "validation": {"x": torch.ones(8), "y": torch.ones(8)}}, "encoder for z"),
        (local, {"data": iter([])}, "iterator"),
        (local, {"data": [{"x": torch.ones(8), "y": torch.ones(8)}] * 3}, "does not say which rows"),
        (local, {"data": [torch.ones(8)].__iter__().__class__, "batch_size": 8}, "data is a type"),
        (local, {"batch_size": 10, "guide": pyro.infer.autoguide.AutoNormal(local)}, "MeanFieldNormal"),
    ],
)
def test_bad_settings_name_the_remedy(fit, model, arguments, told):
    data = {"x": torch.ones(40), "y": torch.linspace(-1, 1, 40)}
    with pytest.raises((vem.ModelError, vem.UnsupportedModelError), match=told):
        fit(model, **{"data": data, **arguments})


def test_a_plate_that_scales_itself_is_left_alone(fit):
    """The model may know how many rows there are."""

    def told(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 200, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    def plain(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    rng = np.random.default_rng(1)
    x = rng.normal(size=200)
    data = {"x": x, "y": 0.5 * x + rng.normal(size=200)}
    held_out = {name: value[:40] for name, value in data.items()}
    full, found = fit(plain, data), fit(plain, data, batch_size=40, validation=held_out, max_iter=2)
    assert all("held out -" in row.note for row in found.history)
    found = fit(told, data, batch_size=40)
    assert float(found.guide_params["guide.loc.b"]) == pytest.approx(
        float(full.guide_params["guide.loc.b"]), abs=0.1 * float(full.guide_params["guide.scale.b"])
    )
    assert float(found.guide_params["guide.scale.b"]) == pytest.approx(
        float(full.guide_params["guide.scale.b"]), rel=0.05
    )


def test_factors_of_rows_in_a_plate_that_scales_itself_count_as_its_rows_do(fit):
    """By hand: given its mean each y is N(mean, 2), and each factor has sd sqrt(1/2)."""

    def told(y):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("rows", 200, subsample=torch.arange(len(y))):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = 1 + torch.linspace(-2, 2, 200, dtype=D)
    found = fit(told, {"y": y}, batch_size=40, max_iter=100)
    sd = found.guide_params["guide.scale.z"]
    torch.testing.assert_close(sd, torch.full_like(sd, 0.5**0.5), rtol=1e-6, atol=0)
    evidence = float(dist.Normal(y.mean(), 2**0.5).log_prob(y).sum())
    assert found.elbo == pytest.approx(evidence, abs=0.05)


def missing(x, y, seen, width):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * x, 1.0), obs=y, obs_mask=seen)


def left_out(x, y, seen, width):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
        u = pyro.sample("u", dist.Normal(b * x, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def within(x, y, seen, width):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        u = pyro.sample("u", dist.Uniform(torch.zeros_like(width), width))
        pyro.sample("y", dist.Normal(b * x + u, 0.5), obs=y)


@pytest.mark.parametrize(
    ("model", "site", "is_used"),
    [
        (missing, "y_unobserved", lambda seen: ~seen),
        (left_out, "u", lambda seen: seen),
        pytest.param(within, "u", torch.ones_like, marks=pytest.mark.slow),
    ],
)
def test_masks_and_bounds_are_those_of_a_batch(fit, model, site, is_used):
    """Rows take part where they do in the full fit, with its factors; batches differ in what they mask."""
    rng = np.random.default_rng(0)
    x, seen, width = rng.normal(size=160), torch.tensor(rng.random(160) > 0.3), 3 + rng.random(160)
    y = 0.5 * x + width * rng.random(160) + 0.5 * rng.normal(size=160)
    data = {"x": x, "y": y, "seen": seen, "width": width}
    full = fit(model, data, guide=vem.MeanFieldNormal(model))
    found = fit(model, data, batch_size=20, max_iter=200)
    rows = is_used(seen)
    for name, value in full.guide_params.items():
        other = found.guide_params[name]
        keep = rows if name.endswith(site) else ...
        if ".scale." in name:
            torch.testing.assert_close(other[keep], value[keep], rtol=0.1, atol=0)
        else:
            sd = full.guide_params[name.replace(".loc.", ".scale.")]
            assert float(((other - value) / sd)[keep].abs().max()) < 0.2, name
    assert abs(found.elbo - full.elbo) < 5 * (found.elbo_se + full.elbo_se) + 0.05


class Net(nn.Module):
    def __init__(self, size=6, inner=2, bias=True):
        super().__init__()
        self.loc = nn.Linear(size, inner, bias=bias)
        self.log_scale = nn.Parameter(torch.zeros(inner))

    def forward(self, y):
        loc = self.loc(y)
        return loc, self.log_scale.exp().expand_as(loc)


class Half(Net):
    """An encoder that never moves the second latent."""

    def forward(self, y):
        loc, scale = super().forward(y)
        return loc * torch.tensor([1.0, 0.0]), scale


LOADINGS = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))


def factors(y):
    sd = pyro.param("sd", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ LOADINGS.to(y.dtype), sd).to_event(1), obs=y)


def factor_data(rows=200):
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(rows, 2, generator=generator, dtype=D)
    return z @ LOADINGS.double() + 0.5 * torch.randn(rows, 6, generator=generator, dtype=D)


def amortized(kind):
    torch.manual_seed(0)
    return vem.AmortizedNormal(factors, {"z": kind()}, inputs="y")


def test_a_linear_encoder_of_a_linear_model_has_no_gap(fit):
    """The true posterior is linear in the data, with one covariance; its diagonal part is in reach."""
    y = factor_data()
    found = fit(factors, {"y": y}, guide=amortized(Net))
    gap = found.amortization_gap()
    assert gap.plate == "rows"
    assert gap.rows.shape == (200,)
    assert abs(gap.mean) < 1e-3
    assert "amortization gap" in str(gap)


def test_a_crippled_encoder_is_reported_with_its_gap(fit):
    y = factor_data()
    found = fit(factors, {"y": y}, guide=amortized(Half))
    gap = found.amortization_gap()
    # By hand: the best factor of each row, by the normal equations of a Gaussian posterior.
    sd = float(found.params["sd"])
    precision = torch.eye(2, dtype=D) + LOADINGS.double() @ LOADINGS.double().T / sd**2
    best = torch.linalg.solve(precision, LOADINGS.double() @ y.T / sd**2).T
    with torch.no_grad():
        loc, scale = found.guide_params["guide.encoder.z$$$loc.weight"], 0
        encoded = (y @ loc.T + found.guide_params["guide.encoder.z$$$loc.bias"]) * torch.tensor([1.0, 0.0])
        scale = found.guide_params["guide.encoder.z$$$log_scale"].exp()
    off = encoded - best
    ideal = precision.diagonal().rsqrt()
    by_scale = 0.5 * (precision.diagonal() * scale**2 - 1).sum() - (scale / ideal).log().sum()
    expected = 0.5 * ((off @ precision) * off).sum(-1) + by_scale
    np.testing.assert_allclose(gap.rows, expected.numpy(), atol=1e-6)
    assert gap.mean > 0.5
    assert gap.worst[0] == int(expected.argmax())


def test_new_rows_get_factors_and_nothing_else_moves(fit):
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(b * x, 0.5))
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    rng = np.random.default_rng(2)
    x = rng.normal(size=80)
    found = fit(model, {"x": x, "y": x + rng.normal(size=80)})
    new_x, new_y = torch.tensor([0.5, -1.0, 2.0], dtype=D), torch.tensor([1.0, 0.0, 4.0], dtype=D)
    new = found.infer({"x": new_x, "y": new_y})
    b, sd = found.guide_params["guide.loc.b"], found.params["sd"]
    precision = 1 / 0.25 + 1 / sd**2
    torch.testing.assert_close(
        new.guide_params["guide.loc.z"], (b * new_x / 0.25 + new_y / sd**2) / precision, atol=1e-7, rtol=0
    )
    torch.testing.assert_close(new.guide_params["guide.scale.z"], precision.rsqrt().expand(3))
    assert torch.equal(new.guide_params["guide.loc.b"], b)
    assert torch.equal(new.params["sd"], sd)
    assert new.sample(5)["z"].shape == (5, 3)
    with pytest.raises(vem.ModelError, match="no encoder"):
        found.amortization_gap()
    # Its shared factors cannot react, so that there is no linear response; the rest goes on without.
    for ask in (new.covariance, lambda: new.sample(5, correction="linear_response")):
        with pytest.raises(vem.ModelError, match=r"infer\(\) holds that of b:"):
            ask()
    assert new.diagnose().rows.khat.max() < 0.7
    assert "verdict" in str(new)


def long_answers(person, item, persons, items, y):
    with pyro.plate("item", items):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("person", persons):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=theta[person] - b[item]), obs=y)


def test_members_that_rows_see_by_an_index_are_not_inferred(fit):
    """Nothing would move, and the old members' factors come back as those of the new ones."""
    person, item = np.divmod(np.arange(60), 5)
    data = {"person": person, "item": item, "persons": 12, "items": 5}
    found = fit(long_answers, {**data, "y": np.arange(60.0) % 2})
    with pytest.raises(
        vem.ModelError, match=r"'answers' follows.*'b' in plate 'item', 'theta' in plate 'pers"
    ) as e:
        found.infer({**data, "y": np.ones(60)})
    assert "init=fit" in str(e.value)
    with pytest.raises(vem.ModelError, match=r"'theta' in plate 'person'"):
        found.infer({"person": person[:15], "item": item[:15], "persons": 3, "items": 5, "y": np.ones(15)})


@pytest.mark.parametrize("is_sized", [False, True])
def test_what_infer_holds_keeps_its_shape(fit, is_sized):
    def answers(y, persons=None):
        with pyro.plate("item", y.shape[1], dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("person", len(y) if persons is None else persons, dim=-2):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("answer", y.shape[1], dim=-1):
                pyro.sample("y", dist.Bernoulli(logits=theta - b), obs=y)

    y = np.arange(60.0).reshape(12, 5) % 2
    if is_sized:
        with pytest.raises(
            vem.ModelError, match=r"size it by them, pyro\.plate\('rows', len\(y\)\)"
        ) as error:
            fit(answers, {"y": y, "persons": 12}).infer({"y": y[:6], "persons": 6})
        assert "batch" not in str(error.value)
        return
    found = fit(answers, {"y": y})
    assert found.infer({"y": y[:6]}).sample(2)["theta"].shape == (2, 6, 1)
    with pytest.raises(
        vem.ModelError, match=r"the factor of 'b', which has shape \(5,\) in the fit and \(4,\)"
    ):
        found.infer({"y": y[:, :4]})


def test_new_rows_have_their_own_khat(fit):
    found = fit(factors, {"y": factor_data()}, guide=amortized(Net))
    new = found.infer({"y": factor_data(30)}, refine=True)
    rows = new.diagnose().rows
    assert rows is not None
    assert rows.khat.shape == (30,)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, z):
        return self.net(z)


def autoencoder():
    torch.manual_seed(1)
    decoder, encoder = Decoder(), Net()
    model = zoo.through(decoder, 2)
    return model, vem.AmortizedNormal(model, {"z": encoder}, inputs="y")


def test_a_loader_is_a_mapping_in_batches(fit):
    """The same batches in the same order, from memory and from a loader."""
    y = factor_data(90).float()
    model, guide = autoencoder()
    by_rows = fit(model, {"y": y}, guide=guide, batch_size=30, max_iter=1)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    batches = [{"y": y[order[i : i + 30]]} for i in (0, 30, 60)]
    streamed = fit(model, batches, guide=guide, max_iter=1)
    for name, value in by_rows.params.items():
        torch.testing.assert_close(streamed.params[name], value)
    loader = torch.utils.data.DataLoader([{"y": row} for row in y], batch_size=30, shuffle=True)
    before = torch.get_rng_state()
    assert math.isfinite(fit(model, loader, guide=guide, max_iter=2).elbo)
    assert torch.equal(torch.get_rng_state(), before)  # a loader that shuffles draws a seed each pass
    with pytest.raises(vem.ModelError, match="data has no batch"):
        fit(model, torch.utils.data.DataLoader([]), guide=guide)


def test_a_sampler_says_how_many_rows_there_are():
    """Of a loader that leaves rows to others, not those of its data set."""
    data = torch.utils.data
    rows, model = [{"y": torch.ones(())}] * 60, autoencoder()[0]
    samplers = {
        60: None,
        40: data.SubsetRandomSampler(range(40)),
        30: data.DistributedSampler(rows, num_replicas=2, rank=0),
    }
    for number, sampler in samplers.items():
        loader = data.DataLoader(rows, batch_size=10, sampler=sampler)
        assert Source.of(model, loader, None, 0).total(("y",)) == number
    batches = [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert Source.of(model, data.DataLoader(rows, batch_sampler=batches), None, 0).total(("y",)) == 9


def test_arguments_of_a_stream_that_hold_no_rows_may_be_longer_than_a_batch(fit):
    """Levels, which a plate of their own follows: by hand, a normal mean of 400 rows."""

    def model(y, level, effect):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        with pyro.plate("levels", len(effect)):
            u = pyro.sample("u", dist.Normal(effect, 1e-3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a + u[level], 1.0), obs=y)

    rng = np.random.default_rng(0)
    effect, level = torch.tensor(rng.normal(size=30)), torch.tensor(rng.integers(30, size=400))
    y = 1 + effect[level] + torch.tensor(rng.normal(size=400))
    batches = [{"y": y[i : i + 20], "level": level[i : i + 20], "effect": effect} for i in range(0, 400, 20)]
    found = fit(model, batches)
    assert any("batches of 20 of 400 rows (y, level): plate rows" in note for note in found.plan.notes)
    assert float(found.guide_params["guide.scale.a"]) == pytest.approx(400**-0.5, rel=0.05)
    assert float(found.guide_params["guide.loc.a"]) == pytest.approx(
        float((y - effect[level]).mean()), abs=0.01
    )


@pytest.mark.slow
def test_the_last_passes_leave_correlated_factors_where_the_bound_is_high(fit):
    """Twenty columns with a common part: nats lost in closed form, the posterior being Gaussian."""

    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(500, 1)) + 0.3 * rng.normal(size=(500, 20)))
    y = x @ torch.linspace(-1, 1, 20, dtype=D) + torch.tensor(rng.normal(size=500))
    found = fit(model, {"x": x, "y": y}, batch_size=100).guide_params
    precision = x.T @ x + torch.eye(20)
    off = found["guide.loc.b"] - torch.linalg.solve(precision, x.T @ y)
    ratio = found["guide.scale.b"].square() * precision.diag()
    lost = 0.5 * off @ precision @ off + 0.5 * (ratio - 1 - ratio.log()).sum()
    assert float(lost) < 0.2


@pytest.mark.parametrize("has_encoder", [False, True])
def test_rows_of_a_stream_count_alike_in_small_batches_and_in_large_ones(fit, has_encoder):
    """The maximum-likelihood mean is that of all rows; the batches' own means are 1.5 apart."""

    def level(y):
        mean = pyro.param("mean", torch.tensor(0.0))
        if has_encoder:
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)
            return
        pyro.sample("other", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    class Shrunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.0))

        def forward(self, y):
            return self.shift + 0.8 * y, torch.full_like(y, 0.2**0.5)

    guide = vem.AmortizedNormal(level, {"z": Shrunk()}, inputs="y") if has_encoder else None
    large, small = torch.linspace(-1, 1, 1000), torch.linspace(0.5, 2.5, 100)
    found = fit(level, [{"y": large}, {"y": small}], guide=guide, max_iter=1500 if has_encoder else 1000)
    assert float(found.params["mean"]) == pytest.approx(150 / 1100, abs=0.01)


def test_a_fit_on_a_stream_is_loaded_with_any_rows(fit, tmp_path):
    y = factor_data(90)
    model, guide = autoencoder()
    found = fit(model, [{"y": part} for part in y.split(30)], guide=guide, max_iter=2)
    found.save(tmp_path / "stream.fit")
    again = vem.VEMResult.load(tmp_path / "stream.fit", model, {"y": y[:50]}, guide=guide)
    assert again.elbo == found.elbo
    assert again.infer({"y": y[:5]}).elbo == pytest.approx(found.infer({"y": y[:5]}).elbo)
    assert math.isfinite(again.amortization_gap().mean)


def test_training_climbs_and_keeps_the_best_held_out_state(fit):
    y, held_out = factor_data(120), factor_data(160)[120:]
    model, guide = autoencoder()
    found = fit(model, {"y": y}, guide=guide, batch_size=50, max_iter=40, validation={"y": held_out})
    scores = [float(row.note.split("held out ")[1]) for row in found.history]
    assert scores[-1] > scores[0] + 100
    assert found.elbo > found.history[0].after + 100
    assert len(found.history) == found.n_iter


@pytest.mark.parametrize("looks", [False, True])
def test_a_traced_step_is_the_eager_one(fit, monkeypatch, looks):
    """Data and draws are inputs of the graph; a model that looks at values is not traced."""
    y = factor_data(90)
    model, guide = autoencoder()
    if looks:
        inner = model

        def model(y):
            inner(y if float(y.sum()) > 1e9 else y + 0.0)

        guide = vem.AmortizedNormal(model, {"z": Net()}, inputs="y")
    monkeypatch.setattr(network, "TIMED", 2)
    monkeypatch.setattr(network, "WORTH_TRACE", 0.0)
    monkeypatch.setattr(network, "WORTH_COMPILER", math.inf)
    traced = fit(model, {"y": y}, guide=guide, batch_size=40, max_iter=4)
    eager = fit(model, {"y": y}, guide=guide, batch_size=40, max_iter=4, compile=False)
    assert ("steps not captured" if looks else "steps traced") in str(traced.plan)
    for name, value in eager.params.items():
        torch.testing.assert_close(traced.params[name], value, rtol=1e-9, atol=1e-12)


def test_traced_encoder_steps_are_those_of_the_model(fit, monkeypatch):
    """Traced at a step of the encoder alone: what moves then must not stay what the encoder is."""
    monkeypatch.setattr(network, "TIMED", 2)
    monkeypatch.setattr(network, "WORTH_TRACE", 0.0)
    monkeypatch.setattr(network, "WORTH_COMPILER", math.inf)
    y, found = factor_data(80), []
    for mode in ("auto", False):
        model, guide = autoencoder()
        settings = {"options": vem.FitOptions(encoder_steps=4), "compile": mode}
        found.append(fit(model, {"y": y}, guide=guide, batch_size=40, max_iter=4, **settings))
    traced, eager = found
    assert "steps traced" in str(traced.plan)
    for name, value in eager.params.items():
        torch.testing.assert_close(traced.params[name], value, rtol=1e-3, atol=1e-4)


def test_discrete_sites_are_for_all_rows(fit):
    def model(y):
        mu = pyro.param("mu", torch.tensor(1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu * z, 1.0), obs=y)

    with pytest.raises(vem.UnsupportedModelError, match="leave batch_size= out"):
        fit(model, {"y": torch.linspace(-1, 2, 40)}, batch_size=10)


def test_arrays_on_disk_are_read_in_batches(fit, tmp_path):
    rng = np.random.default_rng(1)
    table = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float32", (500, 2))
    table[:] = rng.normal(size=(500, 2))
    table[:, 1] += 2 * table[:, 0]
    table.flush()
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")

    def model(table):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(table)):
            pyro.sample("y", dist.Normal(b * table[:, 0], 1.0), obs=table[:, 1])

    found = fit(model, {"table": on_disk}, batch_size=100)
    full = fit(model, {"table": torch.tensor(np.array(on_disk))})
    assert float(found.guide_params["guide.loc.b"]) == pytest.approx(
        float(full.guide_params["guide.loc.b"]), abs=0.1 * float(full.guide_params["guide.scale.b"])
    )


def test_rows_that_share_nothing_are_no_batches(fit):
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match="share no parameter and no latent"):
        fit(model, {"y": torch.linspace(-1.0, 1.0, 20)}, batch_size=5)


def test_steps_to_where_the_bound_is_not_finite_are_not_taken(fit):
    """A decoder that overflows wherever its bias passes a limit: the rate is halved, and it is said."""
    y = factor_data(60)

    def model(y):
        bias = pyro.param("bias", torch.tensor(0.0))
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            wall = torch.where(bias > 0.004, torch.tensor(math.nan), torch.tensor(0.0))
            pyro.sample("y", dist.Normal(decoder(z) + bias + wall, 0.5).to_event(1), obs=y + 1)

    torch.manual_seed(1)
    decoder, encoder = Decoder(), Net()
    guide = vem.AmortizedNormal(model, {"z": encoder}, inputs="y")
    found = fit(model, {"y": y}, guide=guide, batch_size=30, max_iter=6)
    assert any("not finite not taken: rate halved" in row.note for row in found.history)
    assert all(bool(torch.isfinite(value).all()) for value in found.params.values())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"num_starts": 2}, "num_starts="),
        ({"schedule": "joint"}, "schedule="),
        ({"m_step": {"sd": lambda latents, params: params["sd"]}}, "m_step="),
    ],
)
def test_settings_that_batches_do_not_take_are_refused(fit, setting, told):
    with pytest.raises(ValueError, match=told):
        fit(regression, regression_data(), batch_size=80, **setting)


def test_held_out_rows_are_for_batches(fit):
    with pytest.raises(ValueError, match="give batch_size="):
        fit(regression, regression_data(), validation=regression_data(12))


def test_a_fit_on_batches_is_saved_and_may_be_interrupted(fit, tmp_path):
    data = regression_data()

    def stop(step, params):
        if step.iteration == 2:
            raise KeyboardInterrupt

    found = fit(regression, data, batch_size=80, callbacks=[stop])
    assert found.status is vem.Status.interrupted
    assert found.n_iter == 2
    assert "batches of 80 of 240 rows (x, y): plate groups stands for all of them" in str(found.plan)
    found.save(tmp_path / "fit")
    again = vem.VEMResult.load(tmp_path / "fit", regression, data)
    assert torch.equal(again.sample(4)["u"], found.sample(4)["u"])


def test_annealing_weighs_what_is_climbed_and_not_what_is_reported(fit):
    """With nothing left to train the reported bound is the same, annealed or not."""
    y = factor_data(60)
    model, guide = autoencoder()
    annealed = fit(
        model, {"y": y}, guide=guide, batch_size=30, max_iter=3,
        options=vem.FitOptions(annealed_epochs=2),
    )  # fmt: skip
    notes = [row.note for row in annealed.history]
    assert "KL times 0.5" in notes[0]
    assert "KL times 1" in notes[1]
    assert "KL" not in notes[2]
    plain = fit(model, {"y": y}, guide=guide, batch_size=30, max_iter=3)
    assert not torch.equal(annealed.params["decoder$$$net.0.weight"], plain.params["decoder$$$net.0.weight"])
    # The whole bound at the annealed parameters, by hand.
    with torch.no_grad():
        infer = annealed.infer({"y": y})
    assert annealed.elbo == pytest.approx(infer.elbo, abs=5 * (annealed.elbo_se + infer.elbo_se) + 0.1)


def seen(monkeypatch, values=None):
    """What the lag control looks at, and what it found; scripted values in its place, if given."""
    plain, found, script = minibatch.mutual_information, [], iter(values or ())

    def looked(problem, x):
        value = plain(problem, x)
        found.append((problem, x, value))
        return next(script) if values else value

    monkeypatch.setattr(minibatch, "mutual_information", looked)
    return found


def test_extra_encoder_steps_end_when_information_stops_rising(fit, monkeypatch):
    looks = seen(monkeypatch, [0.5, 0.9, 0.8, 1.0, 0.9, 1.0, 0.95])
    model, guide = autoencoder()
    options = vem.FitOptions(encoder_steps=3)
    found = fit(model, {"y": factor_data(100)}, guide=guide, batch_size=50, max_iter=9, options=options)
    notes = [step.note for step in found.history]
    assert len(looks) == 7
    assert all("3 encoder steps" in note for note in notes[:7])
    assert ["the last time" in note for note in notes] == [False] * 6 + [True] + [False] * 2


def test_mutual_information_of_a_linear_encoder(fit, monkeypatch):
    """For y ~ N(0, S) and q(z | y) = N(W y + b, D): half the log determinant of 1 + D^-1 W S W'."""
    looks = seen(monkeypatch)
    model, guide = autoencoder()
    y, options = factor_data(400), vem.FitOptions(encoder_steps=6)
    fit(model, {"y": y}, guide=guide, batch_size=50, max_iter=8, options=options)
    problem, x, value = looks[-1]
    known = problem.block.constrained(x)
    weight = known["guide.encoder.z$$$loc.weight"]
    precision = torch.diag(known["guide.encoder.z$$$log_scale"].mul(-2).exp())
    matrix = torch.eye(2, dtype=D) + precision @ weight @ torch.cov(y.T) @ weight.T
    assert value == pytest.approx(0.5 * float(torch.logdet(matrix)), abs=0.1)
    assert value > 0.5


def test_steps_of_the_encoder_leave_the_decoder_alone(fit, monkeypatch):
    """Its first step after them is Adam's: one rate."""
    looks = seen(monkeypatch)
    model, guide = autoencoder()
    options = vem.FitOptions(encoder_steps=2)
    fit(model, {"y": factor_data(100)}, guide=guide, batch_size=50, max_iter=1, options=options)
    problem = looks[0][0]
    steps, call = network.NetworkStep(problem, 0, False, 10, 0), problem.first.problem.call
    decoder, start = steps.encoder == 0, steps.x
    for _ in range(5):
        steps.step(call, is_encoder_only=True)
    assert torch.equal(steps.x[decoder], start[decoder])
    assert not torch.equal(steps.x[~decoder], start[~decoder])
    steps.step(call)
    moved = (steps.x - start)[decoder].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, network.RATE), rtol=1e-3, atol=0)


def test_encoder_steps_need_encoders(fit):
    y = torch.randn(60)

    net = nn.Linear(1, 1)

    def model(y):
        pyro.module("net", net)
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(y.unsqueeze(-1)).squeeze(-1) + b, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match="needs an encoder for every latent"):
        fit(model, {"y": y}, batch_size=20, options=vem.FitOptions(encoder_steps=2))


class Stopped(Exception):
    """An interruption that no one catches."""


def _stop(step, params):
    if step.iteration == 4:
        raise Stopped


def test_training_goes_on_from_a_checkpoint(fit, tmp_path):
    path, y = tmp_path / "fit.checkpoint", factor_data(200)
    model, guide = autoencoder()
    settings = {"guide": guide, "batch_size": 50, "max_iter": 12}
    with pytest.raises(Stopped):
        fit(model, {"y": y}, checkpoint=path, callbacks=[_stop], **settings)
    left = vem.VEMResult.load(path, model)
    again = fit(model, {"y": y}, checkpoint=path, **settings)
    alone = fit(model, {"y": y}, **settings)
    assert 1 <= left.n_iter <= 4  # writing takes no more than a twentieth of the time
    assert [step.iteration for step in again.history] == list(range(left.n_iter + 1, 13))
    assert again.history[0].before > alone.history[0].before
    assert again.elbo == pytest.approx(alone.elbo, rel=0.05)
    assert f"went on from a checkpoint after {left.n_iter} epochs" in again.plan.notes
    assert not path.exists()
    longer = fit(model, {"y": y}, init=alone, **settings)
    assert longer.history[0].before > alone.history[0].before + 100


def test_an_interruption_leaves_the_last_epoch(fit, tmp_path):
    def interrupt(step, params):
        if step.iteration == 4:
            raise KeyboardInterrupt

    path, (model, guide) = tmp_path / "fit.checkpoint", autoencoder()
    settings = {"guide": guide, "batch_size": 50, "max_iter": 12, "checkpoint": path}
    stopped = fit(model, {"y": factor_data(200)}, callbacks=[interrupt], **settings)
    assert stopped.status is vem.Status.interrupted
    assert vem.VEMResult.load(path, model).n_iter == 4


def test_rows_are_where_a_checkpoint_left_them(fit, tmp_path):
    path = tmp_path / "fit.checkpoint"
    generator = torch.Generator().manual_seed(0)
    y = 1.0 + torch.randn(200, generator=generator) + torch.randn(200, generator=generator)

    def model(y):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(Stopped):
        fit(model, {"y": y}, batch_size=50, checkpoint=path, callbacks=[_stop])
    left = vem.VEMResult.load(path, model)
    again = fit(model, {"y": y}, batch_size=50, checkpoint=path)
    assert left.guide_params["guide.loc.z"].shape == (200,)
    assert float(again.params["mean"]) == pytest.approx(float(y.mean()), abs=0.02)
    assert again.status is vem.Status.converged


def test_a_checkpoint_of_other_rows_is_refused(fit, tmp_path):
    path, (model, guide) = tmp_path / "fit.checkpoint", autoencoder()
    settings = {"guide": guide, "batch_size": 50, "max_iter": 12, "checkpoint": path}
    with pytest.raises(Stopped):
        fit(model, {"y": factor_data(200)}, callbacks=[_stop], **settings)
    with pytest.raises(vem.ModelError, match="is of another fit: its data are not these"):
        fit(model, {"y": factor_data(200) + 1}, **settings)
    assert path.exists()
    with pytest.raises(vem.ModelError, match="there is no folder"):
        fit(model, {"y": factor_data(200)}, **{**settings, "checkpoint": tmp_path / "none" / "file"})


def test_a_warm_start_is_no_checkpoint(fit, tmp_path):
    model, guide = autoencoder()
    settings = {"guide": guide, "batch_size": 50, "max_iter": 3}
    first = fit(model, {"y": factor_data(200)}, **settings)
    again = fit(model, {"y": factor_data(200)}, init=first, checkpoint=tmp_path / "file", **settings)
    assert len(again.history) == 3
    assert not any("checkpoint" in note for note in again.plan.notes)


def test_the_guide_of_a_fit_takes_other_rows(fit):
    """As Predictive calls it: with an encoder the rows are those of the data."""
    model, guide = autoencoder()
    y = factor_data(60)
    found = fit(model, {"y": y}, guide=guide, batch_size=20, max_iter=2)
    for rows in (60, 7, 20):
        drawn = pyro.infer.Predictive(found.model, guide=found.guide, num_samples=3)(y[:rows])
        assert drawn["z"].shape == (3, rows, 2)
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-2):
        z = pyro.poutine.trace(found.guide).get_trace(y[:2]).nodes["z"]["value"]
    inferred = found.infer({"y": y[:8]}).sample(4000)["z"][:, :2]
    se = inferred.std(0) / 4000**0.5
    assert ((z.mean(0) - inferred.mean(0)).abs() < 6 * se).all()
