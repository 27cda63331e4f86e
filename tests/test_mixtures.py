"""Vectors whose mean and covariance are parameters: weighted moments are their M-step."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from torch.distributions import constraints

import pyro_vem as vem

D = torch.float64
IRIS = torch.tensor(load_iris().data)
TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.9, 0.0], [-0.2, 0.4, 1.2]], dtype=D)
SDS = torch.tensor([1.0, 1.3, 0.8], dtype=D)
CORR = torch.linalg.cholesky(torch.tensor([[1, 0.3, 0.2], [0.3, 1, 0.1], [0.2, 0.1, 1]], dtype=D))
WEIGHTS = torch.tensor([0.4, 0.6], dtype=D)


def rows():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(80, 3)) @ np.array([[1.0, 0.4, 0.1], [0, 0.8, 0.3], [0, 0, 0.5]])
    y[:40] += 2
    return torch.tensor(y)


Y = rows()
MEANS = torch.stack([Y[0], Y[60]])


def matrix(name, value, constraint):
    """A covariance's argument that is one parameter, and the way back to covariances."""
    to_cov = {"scale_tril": lambda v: v @ v.mT, "covariance_matrix": lambda v: v}.get(name, torch.linalg.inv)

    def argument(pick, start):
        return {name: pick(pyro.param("factor", start(value), constraint=constraint))}

    return argument, lambda params: to_cov(params["factor"])


def correlated(pick, start):
    sd = pyro.param("sd", start(SDS), constraint=constraints.positive)
    corr = pyro.param("corr", start(CORR, False), constraint=constraints.corr_cholesky)
    return {"scale_tril": pick(sd).unsqueeze(-1) * pick(corr)}


def covariance_of_correlated(params):
    tril = params["sd"].unsqueeze(-1) * params["corr"]
    return tril @ tril.mT


def sds(pick, start):
    return {
        "scale_tril": torch.diag_embed(pick(pyro.param("sd", start(SDS), constraint=constraints.positive)))
    }


def variances(pick, start):
    value = pick(pyro.param("var", start(SDS), constraint=constraints.positive))
    return {"covariance_matrix": torch.diag_embed(value)}


FORMS = {
    "scale_tril": matrix("scale_tril", TRIL, constraints.lower_cholesky),
    "softplus": matrix("scale_tril", TRIL, dist.constraints.softplus_lower_cholesky),
    "covariance": matrix("covariance_matrix", TRIL @ TRIL.mT, constraints.positive_definite),
    "precision": matrix("precision_matrix", TRIL @ TRIL.mT, constraints.positive_definite),
    "correlated": (correlated, covariance_of_correlated),
    "sds": (sds, lambda params: torch.diag_embed(params["sd"] ** 2)),
    "variances": (variances, lambda params: torch.diag_embed(params["var"])),
}


def start_of(is_shared):
    """Starts by class: one for all, or the second 1.4 times the first."""

    def start(value, is_scaled=True):
        return value.clone() if is_shared else torch.stack([value, value * (1.4 if is_scaled else 1.0)])

    return start


def mixture(y, form="scale_tril", mean="classes", is_shared=False, means=MEANS):
    weights = pyro.param("weights", WEIGHTS, constraint=constraints.simplex)
    if mean == "classes":
        means = pyro.param("means", means.clone())
    elif mean == "shared":
        means = pyro.param("means", means[0].clone()).expand(2, 3)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        covariance = FORMS[form][0](lambda v: v if is_shared else v[z], start_of(is_shared))
        pyro.sample("y", dist.MultivariateNormal(means[z], **covariance), obs=y)


def em_step(y, weights, means, covariance, mean, is_shared, is_diagonal):
    """By hand; where covariances share a mean, that is the best one given them (ECM)."""
    pairs = zip(means, covariance, strict=True)
    log = torch.stack([dist.MultivariateNormal(m, c).log_prob(y) for m, c in pairs], -1)
    share = (log + weights.log()).softmax(-1)
    count = share.sum(0)
    centre = share.T @ y / count.unsqueeze(-1)
    if mean == "classes":
        means = centre
    elif mean == "shared":
        precision = count[:, None, None] * torch.linalg.inv(covariance)
        right = (precision @ centre.unsqueeze(-1)).sum(0)
        means = torch.linalg.solve(precision.sum(0), right).T.expand(2, 3)
    gap = y.unsqueeze(1) - means
    square = torch.einsum("nk,nki,nkj->kij", share, gap, gap)
    made = (square.sum(0) / len(y)).expand(2, 3, 3) if is_shared else square / count[:, None, None]
    if is_diagonal:
        made = torch.diag_embed(made.diagonal(dim1=-2, dim2=-1))
    return count / len(y), means, made


