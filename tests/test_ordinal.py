"""Ordered logistic regressions, and other models that fill tensors they make."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special

import pyro_vem as vem
from pyro_vem.bound.compiled import categories
from pyro_vem.bound.compiled.categories import ordered

FIXED = torch.eye(2)


def ordinal_data(rows=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    score = x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.logit(u)
    return {"x": x, "y": torch.bucketize(score, torch.tensor([-1.0, 0.5, 1.5]).double())}


def latent_cutpoints(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    c = pyro.sample("c", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ b, c), obs=y)


def test_filled_tensors_run_at_once(fit):
    """OrderedLogistic writes its probabilities into zeros, which vmap refuses; a run a draw took minutes."""
    result = fit(latent_cutpoints, ordinal_data())
    assert result.converged
    assert not any("vmap" in note for note in result.plan.notes)


def summed_exponentials(x, y=None):
    """Cutpoints as many models write them."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    c = pyro.sample("c", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    cutpoints = torch.cat([c[:1], c[:1] + c[1:].exp().cumsum(0)])
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ b, cutpoints), obs=y)


def expected(x, y, b, c, nodes=30):
    """Sum over rows of E log p, by a grid over the predictor and the logs of two gaps."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    low, *gaps = (z[(slice(None), *(None,) * k)] for k in (2, 1, 0))
    first, second = (np.exp(c[0][j] + c[1][j] * gap) for j, gap in enumerate(gaps, 1))
    weight = weights[:, None, None] * weights[:, None] * weights
    total = 0.0
    for row, k in zip(x, y, strict=True):
        mean, sd = row @ b[0] - c[0][0], np.sqrt(row**2 @ b[1] ** 2 + c[1][0] ** 2)
        ends = [-np.inf, 0.0, first, first + second, np.inf]
        upper, lower = (special.expit(end - (mean + sd * low)) for end in (ends[k + 1], ends[k]))
        total += (weight * np.log(upper - lower)).sum()
    return total


@pytest.mark.parametrize("model", [latent_cutpoints, summed_exponentials])
def test_random_cutpoints_have_exact_expectations(fit, model):
    data = ordinal_data()
    found = fit(model, data)
    assert found.converged
    assert found.terms["y"].method == "quadrature"
    b, c = ([found.guide_params[f"guide.{k}.{n}"].numpy() for k in ("loc", "scale")] for n in "bc")
    assert found.terms["y"].value == pytest.approx(expected(data["x"].numpy(), data["y"], b, c), abs=1e-6)


@pytest.mark.parametrize("wide", [0.0, 20.0])
@pytest.mark.parametrize("narrow", [-37.0, -20.0, 2.0])
def test_narrow_categories_beyond_wide_ones_keep_their_width(wide, narrow):
    """A difference of sums would have lost it."""
    at = torch.tensor([wide, narrow, wide]).double()
    slots = {categories.LOW: at[:1].exp(), f"{categories.GAP}1": at[:1], f"{categories.GAP}2": at[1:2]}
    y = torch.tensor([2.0]).double()
    value = categories.log_between(y, slots)
    assert value.item() == pytest.approx(narrow - 2 * np.log(2.0) if narrow < 0 else value.item(), abs=1e-6)
    leaves = {name: slot.requires_grad_() for name, slot in slots.items()}
    truth = torch.autograd.grad(categories.log_between(y, leaves).sum(), list(leaves.values()))
    with torch.no_grad():
        found = categories.slopes_between(y, slots, list(slots))[0]
    assert torch.allclose(torch.cat(truth), torch.cat(found), atol=1e-9)


def test_optimum_with_random_cutpoints_is_that_on_many_draws(fit):
    data = ordinal_data()
    found = fit(latent_cutpoints, data)
    drawn = fit(latent_cutpoints, data, options=vem.FitOptions(compiled=False, num_draws=4096))
    for site in "bc":
        loc, scale = (f"guide.{key}.{site}" for key in ("loc", "scale"))
        off = (found.guide_params[loc] - drawn.guide_params[loc]) / drawn.guide_params[scale]
        assert off.abs().max() < 0.02


def test_many_random_cutpoints_are_drawn(fit):
    def seven(y):
        base = dist.Normal(torch.zeros(6), 2.0).to_event(1)
        c = pyro.sample("c", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.OrderedLogistic(torch.zeros(len(y)), c), obs=y)

    row = fit(seven, {"y": torch.arange(70) % 7}).plan["y"]
    assert row.method == "draws"
    assert row.proof == "6 random slots together"


@pytest.mark.parametrize(
    "make", [lambda: torch.eye(2), lambda: torch.tensor([[1.0, 0.0], [0.0, 1.0]]), lambda: FIXED.clone()]
)
def test_tensors_that_begin_as_others_are_filled_at_once(fit, make):
    """One run a draw took 25 s instead of 0.3 s for 20 rows."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        mixing = make()
        mixing[0, 1] = a.sin()
        pyro.sample("y", dist.Normal(mixing.sum(), 1.0), obs=torch.tensor(1.0))

    result = fit(model, {})
    assert result.converged
    assert "vmap" not in str(result.plan)


