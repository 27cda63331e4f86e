"""Masked rows of discrete sites: the fit without these rows."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

SUMMED = {"enumerate": "parallel"}
GENERATOR = torch.Generator().manual_seed(3)
Y = torch.cat([torch.randn(15, generator=GENERATOR), 4 + torch.randn(15, generator=GENERATOR)])
KEPT = torch.arange(30) % 3 == 0
SEQUENCES, LENGTHS = Y[10:30].reshape(5, 4), torch.tensor([4, 2, 3, 1, 4])


def weights(y, mask):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
        pyro.sample("y", dist.Normal(4.0 * z, 1.0), obs=y)


def mixture(y, mask):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 5.0]), 2.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def coin(y, mask):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Bernoulli(p), infer=SUMMED)
        pyro.sample("y", dist.Normal(4.0 * z, 1.0), obs=y)


def pairs(y, mask):
    """Each row is seen twice."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", len(y), dim=-2), poutine.mask(mask=mask.unsqueeze(-1)):
        z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
        with pyro.plate("twice", 2, dim=-1):
            pyro.sample("y", dist.Normal(4.0 * z, 2.0), obs=torch.stack([y, y + 1.0], -1))


@pytest.mark.parametrize("model", [weights, mixture, coin, pairs])
def test_masked_rows_are_as_if_they_were_not_there(fit, model):
    masked, dropped = (
        fit(model, data) for data in ({"y": Y, "mask": KEPT}, {"y": Y[KEPT], "mask": KEPT[KEPT]})
    )
    assert masked.elbo == pytest.approx(dropped.elbo, abs=1e-6)
    for name, value in dropped.guide_params.items():
        assert torch.allclose(masked.guide_params[name], value, rtol=1e-3), name
    assert torch.allclose(masked.responsibilities()["z"][KEPT], dropped.responsibilities()["z"], atol=1e-4)


def chain(y, lengths):
    """Sequences in a plate, padded to the longest."""
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    z = 0
    with pyro.plate("sequences", len(y)):
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z{t}", dist.Categorical(rows[z]), infer=SUMMED)
                pyro.sample(f"y{t}", dist.Normal(4.0 * z, 1.0), obs=y[:, t])


def ragged(y, lengths):
    """The same sequences one by one, each as long as it is."""
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    for i, length in enumerate(lengths.tolist()):
        z = 0
        for t in pyro.markov(range(length)):
            z = pyro.sample(f"z{i}_{t}", dist.Categorical(rows[z]), infer=SUMMED)
            pyro.sample(f"y{i}_{t}", dist.Normal(4.0 * z, 1.0), obs=y[i, t])


def test_padded_chains_are_as_long_as_they_are(fit):
    twin = fit(ragged, {"y": SEQUENCES[:2], "lengths": LENGTHS[:2]})
    for padding in (0, 2):
        y = torch.cat([SEQUENCES[:2], torch.zeros(2, padding)], 1)
        padded = fit(chain, {"y": y, "lengths": LENGTHS[:2]})
        assert padded.converged
        assert padded.elbo == pytest.approx(twin.elbo, abs=1e-6)
        name = "guide.concentration.rows"
        assert torch.allclose(padded.guide_params[name], twin.guide_params[name], rtol=1e-3)


def test_a_masked_site_with_live_data_keeps_its_density(fit):
    def model(y, mask):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("rows", len(y)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
            pyro.sample("y", dist.Normal(4.0 * z, 1.0), obs=y)

    masked, plain = (fit(model, {"y": Y, "mask": mask}) for mask in (KEPT, torch.ones(30) > 0))
    assert masked.elbo == pytest.approx(plain.elbo, abs=1e-6)
    assert "masked rows keep their density" in str(masked.plan)
    assert "masked rows" not in str(plain.plan)


def test_a_row_with_one_live_datum_counts(fit):
    def model(y, live):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("rows", len(y), dim=-2):
            with poutine.mask(mask=torch.tensor(False)):
                z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
            with pyro.plate("twice", 2, dim=-1), poutine.mask(mask=live):
                pyro.sample("y", dist.Normal(4.0 * z, 1.0), obs=torch.stack([y, y], -1))

    live = torch.zeros(30, 2, dtype=torch.bool)
    live[:10, 0] = True
    concentration = fit(model, {"y": Y, "live": live}).guide_params["guide.concentration.w"]
    assert float(concentration.sum()) == pytest.approx(2 + 10)


def test_models_of_parameters_keep_what_masked_rows_have(fit):
    def model(y, mask):
        w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=dist.constraints.simplex)
        with pyro.plate("rows", len(y)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Categorical(w), infer=SUMMED)
            pyro.sample("y", dist.Normal(4.0 * z, 1.0), obs=y)

    masked, dropped = (
        fit(model, data) for data in ({"y": Y, "mask": KEPT}, {"y": Y[KEPT], "mask": KEPT[KEPT]})
    )
    assert masked.elbo == pytest.approx(dropped.elbo, abs=1e-6)
    assert torch.allclose(masked.responsibilities()["z"][~KEPT], masked.params["w"], atol=1e-6)