@pytest.mark.parametrize(
    ("mean", "is_shared"),  # with both shared, classes are equal
    [("classes", False), ("classes", True), ("shared", False), ("fixed", False), ("fixed", True)],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_weighted_moments(fit, form, mean, is_shared):
    data = {"y": Y, "form": form, "mean": mean, "is_shared": is_shared}
    found = fit(mixture, data, schedule="alternate", max_iter=1)
    start = start_of(is_shared)
    with pyro.get_param_store().scope():
        FORMS[form][0](lambda v: v, start)
        store = pyro.get_param_store()
        before = FORMS[form][1]({name: store[name].detach() for name in store}).expand(2, 3, 3)
    means = MEANS[:1].expand(2, 3) if mean == "shared" else MEANS
    expected = em_step(Y, WEIGHTS, means, before, mean, is_shared, form in ("sds", "variances"))
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found.params["weights"], expected[0], **close)
    if mean != "fixed":
        torch.testing.assert_close(found.params["means"].expand(2, 3), expected[1], **close)
    torch.testing.assert_close(FORMS[form][1](found.params).expand(2, 3, 3), expected[2], **close)
    assert [row.note for row in found.history] == ["closed form"]
    assert "moments of the vectors give" in found.plan["y"].proof


def iris(x, means, is_shared):
    weights = pyro.param("weights", torch.full((3,), 1 / 3, dtype=D), constraint=constraints.simplex)
    means = pyro.param("means", means)
    tril = torch.linalg.cholesky(torch.cov(x.T))
    tril = tril if is_shared else tril.repeat(3, 1, 1)
    tril = pyro.param("tril", tril, constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        covariance = tril if is_shared else tril[z]
        pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=covariance), obs=x)


@pytest.mark.parametrize("schedule", ["auto", "alternate"])
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_iris_is_what_scikit_learn_finds(fit, kind, schedule):
    means, precision = IRIS[[76, 70, 113]], np.linalg.inv(np.cov(IRIS.numpy().T))
    peer = GaussianMixture(
        3, covariance_type=kind, reg_covar=0, tol=1e-13, max_iter=10_000, weights_init=np.ones(3) / 3,
        means_init=means.numpy(), precisions_init=precision if kind == "tied" else np.stack([precision] * 3),
    ).fit(IRIS.numpy())  # fmt: skip
    found = fit(iris, {"x": IRIS, "means": means, "is_shared": kind == "tied"}, schedule=schedule)
    assert found.status is vem.Status.converged
    assert found.elbo == pytest.approx(150 * peer.score(IRIS.numpy()), abs=1e-6)
    covariance = found.params["tril"] @ found.params["tril"].mT
    pairs = {"weights": found.params["weights"], "means": found.params["means"], "covariances": covariance}
    for name, value in pairs.items():
        np.testing.assert_allclose(value.numpy(), getattr(peer, f"{name}_"), atol=1e-4)
    assert all(row.note == "closed form" for row in found.history if row.block == "M")
    assert all(error.isfinite().all() for error in found.standard_errors().values())


def test_equal_means_are_left_in_closed_form(fit):
    means = IRIS.mean(0).expand(3, 4).clone()
    found = fit(iris, {"x": IRIS, "means": means, "is_shared": False})
    assert found.status is vem.Status.converged
    assert found.elbo > -230  # one Normal alone has -379.9
    assert all(row.note == "closed form" for row in found.history if row.block == "M")


def test_units_do_not_matter(fit):
    means = IRIS[[76, 70, 113]]
    here = fit(iris, {"x": IRIS, "means": means, "is_shared": False})
    there = fit(iris, {"x": 1e6 * IRIS, "means": 1e6 * means, "is_shared": False})
    assert there.status is vem.Status.converged
    assert there.elbo + 600 * np.log(1e6) == pytest.approx(here.elbo, abs=1e-6)


