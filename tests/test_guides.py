"""Guides: every support and plate, in SVI and Predictive, ours and Pyro's own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn

import pyro_vem as vem
from pyro_vem.bound.transport import noise_event, transport


def supports(y):
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    ordered = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0), [dist.transforms.OrderedTransform()]
    )
    pyro.sample("ordered", ordered)
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Dirichlet(torch.ones(2)))
            pyro.sample("y", dist.Normal(a + b[..., 0], 1.0), obs=y)


Y = torch.tensor([[0.5, 1.0, -0.5], [2.0, 1.5, 1.0]])


def test_mean_field_covers_every_support():
    guide = vem.MeanFieldNormal(supports)
    guide_trace = poutine.trace(guide).get_trace(Y)
    model_trace = poutine.trace(poutine.replay(supports, trace=guide_trace)).get_trace(Y)
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name in ("outer", "inner"):
            continue
        q = guide_trace.nodes[name]
        assert bool(site["fn"].support.check(q["value"]).all()), name
        assert q["value"].shape == site["value"].shape
        assert q["log_prob"].shape == site["log_prob"].shape, name
        assert bool(torch.isfinite(q["log_prob"]).all()), name


def test_every_support_fits(fit):
    result = fit(supports, {"y": Y})
    assert result.converged
    draws = result.sample(2000)
    assert draws["cholesky"].shape == (2000, 3, 3)
    assert torch.allclose(draws["simplex"].sum(-1), torch.ones(2000, dtype=torch.float64))
    assert bool((draws["ordered"].diff(dim=-1) > 0).all())
    assert float(draws["a"][:, 1].mean()) > float(draws["a"][:, 0].mean())
    sampled, densities = result.draw(2000, 3, "values", "densities").values()
    assert bool(torch.isfinite(densities["log_p"] - densities["log_q"]).all())
    assert "simplex" in sampled


def test_log_q_is_the_density_of_the_value():
    """At a simplex site, against the change of variables written out."""
    guide = vem.MeanFieldNormal(lambda: pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))))
    torch.set_default_dtype(torch.float64)
    try:
        site = poutine.trace(guide).get_trace().nodes["p"]
        transform = torch.distributions.biject_to(dist.constraints.simplex)
        u = transform.inv(site["value"])
        base = dist.Normal(pyro.param("guide.loc.p"), pyro.param("guide.scale.p"))
        expected = base.log_prob(u).sum() - transform.log_abs_det_jacobian(u, site["value"])
        assert float(site["fn"].log_prob(site["value"]).detach()) == pytest.approx(float(expected.detach()))
    finally:
        torch.set_default_dtype(torch.float32)


def test_mean_field_in_svi_and_predictive():
    guide = vem.MeanFieldNormal(zoo.eight_schools)
    args = (zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y)
    svi = SVI(zoo.eight_schools, guide, pyro.optim.Adam({"lr": 0.05}), vem.AnalyticKL_ELBO())
    losses = [svi.step(*args) for _ in range(400)]
    assert sum(losses[-50:]) / 50 == pytest.approx(-zoo.SCHOOLS_BEST_ELBO, abs=0.6)
    assert sum(losses[:10]) / 10 > -zoo.SCHOOLS_BEST_ELBO + 1
    draws = Predictive(zoo.eight_schools, guide=guide, num_samples=7)(zoo.SCHOOLS_SIGMA)
    assert draws["theta"].shape == (7, 8)


def test_init_values_strategies_and_improper_sites(fit):
    def model(y):
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), (2,)))
        s = pyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1) * 0.5 + b[..., 0] * 0.5, s), obs=y)

    guide = vem.MeanFieldNormal(model, init={"b": torch.tensor([1.0, -1.0]), "s": torch.tensor(2.0)})
    assert guide(torch.zeros(3))["b"].shape == (2,)
    assert torch.equal(pyro.param("guide.loc.b").detach(), torch.tensor([1.0, -1.0]))
    assert pyro.param("guide.loc.s").item() == pytest.approx(math.log(2.0))
    pyro.clear_param_store()
    strategy = init_to_value(values={"b": torch.zeros(2), "s": torch.tensor(1.0)})
    y = torch.randn(40)
    for init in (strategy, {"b": [0.0, 0.0], "s": 1.0}):
        result = fit(zoo_line, {"y": y, "x": torch.randn(40)}, init={"a": 0.3})
        assert result.converged
        early = fit(model, {"y": y}, init=init, max_iter=1)
        assert early.guide_params["guide.loc.b"].shape == (2,)


def zoo_line(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)


class Encoder(nn.Module):
    def __init__(self, kind="good"):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))
        self.log_scale = nn.Parameter(torch.tensor(-0.5))
        self.kind = kind

    def forward(self, y):
        loc, scale = self.slope * y, self.log_scale.exp().expand_as(y)
        return {
            "good": (loc, scale),
            "shape": (loc[:2], scale),
            "negative": (loc, -scale),
            "single": loc,
        }[self.kind]


def local(y):
    m = pyro.sample("m", dist.Normal(0.0, 0.1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_amortized_guide_leaves_other_sites_mean_field(fit):
    y = torch.linspace(-2, 2, 9)
    guide = vem.AmortizedNormal(local, {"z": Encoder()}, inputs="y")
    result = fit(local, {"y": y}, guide=guide)
    assert result.converged
    assert set(result.guide_params) == {
        "guide.encoder.z$$$slope", "guide.encoder.z$$$log_scale", "guide.loc.m", "guide.scale.m"
    }  # fmt: skip
    free = fit(local, {"y": y})  # by symmetry the encoder can be exact
    assert result.elbo == pytest.approx(free.elbo, abs=1e-3)
    assert guide.encoders["z"].slope.item() == pytest.approx(0.1), "the user's encoder is not trained"
    drawn = Predictive(local, guide=result.guide, num_samples=4)(y)
    assert drawn["m"].shape == (4, 1)  # as Predictive shapes sites outside of plates


def test_under_svi_a_guide_sees_the_data_of_each_step():
    """Another number of rows, another mask, other bounds than at the first call."""

    def model(y, seen, width):
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(width), width))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = vem.AmortizedNormal(model, {"z": Encoder()}, inputs="y")
    y, seen = torch.linspace(-3, 3, 20), torch.arange(20) % 3 != 1
    width = torch.linspace(9, 1, 20)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), vem.AnalyticKL_ELBO())
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20), slice(0, 8)):
        batch = (y[rows], seen[rows], width[rows])
        assert math.isfinite(svi.step(*batch))
        drawn = pyro.poutine.trace(guide).get_trace(*batch).nodes["z"]
        assert torch.equal(drawn["mask"], seen[rows])
        assert bool((drawn["value"] < width[rows]).all())
        assert torch.equal(guide.latents(*batch)[0].support.upper_bound, width[rows])


@pytest.mark.parametrize(
    ("kind", "words"), [("shape", "of shape"), ("negative", "not positive"), ("single", "return a tuple")]
)
def test_bad_encoders_are_named(fit, kind, words):
    guide = vem.AmortizedNormal(local, {"z": Encoder(kind)}, inputs="y")
    with pytest.raises(vem.ModelError, match=f"encoder of site 'z'.*{words}"):
        fit(local, {"y": torch.ones(3)}, guide=guide)


def test_unknown_encoder_sites_and_inputs_are_named(fit):
    with pytest.raises(vem.ModelError, match=r"inputs of site 'z'.*'yy' \(did you mean 'y'"):
        vem.AmortizedNormal(local, {"z": Encoder()}, inputs="yy")
    guide = vem.AmortizedNormal(local, {"zz": Encoder()}, inputs="y")
    with pytest.raises(vem.ModelError, match=r"encoders.*'zz' \(did you mean 'z'"):
        fit(local, {"y": torch.ones(3)}, guide=guide)


def correlated(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def correlated_evidence(y):
    cov = torch.eye(len(y)) + 2.0
    return float(dist.MultivariateNormal(torch.zeros(len(y)), cov).log_prob(y))


@pytest.mark.parametrize("auto", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_full_rank_autoguides_reach_the_evidence(fit, auto):
    y = torch.tensor([1.0, 2.0, 3.0])
    result = fit(correlated, {"y": y}, guide=auto(correlated))
    assert result.converged
    assert result.elbo == pytest.approx(correlated_evidence(y), abs=1e-3)
    mean_field = fit(correlated, {"y": y})
    assert mean_field.elbo < result.elbo - 0.1


def test_vectors_that_are_one_event_have_noise_of_their_own(fit):
    """All four had the same: a bound 1.5 nats off with a standard error of 0, and draws that were alike."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=torch.tensor(1.0))

    def guide():
        loc = pyro.param("loc", torch.zeros(4, 2))
        start = torch.eye(2).repeat(4, 1, 1)
        root = pyro.param("root", start, constraint=dist.constraints.lower_cholesky)
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=root).to_event(1))

    result = fit(model, {}, guide=guide)
    loc, root = result.guide_params["loc"], result.guide_params["root"]
    q = dist.MultivariateNormal(loc, scale_tril=root)
    spread = (1 - loc.sum()) ** 2 + (root.sum(-2) ** 2).sum()
    prior = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    divergence = torch.distributions.kl_divergence(q, prior).sum()
    exact = -0.5 * math.log(2 * math.pi * 0.25) - spread / 0.5 - divergence
    assert result.elbo == pytest.approx(float(exact), abs=max(1e-6, 4 * result.elbo_se))
    draws = result.sample(4000)["x"][:, :, 0]
    assert torch.allclose(torch.corrcoef(draws.T), torch.eye(4).to(draws), atol=0.1)


