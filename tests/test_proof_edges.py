"""What an adversary found: views that only look right, stale proofs, nan, and state left behind."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import AffineTransform, SigmoidTransform, biject_to, constraints

import pyro_vem as vem
from pyro_vem.model.density import lean_log_prob


def number(x):
    return torch.tensor(x)


def average(elbo, model, guide, *args, repeats=1000):
    draws = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)]).double()
    return float(draws.mean()), float(draws.std()) / repeats**0.5


def agree(model, guide, *args, elbo=None, repeats=1500):
    """Our loss against Pyro's, in standard errors."""
    ours, se = average(elbo or vem.AnalyticKL_ELBO(), model, guide, *args, repeats=repeats)
    theirs, other = average(Trace_ELBO(), model, guide, *args, repeats=repeats)
    assert abs(ours - theirs) <= 4.5 * math.hypot(se, other) + 1e-5, (ours, theirs)


def test_a_shift_that_starts_as_the_identity_is_no_autonormal():
    def model():
        pyro.sample("z", dist.Normal(0.0, 3.0))

    def guide():
        loc = pyro.param("loc", number(0.0))
        sd = pyro.param("sd", number(1.0), constraint=constraints.positive)
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + sd * u, log_density=-sd.log()))

    elbo = vem.AnalyticKL_ELBO()
    assert elbo.plan(model, guide)["z"].method == "draws"
    elbo.loss_and_grads(model, guide)
    assert pyro.get_param_store()["sd"].unconstrained().grad is not None


def test_a_view_follows_the_support_of_the_prior():
    def model(high):
        pyro.sample("z", dist.Uniform(0.0, high))

    def guide(high):
        u = pyro.sample("u", dist.Normal(0.3, 0.7), infer={"is_auxiliary": True})
        transform = biject_to(constraints.interval(0.0, high))
        z = transform(u)
        pyro.sample("z", dist.Delta(z, log_density=-transform.log_abs_det_jacobian(u, z)))

    elbo = vem.AnalyticKL_ELBO()
    first, second = elbo.loss(model, guide, 1.0), elbo.loss(model, guide, 5.0)
    assert elbo.plan(model, guide, 5.0)["z"].method == "closed form"
    assert first == pytest.approx(second, abs=1e-5)  # the same on the unconstrained scale
    agree(model, guide, 5.0, elbo=elbo)


