"""Exact KL only where it is proved: dependence, escapes, views of AutoNormal, supports."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from test_kl import INFINITE
from torch import distributions as td

import pyro_vem as vem
from pyro_vem.bound.support import check_support
from pyro_vem.bound.terms import site_terms

# How a parent's value reaches a child's mean: all must be seen.
LINKS = {
    "torch": lambda z: z,
    "float": lambda z: float(z),
    "item": lambda z: z.item(),
    "numpy": lambda z: float(z.detach().numpy()),
    "tolist": lambda z: z.tolist(),
    "branch": lambda z: 1.0 if z > 0 else -1.0,
    "index": lambda z: [0.5, -0.5][int(z > 0)],
    "copy": lambda z: torch.tensor(z.detach().clone().tolist()),
    "write": lambda z: torch.zeros(1).index_fill_(0, torch.tensor([0]), z.detach())[0],
    "setitem": lambda z: _written(z),
    "iterate": lambda z: next(iter(z.reshape(1))).detach(),
}


def _written(z):
    buffer = torch.zeros(2)
    buffer[1] = z.detach()
    return buffer[1]


def reversed_pair(link):
    """The model has z1 -> z2, the guide z2 -> z1 through `link`: z2 must never be exact."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(LINKS[link](z1), 1.0))

    def guide():
        z2 = pyro.sample("z2", dist.Normal(0.3, 0.8))
        pyro.sample("z1", dist.Normal(LINKS[link](z2), 0.5))

    return model, guide


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("link", LINKS)
def test_values_that_leave_torch_are_seen(link):
    plan = vem.AnalyticKL_ELBO().plan(*reversed_pair(link))
    assert plan["z2"].method == "draws", plan
    assert plan["z1"].method == "closed form"


def test_hidden_memory_is_found_by_redrawing():
    """The model reads what the guide left in a list: no tensor tells of it."""
    memory = []

    def guide():
        z2 = pyro.sample("z2", dist.Normal(0.3, 0.8))
        z1 = pyro.sample("z1", dist.Normal(0.5, 0.5))
        memory[:] = [torch.tensor([float(z1)]), z2]

    def model():
        pyro.sample("z1", dist.Normal(float(memory[0]) if memory else 0.0, 1.0))
        pyro.sample("z2", dist.Normal(0.0, 1.0))

    plan = vem.AnalyticKL_ELBO().plan(model, guide)
    assert plan["z1"].method == "draws"
    assert "found by redrawing" in plan["z1"].proof