@pytest.mark.parametrize("family", ["Dirichlet", "LowRankMultivariateNormal"])
def test_rows_of_an_event_are_independent(family):
    fn = {
        "Dirichlet": dist.Dirichlet(torch.ones(5, 2, 3)),
        "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(
            torch.zeros(5, 2, 3), torch.ones(5, 2, 3, 1), torch.ones(5, 2, 3)
        ),
    }[family].to_event(1)
    noise = noise_event({"name": "x", "fn": fn})
    value = transport(fn, torch.randn(5, *noise, generator=torch.Generator().manual_seed(0)))
    assert value.shape == (5, 2, 3)
    assert not torch.allclose(value[:, 0], value[:, 1])


def test_a_full_covariance_of_sixty_is_exact(fit):
    """Solving for the noise of such a guide, rounding made bounds of 1e134 nats out of far points."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(60, 60, generator=generator, dtype=torch.float64) / 60**0.5
    mean = torch.randn(60, generator=generator, dtype=torch.float64)
    cov = root @ root.T + 0.1 * torch.eye(60, dtype=torch.float64)

    def target(mean, cov):
        pyro.sample("z", dist.MultivariateNormal(mean, cov))

    guide, options = AutoMultivariateNormal(target), vem.FitOptions(step_iterations=40)
    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(target, {"mean": mean, "cov": cov}, guide=guide, options=options, max_iter=5)
    assert result.converged
    assert result.elbo == pytest.approx(0.0, abs=1e-6)
    params = {name.split(".")[-1]: value for name, value in result.guide_params.items()}
    tril = params["scale"].unsqueeze(-1) * params["scale_tril"]
    assert torch.allclose(tril @ tril.T, cov, atol=1e-4)
    assert torch.allclose(params["loc"], mean, atol=1e-4)


def test_autonormal_agrees_with_ours(fit):
    ours = fit(zoo.eight_schools, zoo.SCHOOLS)
    theirs = fit(zoo.eight_schools, zoo.SCHOOLS, guide=AutoNormal(zoo.eight_schools))
    assert theirs.converged
    assert theirs.plan.exact == ours.plan.exact == ("mu", "tau", "t", "y")
    assert theirs.elbo == pytest.approx(ours.elbo, abs=1e-5)
    for site in ("mu", "tau", "t"):
        ours_loc = ours.guide_params[f"guide.loc.{site}"]
        assert torch.allclose(theirs.guide_params[f"AutoNormal.locs.{site}"], ours_loc, atol=1e-3)


def test_autodelta_is_map(fit):
    def model(y):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    y = torch.tensor([1.0, -2.0, 0.5])
    delta = fit(model, {"y": y}, guide=AutoDelta(model))
    point = fit(vem.vem_model(map_sites=("s",))(model), {"y": y})
    found = float(delta.guide_params["AutoDelta.s"])
    assert found == pytest.approx(float(point.params["s"]), rel=1e-3)


def test_a_gamma_guide_reaches_the_conjugate_posterior(fit):
    counts = torch.tensor([3.0, 5.0, 4.0])

    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts):
        a = pyro.param("a", torch.tensor(3.0), constraint=dist.constraints.positive)
        b = pyro.param("b", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))

    result = fit(model, {"counts": counts}, guide=guide)
    assert result.converged
    assert float(result.guide_params["a"]) == pytest.approx(14.0, rel=1e-2)
    assert float(result.guide_params["b"]) == pytest.approx(4.0, rel=1e-2)
    n, total = len(counts), float(counts.sum())
    evidence = math.lgamma(2 + total) - (2 + total) * math.log(1 + n)
    evidence -= sum(math.lgamma(1 + float(c)) for c in counts)
    assert result.elbo == pytest.approx(evidence, abs=2e-3)


def test_trace_elbo_sees_the_same_guide(fit):
    """The guide at its fitted values is an ordinary guide: Pyro's own ELBO agrees."""
    result = fit(zoo.eight_schools, zoo.SCHOOLS)
    args = (zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y)
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with pyro.poutine.scale(scale=1.0):
        loss = elbo.loss(zoo.eight_schools, result.guide, *args)
    assert -loss == pytest.approx(result.elbo, abs=0.1)