def test_masked_rows_do_not_count_and_scaled_ones_do_several_times(fit):
    kept, times = torch.arange(80) % 7 != 0, 1 + torch.arange(80) % 3

    def masked(y):
        with pyro.poutine.mask(mask=kept):
            mixture(y)

    def scaled(y):
        with pyro.poutine.scale(scale=times.double()):
            mixture(y)

    wild = torch.where(kept.unsqueeze(-1), Y, 1e6)  # masked rows may be anything
    pairs = [(masked, Y, Y[kept]), (masked, wild, Y[kept]), (scaled, Y, Y.repeat_interleave(times, 0))]
    for model, data, same in pairs:
        found, expected = fit(model, {"y": data}), fit(mixture, {"y": same})
        assert found.elbo == pytest.approx(expected.elbo, abs=1e-7)
        assert "moments of the vectors give" in found.plan["y"].proof
        torch.testing.assert_close(found.params["means"], expected.params["means"], atol=1e-5, rtol=0)


def test_a_mask_may_depend_on_the_discrete_site(fit):
    """Outliers: a row is the cluster's or, with a density that is known, not."""
    mean, out = Y.mean(0), dist.Normal(3.0, 2.0).expand([3]).to_event(1)

    def model(y, is_summed):
        share = pyro.param("share", torch.tensor(0.2), constraint=constraints.unit_interval)
        mu = pyro.param("mu", mean.clone())
        tril = pyro.param("tril", TRIL.clone(), constraint=constraints.lower_cholesky)
        cluster = dist.MultivariateNormal(mu, scale_tril=tril)
        if is_summed:
            parts = (1 - share).log() + cluster.log_prob(y), share.log() + out.log_prob(y)
            pyro.factor("y", torch.logaddexp(*parts).sum())
            return
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            with pyro.poutine.mask(mask=z == 0):
                pyro.sample("y", cluster, obs=y)
            with pyro.poutine.mask(mask=z == 1):
                pyro.sample("outlier", out, obs=y)

    found, expected = (fit(model, {"y": Y, "is_summed": how}) for how in (False, True))
    assert found.status is vem.Status.converged
    assert "moments of the vectors give" in found.plan["y"].proof
    assert found.elbo == pytest.approx(expected.elbo, abs=1e-7)
    torch.testing.assert_close(found.params["mu"], expected.params["mu"], atol=1e-4, rtol=0)


def test_observed_vectors_that_contain_a_parameter_have_no_moments(fit):
    """A missing element at its best value: the vectors are not the same at other parameters."""
    is_missing = torch.zeros(80, 3, dtype=torch.bool)
    is_missing[3, 1] = True

    def model(y):
        value = pyro.param("value", torch.tensor(0.0))
        means = pyro.param("means", MEANS.clone())
        tril = pyro.param("tril", TRIL.repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            full = torch.where(is_missing, value, y)
            pyro.sample("y", dist.MultivariateNormal(means[z], scale_tril=tril[z]), obs=full)

    found = fit(model, {"y": Y})
    assert found.status is vem.Status.converged
    assert "values of y depend on parameters or latents" in found.plan["y"].proof
    value, means, tril = (found.params[name] for name in ("value", "means", "tril"))
    full = torch.where(is_missing, value, Y)
    parts = [
        dist.MultivariateNormal(m, scale_tril=f).log_prob(full) for m, f in zip(means, tril, strict=True)
    ]
    log = torch.stack(parts, -1) + WEIGHTS.log()
    assert found.elbo == pytest.approx(float(log.logsumexp(-1).sum()), abs=1e-9)


def test_a_chain_with_vectors_takes_a_step_of_baum_and_welch(fit):
    moves, start = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=D), torch.tensor([0.5, 0.5], dtype=D)
    tril, y = torch.stack([TRIL, 1.2 * TRIL]), Y[30:50]

    def model(y):
        first = pyro.param("first", start, constraint=constraints.simplex)
        then = pyro.param("then", moves, constraint=constraints.simplex)
        means = pyro.param("means", MEANS.clone())
        factor = pyro.param("factor", tril, constraint=constraints.lower_cholesky)
        z = None
        for t in pyro.markov(range(len(y))):
            probs = first if z is None else then[z]
            z = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"y{t}", dist.MultivariateNormal(means[z], scale_tril=factor[z]), obs=y[t])

    found = fit(model, {"y": y}, schedule="alternate", max_iter=1)
    pairs = zip(MEANS, tril, strict=True)
    p = torch.stack([dist.MultivariateNormal(m, scale_tril=f).log_prob(y) for m, f in pairs], -1).exp()
    ahead, back = [start * p[0]], [torch.ones(2, dtype=D)]
    for row in p[1:]:
        ahead.append(ahead[-1] @ moves * row)
    for row in p[1:].flip(0):
        back.append(moves @ (row * back[-1]))
    share = torch.stack(ahead) * torch.stack(back[::-1])
    share = share / share.sum(-1, keepdim=True)
    means = share.T @ y / share.sum(0).unsqueeze(-1)
    gap = y.unsqueeze(1) - means
    covariance = torch.einsum("nk,nki,nkj->kij", share, gap, gap) / share.sum(0)[:, None, None]
    assert found.history[0].before == pytest.approx(float(ahead[-1].sum().log()), abs=1e-10)
    torch.testing.assert_close(found.params["means"], means, atol=1e-11, rtol=0)
    factor = found.params["factor"]
    torch.testing.assert_close(factor @ factor.mT, covariance, atol=1e-11, rtol=0)


