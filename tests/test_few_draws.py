"""Fixed draws: as few on the way as give the same bound, and all of them where a fit ends."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vem as vem


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
    assert {row.draws for row in result.history} == {256, 32}
    z = torch.tensor([0.3, -0.8])

    def exact(y):
        pyro.sample(
            "y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand([2]).to_event(1), obs=y
        )

    assert {row.draws for row in fit(exact, {"y": z}).history} == {0}
    curve = vem.plots.elbo(result).lines[0].get_ydata()
    assert (curve[1:] <= curve[:-1] + 1e-9).all()
