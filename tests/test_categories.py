"""Categorical observations: on a grid of their log odds, or by one integral where logits are independent."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vem as vem
from pyro_vem.bound.compiled import expect, forms, nodes
from pyro_vem.bound.compiled import softmax as softmax_module
from pyro_vem.bound.compiled.softmax import mean_log_sum
from pyro_vem.model.runtime import isolated

D = torch.float64


def softmax_data(rows=60, columns=3, categories=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=D)
    w = torch.randn(columns, categories, generator=generator, dtype=D)
    noise = torch.rand(rows, categories, generator=generator, dtype=D)
    return {"x": x, "y": (x @ w - (-noise.log()).log()).argmax(-1), "categories": categories}


def softmax(x, y, categories):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], categories), 2.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def by_probabilities(x, y, categories):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], categories), 2.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical((x @ w).softmax(-1)), obs=y)


def with_reference(x, y, categories):
    """The first category has no coefficients, as statisticians write it."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], categories - 1), 2.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(logits=torch.nn.functional.pad(x @ w, (1, 0))), obs=y)


def nested(x, y, categories):
    """Half of the categories have an effect in common."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], categories), 1.0).to_event(2))
    u = pyro.sample("u", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    upper = (torch.arange(categories) >= categories // 2).double()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(logits=x @ w + (x @ u).unsqueeze(-1) * upper), obs=y)


def expected(loc, scale, x, y, nodes=24):
    """Sum over rows of E log softmax, logits independent and Gaussian, by a grid over all of them."""
    rules = [np.polynomial.hermite_e.hermegauss(nodes if known.any() else 1) for known in scale.T]
    grid, weight = (
        np.stack(np.meshgrid(*parts, indexing="ij"), -1).reshape(-1, len(rules))
        for parts in zip(*rules, strict=True)
    )
    weight = weight.prod(-1) / weight.prod(-1).sum()
    total = 0.0
    for row, chosen in zip(x, y, strict=True):
        logits = row @ loc + grid * np.sqrt(row**2 @ scale**2)
        top = logits.max(1)
        total += weight @ (logits[:, chosen] - top - np.log(np.exp(logits - top[:, None]).sum(1)))
    return total


def assert_is_average(found, num=20_000):
    """The bound is that of log p - log q at draws of the guide, by the model itself."""
    draws = found.draw(num, 3, "densities")["densities"]
    ratio = draws["log_p"] - draws["log_q"]
    assert found.elbo == pytest.approx(float(ratio.mean()), abs=4 * float(ratio.std()) / num**0.5)


@pytest.mark.parametrize("model", [softmax, by_probabilities, with_reference])
def test_expectations_are_those_of_a_grid_over_all_logits(fit, model):
    data = softmax_data()
    found = fit(model, data)
    assert found.converged
    row = found.terms["y"]
    assert row.method == "quadrature"
    q = found.guide_params
    loc, scale = (q[key].reshape(3, -1).numpy() for key in ("guide.loc.w", "guide.scale.w"))
    if model is with_reference:
        loc, scale = (np.pad(part, ((0, 0), (1, 0))) for part in (loc, scale))
    assert row.value == pytest.approx(expected(loc, scale, data["x"].numpy(), data["y"].numpy()), abs=1e-6)


def test_optimum_is_that_on_many_draws(fit):
    data = softmax_data()
    found = fit(softmax, data)
    drawn = fit(softmax, data, options=vem.FitOptions(compiled=False, num_draws=4096))
    assert drawn.plan["y"].method == "draws"
    for key in ("guide.loc.w", "guide.scale.w"):
        off = (found.guide_params[key] - drawn.guide_params[key]) / drawn.guide_params["guide.scale.w"]
        assert off.abs().max() < 0.02
    assert found.elbo == pytest.approx(drawn.elbo, abs=4 * drawn.elbo_se + 0.01)


@pytest.mark.parametrize(("model", "categories", "nodes"), [(softmax, 4, 24), (with_reference, 6, 16)])
def test_independent_logits_take_one_integral(fit, model, categories, nodes):
    """Whatever their number; the first may be random or not."""
    data = softmax_data(12, 2, categories)
    found = fit(model, data)
    assert found.converged
    assert found.plan["y"].method == "quadrature"
    loc, scale = (found.guide_params[f"guide.{key}.w"].reshape(2, -1).numpy() for key in ("loc", "scale"))
    if model is with_reference:
        loc, scale = (np.pad(part, ((0, 0), (1, 0))) for part in (loc, scale))
    assert found.terms["y"].value == pytest.approx(
        expected(loc, scale, data["x"].numpy(), data["y"].numpy(), nodes), abs=1e-6
    )


def test_ten_categories_agree_with_draws(fit):
    data = softmax_data(200, 3, 10)
    found = fit(softmax, data)
    assert found.plan["y"].method == "quadrature"
    assert found.plan["y"].proof == "affine in w, checked against the model"
    assert_is_average(found)


def test_many_categories_are_drawn(fit):
    drawn = fit(softmax, softmax_data(20, 1, 31))
    assert drawn.plan["y"].method == "draws"
    assert "31 categories" in drawn.plan["y"].proof


def test_logits_that_share_latents_take_a_grid_or_draws(fit):
    few, many = (fit(nested, softmax_data(12, 1, categories)) for categories in (4, 6))
    assert few.plan["y"].method == "quadrature"
    assert many.plan["y"].method == "draws"
    assert "5 random slots together" in many.plan["y"].proof
    assert_is_average(few)


def test_slots_that_are_the_same_are_one(fit):
    """Three categories with one predictor: their log odds beside the fourth are the same number."""

    def tied(x, y, categories):
        a, b = (pyro.sample(name, dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1)) for name in "ab")
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(logits=torch.stack([x @ a, x @ b, x @ b, x @ b], -1)), obs=y)

    data = softmax_data(categories=4)
    found = fit(tied, data)
    assert found.plan["y"].method == "quadrature"
    q, x, y = found.guide_params, data["x"].numpy(), data["y"].numpy()
    m_a, s_a, m_b, s_b = (q[f"guide.{key}.{site}"].numpy() for site in "ab" for key in ("loc", "scale"))
    z, weights = np.polynomial.hermite_e.hermegauss(40)
    mean, sd = x @ (m_a - m_b), np.sqrt(x**2 @ (s_a**2 + s_b**2))
    odds = mean[:, None] + sd[:, None] * z  # of the first beside any of the others
    log_p = np.where(y[:, None] == 0, odds, 0.0) - np.logaddexp(odds, np.log(3.0))
    assert found.terms["y"].value == pytest.approx((log_p @ weights).sum() / weights.sum(), abs=1e-7)


def test_one_category_is_certain(fit):
    data = {**softmax_data(categories=1), "categories": 1}
    found = fit(softmax, data)
    assert found.converged
    assert found.elbo == pytest.approx(0.0, abs=1e-9)


def test_nodes_that_take_too_long_are_kept_where_they_are_near(fit, monkeypatch):
    """The plan says how near; draws would be farther."""
    data = softmax_data(60, 2, 4)
    exact = fit(nested, data)
    monkeypatch.setattr(expect, "MOST_CHECKED", 100_000)
    monkeypatch.setattr(expect, "MOST_POINTS", 3_000)
    found = fit(nested, data)
    row = found.plan["y"]
    assert row.method == "quadrature"
    assert "nats" in row.proof
    assert found.elbo == pytest.approx(exact.elbo, abs=0.01)
    monkeypatch.setattr(expect, "NEARLY", 1e-9)
    assert fit(nested, data).plan["y"].method == "draws"


def test_two_categories_are_a_logistic_regression(fit):
    data = softmax_data(categories=2)
    found = fit(with_reference, data)

    def logistic(x, y, categories):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], 1), 2.0).to_event(2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(x @ w)[:, 0]), obs=y)

    other = fit(logistic, {**data, "y": data["y"].double()})
    assert found.elbo == pytest.approx(other.elbo, abs=1e-7)


def test_rows_that_are_masked_say_nothing(fit):
    """Whatever category stands in for what is missing."""

    def masked(x, y, is_known):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], 3), 2.0).to_event(2))
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=is_known):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    data = softmax_data()
    x, y, is_known = data["x"], data["y"], torch.arange(60) % 4 > 0
    fits = [
        fit(masked, {"x": x, "y": torch.where(is_known, y, other), "is_known": is_known}) for other in (0, 2)
    ]
    kept = fit(softmax, {"x": x[is_known], "y": y[is_known], "categories": 3})
    assert fits[0].elbo == fits[1].elbo == pytest.approx(kept.elbo, abs=1e-7)
    assert fits[0].plan["y"].method == "quadrature"


def test_groups_have_effects_of_their_own(fit):
    """Slots that share latents, and latents in a plate."""

    def grouped(y, group):
        with pyro.plate("groups", 4):
            u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(logits=a + u[group]), obs=y)

    y = softmax_data()["y"]
    found = fit(grouped, {"y": y, "group": torch.arange(60) % 4})
    assert found.plan["y"].method == "quadrature"
    loc = found.guide_params["guide.loc.a"] + found.guide_params["guide.loc.u"]
    scale = (found.guide_params["guide.scale.a"] ** 2 + found.guide_params["guide.scale.u"] ** 2).sqrt()
    total = sum(
        expected(loc[g : g + 1].numpy(), scale[g : g + 1].numpy(), np.ones((15, 1)), y[g::4].numpy())
        for g in range(4)
    )
    assert found.terms["y"].value == pytest.approx(total, abs=1e-6)


def test_nodes_may_come_in_parts(fit, monkeypatch):
    data = softmax_data()
    whole = fit(softmax, data)
    monkeypatch.setattr(nodes, "MOST_AT_NODES", 500)
    parts = fit(softmax, data)
    assert parts.elbo == pytest.approx(whole.elbo, abs=1e-9)
    with isolated(torch.float64):
        assert torch.allclose(parts.guide_params["guide.loc.w"], whole.guide_params["guide.loc.w"], atol=1e-6)


def on_a_grid(m, s):
    """E log sum exp of three independent Gaussians by a tensor grid."""
    z, weights = nodes.tensor_grid(forms.gauss_hermite(40), 3)
    return weights @ torch.logsumexp(m + s * z[:, :, None], 1)


def test_one_integral_is_a_grid_over_all_logits():
    with isolated(D):
        generator = torch.Generator().manual_seed(0)
        m, s = torch.randn(3, 5, generator=generator), 1.5 * torch.rand(3, 5, generator=generator)
        found = mean_log_sum(m, s, *forms.trapezoid(32))
        assert torch.allclose(found, on_a_grid(m, s), rtol=0, atol=1e-9)
        assert (mean_log_sum(m, s, *forms.gauss_hermite(3)) - found).abs().max() > 1e-6


def test_one_integral_has_exact_derivatives():
    """Those of what the nodes give, so that values and gradients tell one story."""
    with isolated(D):
        generator = torch.Generator().manual_seed(1)
        m, s = (f(6, 3, generator=generator).requires_grad_() for f in (torch.randn, torch.rand))
        rule = forms.gauss_hermite(8)
        assert torch.autograd.gradcheck(lambda m, s: mean_log_sum(m, s, *rule), (m, s))
        assert torch.autograd.gradgradcheck(lambda m, s: mean_log_sum(m, s, *rule), (m, s))


def test_one_integral_is_right_to_rounding(monkeypatch):
    """Its grid moves with the rows: an error of 1e-11 would be noise that hides the last steps of a fit."""
    with isolated(D):
        generator = torch.Generator().manual_seed(2)
        m, s = 2 * torch.randn(8, 50, generator=generator), torch.rand(8, 50, generator=generator)
        rule = forms.gauss_hermite(6)
        found = mean_log_sum(m, s, *rule)
        monkeypatch.setattr(softmax_module, "STEP", 0.1)
        monkeypatch.setattr(softmax_module, "LEFT", 5.0)
        monkeypatch.setattr(softmax_module, "RIGHT", 20.0)
        assert float((found - mean_log_sum(m, s, *rule)).abs().max()) < 5e-13


@pytest.mark.parametrize("sd", [0.0, 300.0, 1e200])
def test_one_integral_has_a_value_everywhere(sd):
    with isolated(D):
        m = torch.tensor([-800.0, 0.0, 800.0]).repeat(2).unsqueeze(1)
        value = mean_log_sum(m, torch.full_like(m, sd), *forms.trapezoid(32))
        assert value.isfinite().all()
        assert value >= 800 + math.log(2) - 1e-9


def test_wide_logits_are_left_to_draws(fit):
    """Beyond ten sds a row would take hundreds of points: few categories take a grid, more are drawn."""

    def vague(x, y, categories):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], categories), 100.0).to_event(2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    few, many = (fit(vague, softmax_data(20, 3, categories)) for categories in (4, 8))
    assert few.plan["y"].method == "quadrature"
    assert many.plan["y"].method == "draws"
    assert "sds of" in many.plan["y"].proof


def test_many_categories_of_many_rows_are_drawn(fit, monkeypatch):
    """Their second derivatives would fill the memory."""
    monkeypatch.setattr(expect, "MOST_KEPT", 10_000)
    found = fit(softmax, softmax_data(60, 1, 7))
    assert found.plan["y"].method == "draws"
    assert "6 random slots together" in found.plan["y"].proof


def test_rare_categories_are_no_trouble(fit):
    """One that was never observed."""
    data = softmax_data(100, 2, 7)
    found = fit(softmax, {**data, "y": data["y"].clamp(max=5)})
    assert found.converged
    assert found.plan["y"].method == "quadrature"


def test_latents_in_small_units_are_seen(fit):
    """Shared by half of the categories, by a coefficient whose square is beyond rounding of the others'."""

    def shared(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 2.0).to_event(1))
        u = pyro.sample("u", dist.Normal(0.0, 3e4))
        with pyro.plate("rows", len(y)):
            logits = x * w + 1e-5 * u * (torch.arange(6) >= 3).double()
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    data = softmax_data(40, 1, 6)
    found = fit(shared, {"x": data["x"], "y": data["y"]})
    assert found.plan["y"].method == "draws"
    assert "5 random slots together" in found.plan["y"].proof


@pytest.mark.parametrize(("sd", "categories", "seed"), [(100.0, 4, 5), (50.0, 5, 2)])
def test_vague_priors_beside_separable_data_converge(fit, sd, categories, seed):
    """Factors grow wide within a step: values there must not be noise."""
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(seed)).double()
    w = torch.randn(2, categories, generator=torch.Generator().manual_seed(seed + 1)).double()

    def vague(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, categories), sd).to_event(2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    assert fit(vague, {"x": x, "y": (x @ w).argmax(-1)}).converged