def test_filled_tensors_have_the_values_of_single_runs(fit):
    """A path through time that is written into zeros, step by step, beside one that is stacked."""
    steps = torch.tensor([0.3, 1.0, 0.2, -0.5]).double()

    def path(y, is_filled):
        rho = pyro.sample("rho", dist.Normal(0.0, 0.5))
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        states, now = [], torch.zeros(())
        for step in steps:
            now = torch.tanh(rho * now + step) * sd
            states.append(now)
        filled = torch.zeros(4)
        for t, state in enumerate(states):
            filled[t] = state
        with pyro.plate("time", 4):
            pyro.sample("y", dist.Normal(filled if is_filled else torch.stack(states), 0.3), obs=y)

    y = torch.tensor([0.2, 0.5, 0.3, -0.2]).double()
    filled, stacked = (fit(path, {"y": y, "is_filled": is_filled}) for is_filled in (True, False))
    assert filled.elbo == pytest.approx(stacked.elbo, abs=1e-9)
    assert filled.plan.notes == stacked.plan.notes


def test_maximum_likelihood_is_that_of_statsmodels(fit):
    miscmodels = pytest.importorskip("statsmodels.miscmodels.ordinal_model")

    def model(x, y=None):
        b = pyro.param("b", torch.zeros(2))
        c = pyro.param("c", torch.linspace(-1.0, 1.0, 3), constraint=dist.constraints.ordered_vector)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(x @ b, c), obs=y)

    data = ordinal_data()
    result = fit(model, data)
    ordered = miscmodels.OrderedModel(data["y"].numpy(), data["x"].numpy(), distr="logit")
    peer = ordered.fit(method="newton", disp=False)
    assert result.elbo == pytest.approx(peer.llf, abs=1e-6)
    assert torch.allclose(result.params["b"], torch.as_tensor(peer.params[:2]), atol=1e-4)
    cutpoints = torch.as_tensor(ordered.transform_threshold_params(peer.params)[1:-1])
    assert torch.allclose(result.params["c"], cutpoints, atol=1e-4)


def test_probabilities_of_ordered_categories_are_exact():
    predictor = torch.linspace(-3.0, 3.0, 7).double()
    cuts = torch.tensor([-1.0, 0.2, 0.3]).double()
    for k in range(4):
        upper, lower = cuts[min(k, 2)], cuts[max(k - 1, 0)]
        y = torch.tensor(torch.inf if k == 3 else float(k))
        above = torch.nn.functional.softplus(predictor - upper)
        below = torch.nn.functional.softplus(lower - predictor)
        truth = dist.OrderedLogistic(predictor, cuts).log_prob(torch.tensor(k))
        assert torch.allclose(ordered(y, upper - lower, above, below), truth, atol=1e-12)


def with_roles(**roles):
    """`proportional_odds` with roles of its own: they are attached to the function itself."""

    def model(x, cuts, y=None):
        return proportional_odds(x, cuts, y)

    return vem.vem_model(**roles)(model)


