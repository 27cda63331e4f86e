"""The bound site by site: KL pairs, scale and mask, matched draws, transport, the fixed objective."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import distributions as td

import pyro_vem as vem
from pyro_vem.bound.draws import NoiseSpec, matched_noise
from pyro_vem.bound.kl import divergence, lookup, negative_entropy
from pyro_vem.bound.transport import transport
from pyro_vem.model.sites import Plate

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(100)
NODES, WEIGHTS = torch.from_numpy(NODES), torch.from_numpy(WEIGHTS / WEIGHTS.sum())


def number(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def log_normal(m, s):
    return td.TransformedDistribution(td.Normal(m, s), [td.ExpTransform()])


def test_entropy_is_the_mean_log_density():
    q = td.Independent(log_normal(number(0.3), number(0.6)).expand((2,)), 1)
    value = negative_entropy(q)
    u = 0.3 + 0.6 * NODES
    one = (WEIGHTS * log_normal(number(0.3), number(0.6)).log_prob(u.exp())).sum()
    assert float(value.detach()) == pytest.approx(2 * float(one.detach()), abs=1e-9)


def test_register_kl_leaves_torch_alone():
    class Mine(td.Normal):
        pass

    class Theirs(td.Normal):
        """A user's density: the parent's entry must not be taken for it."""

    assert lookup(Mine(0.0, 1.0), td.Normal(0.0, 1.0)) is None
    before = dict(td.kl._KL_REGISTRY)

    @vem.register_kl(Mine, td.Normal)
    def _(q, p):
        return torch.full((), 7.0)

    assert float(divergence(Mine(0.0, 1.0), td.Normal(0.0, 1.0))) == 7.0
    assert before == td.kl._KL_REGISTRY
    assert lookup(td.Normal(0.0, 1.0), Theirs(0.0, 1.0)) is None


def normal_guide(loc=1.0, scale=0.5):
    """Our own guide at z ~ N(loc, scale)."""
    pyro.param("guide.loc.z", torch.tensor(loc))
    pyro.param("guide.scale.z", torch.tensor(scale), constraint=dist.constraints.positive)
    return vem.MeanFieldNormal(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


def plain():
    pyro.sample("z", dist.Normal(0.0, 1.0))


# E_q[w_q log q - w_p log p] for z ~ N(0, 1) against q = N(1, .5): Pyro returns 0.818 for each
SIDES = {
    "same": (lambda f: f, 0.818147),
    "model scaled": (lambda f: poutine.scale(f, scale=0.5), 0.046177),
    "model masked": (lambda f: poutine.mask(f, mask=False), -0.725791),
}


@pytest.mark.parametrize("analytic", ["auto", "never"])
@pytest.mark.parametrize("side", SIDES)
def test_scale_and_mask_of_both_sides(side, analytic):
    change, exact = SIDES[side]
    guide = normal_guide()
    elbo = vem.AnalyticKL_ELBO(num_particles=1000 if analytic == "never" else 1, analytic=analytic)
    terms = elbo.terms(change(plain), guide)
    assert terms["z"].method == ("draws" if analytic == "never" else "closed form")
    tolerance = 4 * terms.elbo_se if analytic == "never" else 1e-5
    assert -terms.elbo == pytest.approx(exact, abs=tolerance)


def test_no_noise_when_everything_is_exact():
    guide = normal_guide(0.3, 0.1)
    losses = [vem.AnalyticKL_ELBO().loss(plain, guide) for _ in range(5)]
    assert np.std(losses) <= 2e-16


def test_a_reversed_arrow_is_sampled_and_right():
    """The guide reverses the model's arrow: TraceMeanField_ELBO gives 2.52553."""

    def model(x):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        z2 = pyro.sample("z2", dist.Normal(0.3, 0.8))
        pyro.sample("z1", dist.Normal(0.9 * z2, 0.5))

    elbo = vem.AnalyticKL_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0)
    assert elbo.loss(model, guide, torch.tensor(1.0)) == pytest.approx(1.94953, abs=0.05)
    plan = elbo.plan(model, guide, torch.tensor(1.0))
    assert plan["z1"].method == "closed form"  # z1 has no parent in the model
    assert plan["z2"].method == "draws"
    assert "its model parent 'z1' depends on it in the guide" in plan["z2"].proof
    with pytest.raises(vem.ModelError, match=r"'z2' cannot be exact.*require"):
        vem.AnalyticKL_ELBO(analytic="require").loss(model, guide, torch.tensor(1.0))


