"""Priors that transforms have moved: the fit of the same model with the base sampled and moved by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import distributions as td
from torch.distributions.transforms import (
    AffineTransform,
    ExpTransform,
    StickBreakingTransform,
    TanhTransform,
)

import pyro_vem as vem
from pyro_vem.model.support import support_of

Y = 1.5 + 0.5 * torch.randn(24, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1.0, 2.0, 3.0])


def moved(base, *transforms, plate=None, event=False):
    """A model whose prior is moved by transforms, and its twin, which moves the value."""

    def likelihood(z, y):
        if plate or event:
            with pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", 3, dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y.unsqueeze(-1).expand(-1, 3))
        else:
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def sampled(name, prior):
        prior = prior.expand([3]) if event or plate else prior
        if plate:
            with pyro.plate("columns", 3, dim=-1):
                return pyro.sample(name, prior)
        return pyro.sample(name, prior.to_event(1) if event else prior)

    def model(y):
        likelihood(sampled("z", dist.TransformedDistribution(base, list(transforms))), y)

    def by_hand(y):
        z = sampled("w", base)
        for transform in transforms:
            z = transform(z)
        likelihood(pyro.deterministic("z", z), y)

    return model, by_hand


GAMMA = dist.Gamma(2.0, 1.0)
MODELS = {
    "shifted": moved(dist.Exponential(1.0), AffineTransform(2.0, 1.0)),
    "flipped": moved(dist.Exponential(1.0), AffineTransform(0.0, -1.0)),
    "flipped and shifted": moved(GAMMA, AffineTransform(4.0, -2.0)),
    "shifted gamma": moved(GAMMA, AffineTransform(2.0, 1.0)),
    "stretched beta": moved(dist.Beta(2.0, 2.0), AffineTransform(-1.0, 2.0)),
    "shifted log-normal": moved(dist.Normal(0.0, 1.0), ExpTransform(), AffineTransform(1.0, 1.0)),
    "events": moved(GAMMA, AffineTransform(2.0, 1.0), event=True),
    "by row": moved(GAMMA, AffineTransform(*ROWS), plate=True),
    "stretched by row": moved(dist.Beta(2.0, 2.0), AffineTransform(*ROWS), plate=True),
    "real": moved(dist.Normal(0.0, 1.0), AffineTransform(1.0, 2.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_moved_prior_is_fitted_as_its_base(fit, name):
    model, by_hand = MODELS[name]
    guide = vem.MeanFieldNormal
    result, twin = (fit(one, {"y": Y}, guide=guide(one)) for one in (model, by_hand))
    assert result.converged
    assert result.elbo == pytest.approx(twin.elbo, abs=max(2e-3, 4 * (result.elbo_se + twin.elbo_se)))
    mean, other = (one.sample(4000)["z"].mean(0) for one in (result, twin))
    assert torch.allclose(mean, other, atol=0.02)


def test_the_draws_of_a_shifted_prior_are_inside_it(fit):
    assert float(fit(MODELS["shifted"][0], {"y": Y}).sample(4000)["z"].min()) > 2.0


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        (dist.Dirichlet(torch.ones(3)), AffineTransform(0.0, 2.0)),
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), [StickBreakingTransform(), AffineTransform(1.0, 2.0)]),
        (dist.Exponential(torch.ones(3)).to_event(1), dist.transforms.Permute(torch.tensor([2, 0, 1]))),
        (dist.Exponential(torch.ones(2)).to_event(1), AffineTransform(0.0, torch.tensor([1.0, -1.0]))),
    ],
)
def test_a_moved_set_that_is_not_known_is_refused(fit, prior, told):
    def model():
        z = pyro.sample("z", dist.TransformedDistribution(prior, told))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.5))

    with pytest.raises(vem.UnsupportedModelError, match=r"'z': no bijector .*pyro\.deterministic"):
        fit(model)


def test_a_shift_by_a_parameter_is_refused(fit):
    def model():
        shift = AffineTransform(pyro.param("shift", torch.tensor(1.0)), 1.0)
        z = pyro.sample("z", dist.TransformedDistribution(dist.Exponential(1.0), [shift]))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    with pytest.raises(vem.UnsupportedModelError, match=r"'z'.*depends on other sites or parameters"):
        fit(model)


def test_a_guide_that_leaves_a_shifted_prior_is_refused(fit):
    def guide(y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(9.0)), 0.1))

    with pytest.raises(vem.ModelError, match=r"'z'.*leaves the support GreaterThan\(lower_bound=2\.0\)"):
        fit(MODELS["shifted"][0], {"y": Y}, guide=guide)


def test_a_mixture_as_a_prior_is_named(fit):
    def model():
        components = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    with pytest.raises(vem.UnsupportedModelError, match=r"'z': no bijector .* MixtureSameFamily"):
        fit(model)


def test_what_torch_says_of_other_supports_stands():
    shift = AffineTransform(torch.ones(2), torch.tensor([2.0, -1.0]))
    for fn in (
        dist.LogNormal(0.0, 1.0),
        dist.InverseGamma(2.0, 1.0),
        dist.Gumbel(0.0, 1.0),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [ExpTransform()]),
        dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [StickBreakingTransform()]),
        dist.TransformedDistribution(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), [shift]),
    ):
        assert str(support_of(fn)) == str(fn.support)


@pytest.mark.parametrize(
    ("base", "transforms", "told"),
    [
        (td.Uniform(0.0, 1.0), [AffineTransform(1.0, -3.0)], "Interval(lower_bound=-2.0, upper_bound=1.0)"),
        (td.Exponential(2.0), [ExpTransform()], "GreaterThan(lower_bound=1.0)"),
        (td.Gamma(2.0, 1.0), [TanhTransform()], "Interval(lower_bound=0.0, upper_bound=1.0)"),
    ],
)
def test_the_image_of_an_interval(base, transforms, told):
    assert str(support_of(td.TransformedDistribution(base, transforms))) == told


def test_a_logistic_prior_is_on_the_whole_line(fit):
    """torch clamps the inverse of a sigmoid at its ends, which are not those of its values."""
    parts = [td.SigmoidTransform().inv, AffineTransform(0.0, 2.0)]
    prior = dist.TransformedDistribution(dist.Uniform(0.0, 1.0), parts)
    assert support_of(prior) is td.constraints.real

    def model(y):
        b = pyro.sample("b", dist.TransformedDistribution(dist.Uniform(0.0, 1.0), parts))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    plain, auto = fit(model, {"y": Y}), fit(model, {"y": Y}, guide=AutoNormal(model))
    assert plain.plan["y"].method == "closed form"
    assert auto.elbo == pytest.approx(plain.elbo, abs=0.02)