def other_site(y, means, tril, z):
    pyro.sample("other", dist.Normal(tril[z][..., 0, 0], 1.0), obs=y[:, 0])
    return means[z], tril[z]


def doubled(y, means, tril, z):
    return means[z], 2 * tril[z]


@pytest.mark.parametrize(
    ("use", "reason"),
    [(other_site, "tril also enters other"), (doubled, "tril alone is not their covariance")],
)
def test_parameters_of_other_terms_move_by_newton(fit, use, reason):
    def model(y):
        means = pyro.param("means", MEANS.clone())
        tril = pyro.param("tril", torch.stack([TRIL, TRIL]), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            loc, factor = use(y, means, tril, z)
            pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=factor), obs=y)

    found = fit(model, {"y": Y})
    assert found.status is vem.Status.converged
    assert reason in found.plan["y"].proof
    assert any(row.block == "M" and not row.note for row in found.history)


def test_a_mean_that_is_latent_leaves_the_covariance_to_newton(fit):
    # What a factor of the mean adds to squares is none of the vectors' moments about one value of it.
    def model(y):
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            u = pyro.sample("u", dist.MultivariateNormal(mean, scale_tril=tril))
            pyro.sample("y", dist.Normal(u, 0.1).to_event(1), obs=y)

    found, joint = (fit(model, {"y": Y[::4, :2]}, guide="auto", schedule=how) for how in ("auto", "joint"))
    assert found.status is vem.Status.converged
    assert found.elbo == pytest.approx(joint.elbo, abs=1e-6)
    assert "their mean depends on latents" in found.plan["u"].proof


def test_moments_of_latent_vectors_by_class_and_weight(fit):
    """Two groups of rows, some of which count twice."""
    y = Y[::4, :2]
    group, times = (torch.arange(20) >= 10).long(), 1.0 + torch.arange(20) % 2

    def model(y):
        means = pyro.param("means", MEANS[:, :2].clone())
        tril = pyro.param("tril", torch.eye(2).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=times):
            u = pyro.sample("u", dist.MultivariateNormal(means[group], scale_tril=tril[group]))
            pyro.sample("y", dist.Normal(u, 0.1).to_event(1), obs=y)

    found, joint = (fit(model, {"y": y}, guide="auto", schedule=how) for how in ("auto", "joint"))
    assert found.elbo == pytest.approx(joint.elbo, abs=1e-7)
    assert "moments of the vectors give tril" in found.plan["u"].proof
    assert all("closed form" in row.note for row in found.history if row.block == "M")


def test_latent_vectors_of_classes_take_their_moments(fit):
    y = Y[::8, :2]

    def model(y):
        tril = pyro.param("tril", torch.eye(2).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            u = pyro.sample("u", dist.MultivariateNormal(MEANS[z, :2], scale_tril=tril[z]))
            pyro.sample("y", dist.Normal(u, 0.1).to_event(1), obs=y)

    found, joint = (fit(model, {"y": y}, schedule=how) for how in ("auto", "joint"))
    assert found.elbo == pytest.approx(joint.elbo, abs=1e-6)
    assert all("closed form" in row.note for row in found.history if row.block == "M")


@pytest.mark.parametrize("schedule", ["auto", "alternate"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_class_of_too_few_rows_has_run_away(fit, schedule, number):
    far = 30 + torch.randn(number, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    x = torch.cat([IRIS, far])
    means = torch.stack([x[0], x[100], x[-1]])
    with pytest.warns(UserWarning, match="'tril' has run away"):
        found = fit(iris, {"x": x, "means": means, "is_shared": False}, schedule=schedule)
    assert found.status is vem.Status.diverged
    assert any("tril stayed where moments are singular" in row.note for row in found.history)
    assert all(value.isfinite().all() for value in found.params.values())
    tied = fit(iris, {"x": x, "means": means, "is_shared": True}, schedule=schedule)
    assert tied.status is vem.Status.converged  # all rows share the covariance