def proportional_odds(x, cuts, y=None, kept=None):
    """Cutpoints that are data, parameters or MAP sites; rows may be masked."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    c = torch.as_tensor([-1.0, 0.5, 1.5]) if cuts == "known" else None
    if cuts == "parameter":
        c = pyro.param("c", torch.linspace(-1.0, 1.0, 3), constraint=dist.constraints.ordered_vector)
    if cuts == "map":
        base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
        c = pyro.sample("c", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=True if kept is None else kept):
        pyro.sample("y", dist.OrderedLogistic(x @ b, c), obs=y)


def expected_log_likelihood(fit, data, cuts):
    """Of the fitted factors, by 64 Gauss-Hermite nodes a row: a predictor is Gaussian."""
    loc, scale = fit.guide_params["guide.loc.b"], fit.guide_params["guide.scale.b"]
    mean, sd = data["x"] @ loc, (data["x"].square() @ scale.square()).sqrt()
    x, w = np.polynomial.hermite_e.hermegauss(64)
    eta = mean + sd * torch.as_tensor(x).unsqueeze(1)
    log_p = dist.OrderedLogistic(eta, torch.as_tensor(cuts).double()).log_prob(data["y"])
    return float(torch.as_tensor(w / w.sum()) @ log_p.sum(-1))


@pytest.mark.parametrize("cuts", ["known", "parameter", "map"])
def test_ordered_logistic_terms_are_exact(fit, cuts):
    data = ordinal_data()
    model = with_roles(map_sites=("c",)) if cuts == "map" else proportional_odds
    result = fit(model, {**data, "cuts": cuts})
    assert result.converged
    assert result.plan["y"].method == "quadrature"
    assert "affine in b" in result.plan["y"].proof
    c = [-1.0, 0.5, 1.5] if cuts == "known" else result.params["c"]
    assert result.terms["y"].value == pytest.approx(expected_log_likelihood(result, data, c), abs=1e-6)


def test_cutpoints_that_are_parameters_are_at_their_best(fit):
    """Nothing is gained by cutpoints nearby, each with its own best factors."""
    data = ordinal_data()
    best = fit(proportional_odds, {**data, "cuts": "parameter"})
    for by in (-0.1, 0.1):
        for k in range(3):
            c = best.params["c"].clone()
            c[k] += by
            there = fit(with_roles(fixed=("c",)), {**data, "cuts": "parameter"}, init={"c": c})
            assert there.elbo < best.elbo - 0.01


def test_two_ordered_categories_are_a_logistic_regression(fit):
    data = ordinal_data()
    y = (data["y"] > 1).double()

    def ordinal(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(x @ b, c.unsqueeze(-1)), obs=y)

    def logistic(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ b - c), obs=y)

    one, other = fit(ordinal, {"x": data["x"], "y": y.long()}), fit(logistic, {"x": data["x"], "y": y})
    assert one.plan["y"].method == "quadrature"
    assert one.elbo == pytest.approx(other.elbo, abs=1e-7)


def test_masked_ordered_rows_count_for_nothing(fit):
    data = ordinal_data()
    kept = torch.arange(120) % 3 != 0
    masked = fit(proportional_odds, {**data, "cuts": "parameter", "kept": kept})
    fewer = fit(proportional_odds, {"x": data["x"][kept], "y": data["y"][kept], "cuts": "parameter"})
    assert masked.elbo == pytest.approx(fewer.elbo, abs=1e-7)
    assert masked.plan["y"].method == "quadrature"


def test_a_random_distance_of_cutpoints_is_conditioned_on(fit):
    data = ordinal_data(60)
    data["y"] = data["y"].clamp(max=2)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        first = pyro.sample("first", dist.Normal(0.0, 2.0))
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(x @ b, torch.stack([first, first + width])), obs=y)

    exact = fit(model, data)
    assert "given width" in exact.plan["y"].proof
    assert exact.plan["y"].method == "quadrature"
    drawn = fit(model, data, options=vem.FitOptions(compiled=False))
    assert abs(exact.elbo - drawn.elbo) < 4 * drawn.elbo_se + 1e-3