def random_pair(seed):
    """A random pair of Gaussian programs, with the true arrows of each."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=random)

    def program():
        size = 3 + seed % 2
        order = torch.randperm(size, generator=random).tolist()
        arrows = {
            (a, b): (
                list(LINKS)[int(uniform(1) * 7)] if uniform(1) < 0.4 else "torch",
                float(uniform(1) - 0.5),
            )
            for i, b in enumerate(order)
            for a in order[:i]
            if uniform(1) < 0.5
        }
        shifts, sds = uniform(size) - 0.5, 0.5 + uniform(size)

        def run():
            values = {}
            for b in order:
                loc = shifts[b]
                for a in order:
                    if (a, b) in arrows:
                        link, weight = arrows[a, b]
                        loc = loc + weight * LINKS[link](values[a])
                values[b] = pyro.sample(f"z{b}", dist.Normal(loc, sds[b]))
            return values

        return run, set(arrows)

    latent, model_arrows = program()
    guide, guide_arrows = program()

    def model():
        values = latent()
        pyro.sample("y", dist.Normal(sum(values.values()), 1.0), obs=torch.tensor(0.7))

    return model, guide, model_arrows, guide_arrows


def reaches(arrows, start):
    found = {start}
    for _ in arrows:
        found |= {b for a, b in arrows if a in found}
    return found


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("programs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_random_programs_are_bounded_right(programs):
    """Closed forms average to what the same draws give, and only where the arrows allow it."""

    @settings(max_examples=programs, derandomize=True, deadline=None, database=None)
    @given(seed=st.integers(0, 2**31))
    def check(seed):
        _check_random_program(seed)

    check()


def _check_random_program(seed):
    pyro.set_rng_seed(seed)
    model, guide, model_arrows, guide_arrows = random_pair(seed)
    plan = vem.AnalyticKL_ELBO().plan(model, guide)
    for row in plan.rows:
        if row.kind == "KL" and row.method == "closed form":
            site = int(row.site[1:])
            parents = {a for a, b in model_arrows if b == site}
            assert not parents & reaches(guide_arrows, site), plan
    sampled = plan.demoted("for comparison")
    gaps = []
    for _ in range(60):
        q = poutine.trace(guide).get_trace()
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
        sites = [{n: s for n, s in t.nodes.items() if s["type"] == "sample"} for t in (q, p)]
        gaps.append(float(sum(site_terms(plan, *sites).values()) - sum(site_terms(sampled, *sites).values())))
    gaps = torch.tensor(gaps).double()
    assert abs(float(gaps.mean())) <= 4 * float(gaps.std()) / len(gaps) ** 0.5 + 1e-5


def test_most_sites_of_random_programs_are_exact():
    """The proof is not empty: what the arrows allow is mostly found."""
    allowed = exact = 0
    for seed in range(40):
        model, guide, model_arrows, guide_arrows = random_pair(seed)
        plan = vem.AnalyticKL_ELBO().plan(model, guide)
        for row in plan.rows:
            if row.kind == "KL":
                site = int(row.site[1:])
                parents = {a for a, b in model_arrows if b == site}
                allowed += not parents & reaches(guide_arrows, site)
                exact += row.method == "closed form"
    assert exact > 0.9 * allowed


def test_structure_is_proved_again_when_it_changes():
    state = {"prior": dist.Normal(0.0, 1.0)}

    def model():
        pyro.sample("z", state["prior"])

    def guide():
        pyro.sample("z", dist.Normal(0.3, 0.5))

    elbo = vem.AnalyticKL_ELBO()
    first = elbo.loss(model, guide)
    state["prior"] = dist.Laplace(0.0, 1.0)
    second = elbo.loss(model, guide)
    assert first != second
    assert second == pytest.approx(vem.AnalyticKL_ELBO().loss(model, guide))
    assert len(elbo._proved) == 2


def test_the_proof_leaves_generators_alone():
    model, guide = reversed_pair("torch")
    pyro.set_rng_seed(3)
    expected = Trace_ELBO().loss(model, guide), torch.rand(())
    pyro.set_rng_seed(3)
    elbo = vem.AnalyticKL_ELBO(analytic="never")
    assert elbo.loss(model, guide) == pytest.approx(expected[0], abs=1e-6)
    assert torch.equal(torch.rand(()), expected[1])


# AutoNormal: an auxiliary Normal and a Delta, seen as the transformed Normal that they are

PRIORS = {
    "LogNormal": (dist.LogNormal(0.0, 1.0), 0.0, 1.0),
    "Gamma": (dist.Gamma(3.0, 2.0), 0.238798, 0.577350),
    "Normal": (dist.Normal(2.0, 3.0), 2.0, 3.0),
    "HalfNormal": (dist.HalfNormal(1.0), None, None),
    "Beta": (dist.Beta(2.0, 3.0), None, None),
    "Uniform": (dist.Uniform(-1.0, 2.0), 0.0, None),
    "Dirichlet": (dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])), None, None),
    "LKJCholesky": (dist.LKJCholesky(3, 2.0), 0.0, None),
    "StudentT": (dist.StudentT(4.0, 1.0, 2.0), 1.0, None),
}


def guides_of(model):
    return {"MeanFieldNormal": vem.MeanFieldNormal(model), "AutoNormal": AutoNormal(model)}


@pytest.mark.parametrize("kind", ["MeanFieldNormal", "AutoNormal"])
@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_only_loss_has_no_noise(prior, kind):
    def model():
        with pyro.plate("rows", 2):
            pyro.sample("z", PRIORS[prior][0])

    guide = guides_of(model)[kind]
    guide()
    elbo = vem.AnalyticKL_ELBO()
    assert elbo.plan(model, guide)["z"].method == "closed form"
    losses = torch.tensor([elbo.loss(model, guide) for _ in range(20)])
    assert float(losses.std()) < 1e-6
    draws = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(2000)]).double()
    assert abs(float(losses[0] - draws.mean())) <= 5 * float(draws.std()) / len(draws) ** 0.5 + 1e-4


@pytest.mark.parametrize("kind", ["MeanFieldNormal", "AutoNormal"])
@pytest.mark.parametrize("prior", PRIORS)
def test_prior_only_fits_find_the_best_gaussian(fit, prior, kind):
    distribution, loc, scale = PRIORS[prior]

    def model():
        pyro.sample("z", distribution)

    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(model, guide=guides_of(model)[kind], tol=1e-12)
    values = list(result.guide_params.values())
    if loc is not None:
        assert torch.allclose(values[0], torch.tensor(loc).double(), atol=1e-5)
    if scale is not None:
        assert torch.allclose(values[1], torch.tensor(scale).double(), atol=1e-5)


def test_the_fitted_gamma_has_the_exact_mean(fit):
    """TraceMeanField_ELBO with AutoNormal, as its docstring advises, ends at 1.0."""

    def model():
        pyro.sample("s", dist.Gamma(3.0, 2.0))

    with pytest.warns(UserWarning, match="no observed site"):
        result = fit(model, guide=AutoNormal(model), tol=1e-14)
    loc, scale = (float(v) for v in result.guide_params.values())
    assert math.exp(loc + scale**2 / 2) == pytest.approx(1.5, abs=1e-6)


def test_autonormal_under_svi_keeps_its_jacobian():
    """500 Adam steps with TraceMeanField_ELBO end at -0.92."""

    def model():
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), vem.AnalyticKL_ELBO())
    svi.step()
    guide.locs.s = -1.0 * torch.ones(())  # a start away from the answer
    for _ in range(500):
        svi.step()
    assert abs(float(guide.locs.s.detach())) < 1e-3


def test_joint_autoguides_are_sampled_and_right():
    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, s))

    for guide in (AutoDiagonalNormal(model), AutoDelta(model)):
        pyro.set_rng_seed(0)
        guide()
        plan = vem.AnalyticKL_ELBO().plan(model, guide)
        assert not plan.exact
        pyro.set_rng_seed(1)
        ours = vem.AnalyticKL_ELBO().loss(model, guide)
        pyro.set_rng_seed(1)
        assert ours == pytest.approx(Trace_ELBO().loss(model, guide), abs=1e-5)


def test_a_delta_without_its_jacobian_is_not_seen_as_a_normal():
    def model():
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    def guide():
        u = pyro.sample("u", dist.Normal(0.1, 0.5), infer={"is_auxiliary": True})
        pyro.sample("s", dist.Delta(u.exp()))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["s"].method == "draws"


# Supports


@pytest.mark.parametrize("pair", INFINITE, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}")
def test_pairs_that_are_infinite_by_support_are_refused(pair):
    make = {
        td.Beta: lambda: td.Beta(2.0, 3.0), td.Pareto: lambda: td.Pareto(1.0, 2.0),
        td.ContinuousBernoulli: lambda: td.ContinuousBernoulli(0.3), td.Uniform: lambda: td.Uniform(0.0, 1.0),
        td.Exponential: lambda: td.Exponential(1.0), td.Gamma: lambda: td.Gamma(1.0, 1.0),
        td.Gumbel: lambda: td.Gumbel(0.0, 1.0), td.Laplace: lambda: td.Laplace(0.0, 1.0),
        td.Normal: lambda: td.Normal(0.0, 1.0), td.Poisson: lambda: td.Poisson(1.0),
        td.Bernoulli: lambda: td.Bernoulli(0.3), td.Binomial: lambda: td.Binomial(5, torch.tensor(0.4)),
    }  # fmt: skip
    assert float(td.kl_divergence(make[pair[0]](), make[pair[1]]())) == math.inf
    with pytest.raises(vem.ModelError, match=f"'z'.*{pair[0].__name__} leaves the support"):
        check_support("z", make[pair[0]](), make[pair[1]]())


@pytest.mark.filterwarnings("ignore:the model has no observed site")
@pytest.mark.parametrize(
    "prior",
    [
        dist.Gamma(2.0, 1.0),
        dist.Exponential(1.0),
        dist.Uniform(-1.0, 1.0),
        dist.Beta(2.0, 2.0),
        dist.HalfCauchy(1.0),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_a_normal_guide_on_a_bounded_prior_is_refused_with_the_remedy(fit, prior):
    def model():
        pyro.sample("s", prior)

    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("s", dist.Normal(loc, 0.1))

    with pytest.raises(vem.ModelError, match=r"'s'.*MeanFieldNormal.*biject_to"):
        vem.AnalyticKL_ELBO().loss(model, guide)
    with pytest.raises(vem.ModelError, match=r"'s'.*MeanFieldNormal.*biject_to"):
        fit(model, guide=guide)


def test_a_vector_guide_on_a_simplex_is_refused():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    def guide():
        pyro.sample("p", dist.Normal(torch.full((3,), 1 / 3), 0.01).to_event(1))

    with pytest.raises(vem.ModelError, match=r"'p'.*leaves the support"):
        vem.AnalyticKL_ELBO().loss(model, guide)


def test_a_narrower_guide_is_fine():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Uniform(-1.0, 0.5))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["z"].method == "closed form"


# Weights


def test_a_scale_made_from_a_latent_is_sampled(fit):
    def model():
        t = pyro.sample("t", dist.LogNormal(0.0, 0.3))
        with poutine.scale(scale=t):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0), obs=torch.tensor(0.5))

    guide = vem.MeanFieldNormal(model)
    plan = vem.AnalyticKL_ELBO().plan(model, guide)
    assert plan["z"].method == "draws"
    assert "scale or mask depends on 't'" in plan["z"].proof
    assert plan["t"].method == "closed form"


def test_masks_inside_distributions_count():
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).mask(mask))

    def inner():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mask).to_event(1))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.ones(3), 0.5))

    def inner_guide():
        pyro.sample("z", dist.Normal(torch.ones(3), 0.5).to_event(1))

    # two KL terms and one E[log q]
    expected = 2 * 0.818147 - (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    for pair in ((model, guide), (inner, inner_guide)):
        elbo = vem.AnalyticKL_ELBO()
        assert elbo.plan(*pair)["z"].method == "closed form"
        assert elbo.loss(*pair) == pytest.approx(expected, abs=1e-5)


def test_unequal_weights_without_an_entropy_are_sampled():
    def model():
        with poutine.scale(scale=0.5):
            pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))

    guide = vem.MeanFieldNormal(lambda: pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))))
    plan = vem.AnalyticKL_ELBO().plan(model, guide)
    assert "entropy has no closed form" in plan["p"].proof


# What is shown


def test_the_evidence_is_the_bound_plus_the_divergence_to_the_posterior():
    """log p(x) = ELBO + KL(q || posterior), on a conjugate model and any q."""
    y = torch.tensor([1.0, 2.0, 4.0])
    mean, sd, evidence = zoo.normal_mean_exact(y)

    def guide(y):
        pyro.sample("z", dist.Normal(0.7, 0.9))

    elbo = vem.AnalyticKL_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    bound = -elbo.loss(zoo.normal_mean, guide, y)
    gap = float(td.kl_divergence(td.Normal(0.7, 0.9), td.Normal(float(mean), sd)))
    assert bound + gap == pytest.approx(evidence, abs=0.1)
    assert bound < evidence


def test_terms_show_method_proof_value_error_and_share():
    y = torch.tensor([1.0, 2.0, 4.0])
    guide = vem.MeanFieldNormal(zoo.normal_mean)
    terms = vem.AnalyticKL_ELBO(num_particles=300).terms(zoo.normal_mean, guide, y)
    assert terms["z"].share == 0.0  # no draw enters it
    assert terms["y"].share == 1.0
    assert terms["y"].se > 0
    text = str(terms)
    for word in ("site", "plates", "kind", "method", "proof", "value", "se", "share", "reconstruction",
                 "regularisation", "rows", "likelihood", "KL"):  # fmt: skip
        assert word in text
    assert terms.reconstruction + terms.regularisation == pytest.approx(terms.elbo)


def test_a_mixture_prior_is_bounded_on_request_only():
    def model():
        parts = dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))

    def guide():
        pyro.sample("z", dist.Normal(0.8, 0.4))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["z"].method == "draws"
    elbo = vem.AnalyticKL_ELBO(bounds=True)
    assert elbo.plan(model, guide)["z"].method == "upper bound"
    draws = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(2000)])
    assert elbo.loss(model, guide) > float(draws.mean()) - 3 * float(draws.std()) / 2000**0.5


def test_a_wrong_formula_is_caught_and_sampled(fit):
    class Prior(dist.Normal):
        pass

    @vem.register_kl(td.Normal, Prior)
    def _(q, p):
        return td.kl_divergence(td.Normal(q.loc, q.scale), td.Normal(p.loc, p.scale)) + 0.5

    def model(y):
        z = pyro.sample("z", Prior(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = fit(model, {"y": torch.tensor(1.0)})
    assert result.plan["z"].method == "draws"
    assert "standard errors off" in result.plan["z"].proof
    assert float(result.guide_params["guide.loc.z"]) == pytest.approx(0.5, abs=1e-4)


def test_a_formula_that_is_right_at_the_start_only_is_sampled(fit):
    class Prior(dist.Normal):
        pass

    @vem.register_kl(td.Normal, Prior)
    def _(q, p):
        right = td.kl_divergence(td.Normal(q.loc, q.scale), td.Normal(p.loc, p.scale))
        return right + 5 * (q.scale - 0.1)  # where fits start

    def model(y):
        z = pyro.sample("z", Prior(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = fit(model, {"y": torch.tensor(1.0)}, init={"z": torch.tensor(0.0)})
    assert result.plan["z"].method == "draws"
    assert float(result.guide_params["guide.scale.z"]) == pytest.approx(0.5**0.5, rel=1e-3)


def test_a_prior_only_loss_of_an_amortized_guide_has_no_noise():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, y):
            return self.slope * y, torch.full_like(y, 0.7)

    def model(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.HalfCauchy(1.0))

    y, guide = torch.linspace(-1, 1, 4), vem.AmortizedNormal(model, {"z": Encoder()}, inputs="y")
    guide(y)
    losses = torch.tensor([vem.AnalyticKL_ELBO().loss(model, guide, y) for _ in range(10)])
    assert float(losses.std()) < 1e-6
