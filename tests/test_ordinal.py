"""Ordered logistic regressions, and other models that fill tensors they make."""

import pyro
import pyro.distributions as dist
import pytest
import torch


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