def test_a_view_needs_equal_weights_of_its_two_sites():
    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide():
        with poutine.scale(scale=0.5):
            u = pyro.sample("u", dist.Normal(0.5, 0.3), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    agree(model, guide)


def semi_supervised(x, k=None):
    k = pyro.sample("k", dist.Categorical(number([0.3, 0.7])), obs=k, infer={"enumerate": "parallel"})
    pyro.sample("x", dist.Normal(number([-2.0, 2.0])[k], 1.0), obs=x)


def test_labelled_then_unlabelled_data_with_one_object():
    elbo = vem.AnalyticKL_ELBO(max_plate_nesting=0)
    elbo.loss(semi_supervised, lambda x, k=None: None, number(0.5), number(1))
    guide = lambda x, k=None: None  # noqa: E731
    expected = TraceEnum_ELBO(max_plate_nesting=0).loss(semi_supervised, guide, number(0.5))
    for _ in range(3):
        assert elbo.loss(semi_supervised, guide, number(0.5)) == pytest.approx(expected, abs=1e-5)


def test_a_site_that_was_data_is_proved_again():
    def model(x, k=None):
        j = pyro.sample("j", dist.Categorical(number([0.5, 0.5])), infer={"enumerate": "parallel"})
        k = pyro.sample("k", dist.Categorical(number([0.3, 0.7])), obs=k, infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(number([-2.0, 2.0])[k], 1.0))
        pyro.sample("x", dist.Normal(z + j, 1.0), obs=x)

    def guide(x, k=None):
        pyro.sample("z", dist.Normal(0.3, 0.7))

    elbo = vem.AnalyticKL_ELBO(num_particles=300, max_plate_nesting=0)
    elbo.loss(model, guide, number(0.5), number(1))
    reference = TraceEnum_ELBO(num_particles=300, max_plate_nesting=0)
    ours, theirs = (e.loss(model, guide, number(0.5)) for e in (elbo, reference))
    assert ours == pytest.approx(theirs, abs=0.3)
    assert elbo.plan(model, guide, number(0.5))["z"].method == "draws"


def test_a_flag_that_switches_an_arrow_on_is_proved_again():
    def model(flag):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("y", dist.Normal(z2, 1.0), obs=number(1.0))

    def guide(flag):
        z2 = pyro.sample("z2", dist.Normal(0.3, 0.8))
        pyro.sample("z1", dist.Normal(0.9 * z2 if flag else 0.0, 0.5))

    elbo = vem.AnalyticKL_ELBO()
    assert elbo.plan(model, guide, False)["z2"].method == "closed form"
    assert elbo.plan(model, guide, True)["z2"].method == "draws"


def test_a_masked_delta_likelihood_counts():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = number(0.5)
        pyro.sample("x", dist.Delta(x, log_density=-((x - z) ** 2)).mask(number(True)), obs=x)

    def guide():
        pyro.sample("z", dist.Normal(0.3, 0.7))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["x"].kind == "likelihood"
    agree(model, guide)


def test_a_falling_interval_is_not_nan():
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    def guide():
        base = dist.Normal(number(0.3), 0.7)
        pyro.sample("z", dist.TransformedDistribution(base, [SigmoidTransform(), AffineTransform(1.0, -1.0)]))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["z"].method == "closed form"
    agree(model, guide)


def test_nan_under_a_mask_stays_under_it():
    x = number([1.0, 2.0, float("nan")])

    def model(x):
        with pyro.plate("d", 3), poutine.mask(mask=~x.isnan()):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("d", 3), poutine.mask(mask=~x.isnan()):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pyro.validation_enabled(False):
        assert math.isfinite(vem.AnalyticKL_ELBO().loss(model, guide, x))


def test_parameters_start_from_the_callers_seed():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.randn(2)), 1.0).to_event(1))

    starts = []
    for kind in (vem.AnalyticKL_ELBO, Trace_ELBO):
        for seed in (1, 2):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), kind()).step()
            starts.append(pyro.param("loc").detach().clone())
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])


def test_flags_and_buffers_are_put_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1.0
            return self.norm(x)

    net, x = Net(), torch.randn(5, 1)

    def model(x):
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        net.norm(x)
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(net(x).squeeze(-1), 1.0))

    elbo = vem.AnalyticKL_ELBO()
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        elbo.loss(model, guide, x)
        assert torch.distributions.Distribution._validate_args is False
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)
    assert int(net.norm.num_batches_tracked) == 2  # the step itself
    assert float(net.count) == 1.0


def test_enumerated_parents_in_the_model_only():
    def model():
        k = pyro.sample("k", dist.Categorical(number([0.3, 0.3, 0.4])))
        z = pyro.sample("z", dist.Normal(number([-1.0, 0.0, 2.0])[k], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=number(0.5))

    def guide():
        pyro.sample("k", dist.Categorical(logits=torch.zeros(3)), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal(0.3, 0.7))

    elbo, reference = vem.AnalyticKL_ELBO(max_plate_nesting=0), TraceEnum_ELBO(max_plate_nesting=0)
    assert elbo.plan(model, guide)["z"].method == "closed form"
    ours, se = average(elbo, model, guide, repeats=400)
    theirs, other = average(reference, model, guide, repeats=400)
    assert abs(ours - theirs) <= 4.5 * math.hypot(se, other)


def test_vectorised_particles_with_enumeration():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(a + k, 1.0), obs=number([0.5, -0.3, 1.0]))

    def guide():
        pyro.sample("a", dist.Normal(0.2, 0.5))
        with pyro.plate("n", 3):
            pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    ours, se = average(vem.AnalyticKL_ELBO(**options), model, guide, repeats=200)
    theirs, other = average(TraceEnum_ELBO(**options), model, guide, repeats=200)
    assert abs(ours - theirs) <= 4.5 * math.hypot(se, other)