@pytest.mark.parametrize("is_vectorised", [False, True])
def test_gradients_agree_with_trace_elbo(is_vectorised):
    """The same expectation, by Pyro's own estimator with many particles."""
    guide = vem.MeanFieldNormal(zoo.eight_schools)
    args = (zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y)
    guide(*args)

    def gradients(kind, particles):
        pyro.set_rng_seed(2)
        params = [v.unconstrained() for v in pyro.get_param_store().values()]
        for param in params:
            param.grad = None
        options = {"vectorize_particles": True, "max_plate_nesting": 1} if is_vectorised else {}
        loss = kind(num_particles=particles, **options).loss_and_grads(zoo.eight_schools, guide, *args)
        return loss, torch.cat([param.grad.reshape(-1) for param in params])

    particles = 3000 if is_vectorised else 200
    ours, theirs = gradients(vem.AnalyticKL_ELBO, particles), gradients(Trace_ELBO, particles)
    scale = 0.05 if is_vectorised else 0.3
    assert ours[0] == pytest.approx(theirs[0], abs=scale)
    assert float((ours[1] - theirs[1]).abs().max()) < 5 * scale


def test_terms_split_the_bound():
    guide = vem.MeanFieldNormal(zoo.eight_schools)
    args = (zoo.SCHOOLS_SIGMA, zoo.SCHOOLS_Y)
    elbo = vem.AnalyticKL_ELBO(num_particles=500)
    terms = elbo.terms(zoo.eight_schools, guide, *args)
    assert terms["mu"].se == 0.0
    assert terms["mu"].method == "closed form"
    assert terms["y"].se > 0.0
    assert terms.reconstruction + terms.regularisation == pytest.approx(terms.elbo, rel=1e-6)
    assert terms.elbo == pytest.approx(sum(row.value for row in terms.rows))
    assert "closed form" in str(terms)
    assert "ELBO" in str(terms)
    plan = elbo.plan(zoo.eight_schools, guide, *args)
    assert plan.exact == ("mu", "tau", "t")
    with pytest.raises(KeyError):
        _ = plan["theta"]