def test_structure_that_is_drawn():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.9))
        shift = pyro.sample("z", dist.Normal(0.0, 1.0)) if k < 0.5 else 0.0
        pyro.sample("x", dist.Normal(shift, 1.0), obs=number(0.5))

    def guide():
        k = pyro.sample("k", dist.Bernoulli(0.9))
        if k < 0.5:
            pyro.sample("z", dist.Normal(0.3, 0.7))

    agree(model, guide, repeats=3000)


def test_sequential_plates_that_draw_their_indices():
    def model():
        for i in pyro.plate("p", 3, subsample_size=2):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    def guide():
        for i in pyro.plate("p", 3, subsample_size=2):
            pyro.sample(f"z{i}", dist.Normal(0.3, 0.7))

    agree(model, guide, repeats=300)


def test_annealing_the_prior_of_a_site_without_an_entropy():
    def model(beta):
        with poutine.scale(scale=beta):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    def guide(beta):
        base = dist.Normal(torch.zeros(2), 0.5).to_event(1)
        pyro.sample("p", dist.TransformedDistribution(base, [biject_to(constraints.simplex)]))

    elbo = vem.AnalyticKL_ELBO()
    assert elbo.plan(model, guide, 1.0)["p"].method == "closed form"
    assert elbo.plan(model, guide, 0.5)["p"].method == "draws"
    agree(model, guide, 0.5, elbo=elbo)


def test_straight_through_guides_of_discrete_priors_are_let_through():
    def model():
        pyro.sample("k", dist.Bernoulli(0.4))

    def guide():
        pyro.sample("k", dist.RelaxedBernoulliStraightThrough(number(0.5), probs=number(0.5)))

    with pyro.validation_enabled(False):
        assert vem.AnalyticKL_ELBO().plan(model, guide)["k"].method == "draws"


def test_methods_are_proved_once():
    class Both:
        def model(self):
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def guide(self):
            pyro.sample("z", dist.Normal(0.3, 0.7))

    both, elbo = Both(), vem.AnalyticKL_ELBO()
    for _ in range(5):
        elbo.loss(both.model, both.guide)
    assert len(elbo._proved) == 1


def test_a_subsample_drawn_after_a_site_makes_no_false_arrow():
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        loc = pyro.param("loc", torch.arange(6.0))
        pyro.sample("mu", dist.Normal(0.1, 1.0))
        with pyro.plate("rows", 6, subsample_size=3) as i:
            pyro.sample("b", dist.Normal(loc[i], 1.0))
            pyro.sample("a", dist.Normal(loc[i] / 2, 1.0))

    assert vem.AnalyticKL_ELBO().plan(model, guide).exact == ("mu", "a", "b")


def test_a_large_site_is_checked_on_few_draws():
    def model():
        with pyro.plate("rows", 300_000):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("rows", 300_000):
            pyro.sample("z", dist.Normal(torch.zeros(300_000), 0.5))

    assert vem.AnalyticKL_ELBO().plan(model, guide)["z"].method == "closed form"


class Tempered(dist.Categorical):
    def log_prob(self, value):
        return 0.5 * super().log_prob(value)


def test_a_categorical_of_the_users_keeps_its_density():
    found = lean_log_prob(Tempered(number([0.25, 0.75])), number(1))
    assert float(found) == pytest.approx(0.5 * math.log(0.75))


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_a_categorical_value_outside_its_support_is_refused(fit, value):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z])), obs=y)

    with pytest.raises(vem.ModelError, match=r"'y': its observed value does not fit .*support"):
        fit(model, {"y": number([0.0, value])})


@pytest.mark.parametrize("names", ["w", "wv"])
def test_a_masked_latent_whose_coefficient_starts_at_zero_has_a_factor(names):
    """Given w, y is N(w z, 1): without z's factor w would stay where it is."""

    def model(y):
        w = sum((-1) ** i * pyro.param(name, number(0.4 * (len(names) - 1))) for i, name in enumerate(names))
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * z, 1.0), obs=y)

    assert vem.MeanFieldNormal(model).latents(number(2.0))[0].idle is None