def test_elbo_refuses_what_it_cannot_do():
    def model():
        pyro.sample("k", dist.Bernoulli(0.5))

    def guide():
        pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "sequential"})

    with pytest.raises(vem.UnsupportedModelError, match=r"'k'.*sequential.*parallel"):
        vem.AnalyticKL_ELBO().loss(model, guide)
    with pytest.raises(ValueError, match="at least one particle"):
        vem.AnalyticKL_ELBO(num_particles=0)
    decorated = vem.vem_model(map_sites=("z",))(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    with pytest.raises(vem.ModelError, match="Delta guide"):
        vem.AnalyticKL_ELBO().loss(decorated, lambda: None)


@pytest.mark.parametrize("is_learning", [True, False])
def test_a_plan_is_kept_only_while_sites_depend_on_the_same_others(is_learning):
    """By an integer; by an attribute while gradients are taken."""

    def model(flag):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    class Guide:
        is_coupled = 0

        def __call__(self, flag):
            m = pyro.param("m", torch.full((3,), 0.5))
            b = pyro.sample("b", dist.Normal(m[1], 1.0))
            other = b if flag or self.is_coupled else m[2]
            pyro.sample("a", dist.Normal(m[0] + 2 * other, 0.5))

    def methods():
        step(model, guide, flag)
        return {row.site: row.method for row in next(reversed(elbo._proved.values()))[0].rows}

    guide, elbo, flag = Guide(), vem.AnalyticKL_ELBO(), 0
    step = elbo.loss_and_grads if is_learning else elbo.loss
    assert methods()["b"] == "closed form"
    flag = 1
    assert methods()["b"] == "draws"
    assert methods()["b"] == "draws"
    assert len(elbo._proved) == 2
    if is_learning:
        guide.is_coupled, elbo, flag = 0, vem.AnalyticKL_ELBO(), 0
        step = elbo.loss_and_grads
        assert methods()["b"] == "closed form"
        guide.is_coupled = 1
        assert methods()["b"] == "draws"


def test_svi_learns_with_it():
    y = torch.tensor([1.0, 2.0, 6.0])
    guide = vem.MeanFieldNormal(zoo.normal_mean)
    svi = SVI(zoo.normal_mean, guide, pyro.optim.Adam({"lr": 0.05}), vem.AnalyticKL_ELBO())
    for _ in range(600):
        svi.step(y)
    mean, sd, _ = zoo.normal_mean_exact(y)
    assert pyro.param("guide.loc.z").item() == pytest.approx(mean, abs=0.1)
    assert pyro.param("guide.scale.z").item() == pytest.approx(sd, abs=0.1)


def moments(values, sizes):
    """Largest deviation of first, second and third moments from N(0, I)."""
    n, d = values.shape
    second = values.T @ values / n - torch.eye(d, dtype=values.dtype)
    third = torch.einsum("ni,nj,nk->ijk", values, values, values) / n
    return max(float(values.mean(0).abs().max()), float(second.abs().max()), float(third.abs().max()))


def test_matched_draws_have_exact_moments():
    generator = torch.Generator().manual_seed(0)
    noise, note = matched_noise([NoiseSpec("a", (), (), ()), NoiseSpec("b", (3,), (2,), ())], 256, generator)
    assert note is None
    joint = torch.cat([noise["a"].unsqueeze(-1), noise["b"].reshape(256, -1)], 1)
    assert moments(joint, None) < 1e-12
    plain_noise = torch.randn(256, 7, dtype=torch.float64)
    assert moments(plain_noise, None) > 0.01


def test_matched_draws_in_plates_are_matched_with_the_globals():
    rows = Plate("rows", -1, 500)
    specs = [NoiseSpec("m", (), (), ()), NoiseSpec("z", (500,), (2,), (rows,))]
    noise, note = matched_noise(specs, 64, torch.Generator().manual_seed(1))
    assert note is None
    for i in (0, 17, 499):
        clique = torch.cat([noise["m"].unsqueeze(-1), noise["z"][:, i]], 1)
        assert moments(clique, None) < 1e-12
    wide = [NoiseSpec("z", (), (300,), ())]
    _, note = matched_noise(wide, 64, torch.Generator().manual_seed(1))
    assert "not moment-matched" in note


TRANSPORTS = {
    "Normal": (dist.Normal(1.0, 2.0), ()),
    "Gamma": (dist.Gamma(torch.tensor(2.5).double(), 1.5), ()),
    "Beta": (dist.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double()), (2,)),
    "StudentT": (dist.StudentT(torch.tensor(8.0).double(), 1.0, 2.0), (2,)),
    "Laplace": (dist.Laplace(torch.tensor(1.0).double(), 2.0), ()),
    "LogNormal": (dist.LogNormal(torch.tensor(0.2).double(), 0.5), ()),
    "Dirichlet": (dist.Dirichlet(torch.tensor([2.0, 3.0, 1.5]).double()), (3,)),
    "MultivariateNormal": (
        dist.MultivariateNormal(
            torch.tensor([1.0, 2.0]).double(), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
        ),
        (2,),
    ),
    "LowRank": (
        dist.LowRankMultivariateNormal(
            torch.zeros(2).double(), torch.ones(2, 1).double(), torch.ones(2).double()
        ),
        (3,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPORTS)
def test_transport_has_the_right_moments(name):
    fn, event = TRANSPORTS[name]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, *event, generator=generator, dtype=torch.float64)
    draws = torch.func.vmap(lambda z: transport(fn, z))(noise)
    se = fn.variance.sqrt() / 200_000**0.5
    assert bool(((draws.mean(0) - fn.mean).abs() < 5 * se).all())
    assert bool((draws.var(0) / fn.variance - 1).abs().max() < 0.05)


def test_gamma_transport_has_first_and_second_derivatives():
    noise = torch.tensor([-2.0, -0.3, 0.4, 3.0], dtype=torch.float64)
    shape = torch.tensor([0.4, 1.0, 5.0, 40.0], dtype=torch.float64, requires_grad=True)

    def value(a):
        return transport(dist.Gamma(a, torch.ones(4, dtype=torch.float64)), noise)

    torch.autograd.gradcheck(value, shape, eps=1e-6, atol=1e-6)
    torch.autograd.gradgradcheck(value, shape, eps=1e-5, atol=1e-4)


def test_a_model_that_vmap_refuses_is_looped_over_and_noted(fit):
    class Cube(torch.autograd.Function):
        """Once differentiable, and no rule for vmap."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 3 * ctx.saved_tensors[0] ** 2

    def model(y, cube):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(cube(z), 1.0), obs=y)

    y = torch.tensor([0.5, 1.5])
    odd = fit(model, {"y": y, "cube": Cube.apply}, options=vem.FitOptions(num_draws=64, elbo_draws=100))
    usual = fit(model, {"y": y, "cube": lambda x: x**3}, options=vem.FitOptions(num_draws=64, elbo_draws=100))
    assert odd.converged
    assert usual.converged
    assert odd.history[-1].after == pytest.approx(usual.history[-1].after, abs=1e-6)
    notes = " ".join(odd.plan.notes)
    assert "vmap refuses" in notes
    assert "differences of the gradient" in notes
    assert not usual.plan.notes


def test_broadcasting_models_are_not_fooled(fit):
    """x @ beta and theta[idx] break under plain broadcasting of draws."""
    torch.manual_seed(1)
    x, idx = torch.randn(40, 3), torch.arange(40) % 5
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + 0.1 * torch.randn(40)

    def model(x, idx, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("group", 5):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ beta + theta[idx], 0.1), obs=y)

    result = fit(model, {"x": x, "idx": idx, "y": y})
    assert result.converged
    design = torch.cat([x, torch.nn.functional.one_hot(idx, 5).float()], 1).double()
    prior = torch.diag(torch.tensor([0.25] * 3 + [1.0] * 5).double())
    exact = torch.linalg.solve(design.T @ design / 0.01 + prior, design.T @ y.double() / 0.01)
    assert torch.allclose(result.guide_params["guide.loc.beta"], exact[:3], atol=1e-3)


HANDLED = torch.tensor([0.5, 1.0, 4.0])


def handled(kind, y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        if kind == "scale":
            with poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        elif kind == "mask":
            with poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        elif kind == "obs_mask":
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=torch.tensor([True, False, True]))
        elif kind == "factor":
            pyro.factor("y", dist.Normal(z, 1.0).log_prob(y))
    pyro.deterministic("twice", 2 * z)


EFFECTIVE = {"scale": HANDLED.repeat(3), "mask": HANDLED[[0, 2]], "factor": HANDLED}


@pytest.mark.parametrize("kind", EFFECTIVE)
def test_handlers_and_factors_in_the_model(fit, kind):
    mean, sd, evidence = zoo.normal_mean_exact(EFFECTIVE[kind])
    result = fit(handled, {"kind": kind, "y": HANDLED})
    assert result.converged
    assert float(result.guide_params["guide.loc.z"]) == pytest.approx(mean, abs=1e-3)
    assert float(result.guide_params["guide.scale.z"]) == pytest.approx(sd, rel=1e-3)
    assert result.elbo == pytest.approx(evidence, abs=1e-3)
    draws = result.sample(10)
    assert torch.allclose(draws["twice"], 2 * draws["z"])


def test_missing_values_are_latent(fit):
    """z and the missing y have precision [[4, -1], [-1, 1]]: a diagonal Gaussian keeps its diagonal."""
    result = fit(handled, {"kind": "obs_mask", "y": HANDLED})
    mean, _, evidence = zoo.normal_mean_exact(HANDLED[[0, 2]])
    assert float(result.guide_params["guide.loc.z"]) == pytest.approx(mean, abs=1e-3)
    assert float(result.guide_params["guide.scale.z"]) == pytest.approx(0.5, rel=1e-3)
    assert result.elbo == pytest.approx(evidence - 0.5 * math.log(4 / 3), abs=4 * result.elbo_se + 1e-3)


def test_reparameterised_models(fit):
    from pyro.infer.reparam import LocScaleReparam

    def centred(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    model = poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})
    result = fit(model, zoo.SCHOOLS)
    assert result.converged
    assert result.elbo == pytest.approx(zoo.SCHOOLS_BEST_ELBO, abs=0.05)
    assert result.sample(3)["theta"].shape == (3, 8)
    assert math.isfinite(result.diagnose(num_draws=500).khat)
