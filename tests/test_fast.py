"""What makes fits fast: blocks of rows, linear maps, second moments, Newton at any size, graphs."""

import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo

import pyro_vem as vem
from pyro_vem.bound.compiled.reduced import scaled_square
from pyro_vem.bound.grids import grid
from pyro_vem.fit.capture import capture
from pyro_vem.fit.minimise import minimise
from pyro_vem.fit.smooth import Loss, Smooth, predicted_gain
from pyro_vem.fit.state import joint_loss
from pyro_vem.model.runtime import isolated

Y = torch.cumsum(0.3 * torch.randn(30, generator=torch.Generator().manual_seed(3)), 0).double()


def walk_in_a_loop(y):
    step = pyro.sample("step", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    x = torch.zeros(())
    for i in range(len(y)):
        x = pyro.sample(f"x{i}", dist.Normal(x, step))
        pyro.sample(f"y{i}", dist.Normal(x, noise), obs=y[i])


def walk_as_one_site(y):
    step = pyro.sample("step", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (len(y),)))
    before = torch.cat([torch.zeros(1), x[:-1]])
    pyro.sample("steps", dist.Normal(torch.zeros(len(y)), step).to_event(1), obs=x - before)
    pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def test_a_loop_over_sites_is_a_few_blocks_and_the_same_bound(fit):
    loop = fit(walk_in_a_loop, {"y": Y})
    vector = fit(walk_as_one_site, {"y": Y}, init={"x": torch.zeros(len(Y))})
    assert loop.elbo == pytest.approx(vector.elbo, abs=1e-6)
    exact = loop.setup.objective.exact
    assert len(exact.compiled.terms) == 2 * len(Y) + 2
    assert len(exact.compiled.merged.terms) == 2  # the Normals, and the two scales
    with isolated(torch.float64):
        at = loop.guide_params, loop.params
        together, apart = exact.total(exact.moments(*at)), exact.terms(*at)
    assert float(together) == pytest.approx(float(sum(apart.values())), abs=1e-10)


@pytest.mark.parametrize("name", ["eight schools", "mixed"])
def test_second_moments_are_what_nodes_give(fit, name):
    from test_compiled import mixed_conditions

    model, data = {"eight schools": (zoo.eight_schools, zoo.SCHOOLS), "mixed": (mixed_conditions, None)}[name]
    result = fit(model, data)
    exact = result.setup.objective.exact
    term = exact.compiled.terms["y"]
    assert term.is_second_moment
    assert result.plan["y"].method == "closed form"
    with isolated(torch.float64):
        moments = exact.moments(result.guide_params, result.params)
        names = list(exact.compiled.terms)
        x = exact.compiled.apart.inputs(moments)[names.index("y")]
        by_nodes = replace(term, condition_nodes=48)
        by_nodes.__dict__["is_second_moment"] = False
        assert float(term.expectation(x)) == pytest.approx(float(by_nodes.expectation(x)), rel=1e-9)


def test_scaled_square_has_both_derivatives():
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(scaled_square, inputs)
    assert torch.autograd.gradgradcheck(scaled_square, inputs)


def many_families(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    weight = pyro.sample("weight", dist.LogNormal(a, scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("normal", dist.Normal(a, scale), obs=x)
        pyro.sample("laplace", dist.Laplace(a, 1.0), obs=x)
        pyro.sample("t", dist.StudentT(4.0, a, scale), obs=x)
        pyro.sample("gamma", dist.Gamma(weight, rate), obs=x.exp())
        pyro.sample("poisson", dist.Poisson(rate * weight), obs=x.exp().round())
        pyro.sample("coin", dist.Bernoulli(share), obs=(x > 0).double())
        pyro.sample("logit", dist.Binomial(5.0, logits=a + x), obs=torch.full((len(x),), 2.0))
        pyro.sample("beta", dist.Beta(weight, rate), obs=torch.sigmoid(x))


@pytest.mark.parametrize("model", [many_families, zoo.eight_schools])
def test_small_problems_form_their_hessian_at_once(fit, model):
    data = zoo.SCHOOLS if model is zoo.eight_schools else {"x": torch.linspace(-1.0, 2.0, 6).double()}
    result = fit(model, data, max_iter=1)
    setup, generator = result.setup, np.random.default_rng(0)
    with isolated(torch.float64):
        loss = joint_loss(setup)
        assert loss.is_small
        x = setup.phi.flat(result.guide_params).numpy()
        x = x + 0.1 * generator.standard_normal(x.size)
        scale = generator.uniform(0.5, 2.0, x.size)
        at_once, one_by_one = (Smooth(each, x, scale) for each in (loss, replace(loss, is_small=False)))
        for v in generator.standard_normal((3, x.size)):
            expected = one_by_one.hessian_product(one_by_one.zero, v)
            gap = at_once.hessian_product(at_once.zero, v) - expected
            assert np.abs(gap).max() < 1e-10 * np.abs(expected).max()
    assert at_once.evaluations == 1


def glmm(group, x, y, groups):
    mu, b = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", groups):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson((a[group] + b * x).exp()), obs=y)


def glmm_data(groups):
    generator = torch.Generator().manual_seed(0)
    group, x = torch.arange(5 * groups) % groups, torch.randn(5 * groups, generator=generator)
    level = 0.5 + 0.5 * torch.randn(groups, generator=generator)
    y = torch.poisson((level[group] + 0.3 * x).exp(), generator=generator)
    return {"group": group, "x": x, "y": y, "groups": groups}


def test_evaluations_do_not_grow_with_the_number_of_groups(fit):
    small, large = (fit(glmm, glmm_data(groups)) for groups in (2_000, 20_000))
    assert small.converged
    assert large.converged
    work = [sum(row.evaluations for row in result.history) for result in (small, large)]
    assert work[1] <= 1.25 * work[0]
    assert sum(row.products for row in large.history) > 0  # Newton, not L-BFGS


@pytest.mark.parametrize("seed", range(5))
def test_starts_far_off_on_log_scales_end_at_the_same_bound(fit, seed):
    generator = torch.Generator().manual_seed(seed)
    far = 4 * torch.randn(3, generator=generator)
    init = {"mu": far[0], "tau": far[1].exp(), "b": far[2]}
    result = fit(glmm, glmm_data(50), init=init)
    assert result.converged
    assert result.elbo == pytest.approx(fit(glmm, glmm_data(50)).elbo, abs=1e-6)


def test_a_gamma_of_random_shape_has_a_bound_from_far_off_too(fit):
    """Pumps from rates a thousand times too high: E[a log x] must not grow beyond E log Gamma(a)."""
    counts = torch.tensor([5.0, 1, 5, 14, 3, 19, 1, 1, 4, 22]).double()
    times = torch.tensor([94.3, 15.7, 62.9, 126, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5]).double()

    def model(counts, times):
        alpha = pyro.sample("alpha", dist.Exponential(1.0))
        beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
        with pyro.plate("pumps", 10):
            rate = pyro.sample("rate", dist.Gamma(alpha, beta))
            pyro.sample("counts", dist.Poisson(rate * times), obs=counts)

    data = {"counts": counts, "times": times}
    rates = [863.4, 917.3, 903.4, 902.6, 892.3, 892.3, 887.0, 886.0, 898.0, 918.8]
    init = {"alpha": torch.tensor(0.66), "beta": torch.tensor(4.2e-4), "rate": torch.tensor(rates)}
    result, usual = fit(model, data, init=init), fit(model, data)
    assert result.converged
    assert result.elbo == pytest.approx(usual.elbo, abs=1e-6)
    wide = {**usual.guide_params, "guide.scale.alpha": torch.tensor(15.0).double()}
    assert usual.setup.objective.terms(wide, {})["rate"] < -1e40


def mixture(y):
    gap = pyro.sample("gap", dist.Normal(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        parts = dist.Normal(torch.stack([torch.zeros(()), gap]), 1.0)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts), obs=y)


def gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    gram = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + noise * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), gram), obs=y)


@pytest.mark.parametrize("name", ["mixture", "gaussian process"])
def test_terms_of_few_numbers_go_on_a_grid(fit, name):
    """Against a grid of 60 nodes for each latent, by the ordinary model."""
    x = torch.linspace(0.0, 3.0, 12).double()
    model, data = {
        "mixture": (mixture, {"y": Y}),
        "gaussian process": (gaussian_process, {"x": x, "y": torch.sin(2 * x)}),
    }[name]
    result = fit(model, data)
    assert result.plan["y"].method == "quadrature"
    assert "a grid of" in result.plan["y"].proof
    assert result.elbo_se == 0.0
    objective = result.setup.objective
    with isolated(torch.float64), torch.no_grad():
        noise, weights = grid(objective.specs, tuple(spec.name for spec in objective.specs), 60)

        def one(point):
            guide, run = objective.problem.run(result.guide_params, result.params, point)
            log_p = sum(site["fn"].log_prob(site["value"]).sum() for site in run.sites.values())
            return log_p - sum(site["fn"].log_prob(site["value"]).sum() for site in guide.values())

        exact = float(weights @ torch.func.vmap(one)(noise))
    assert result.elbo == pytest.approx(exact, abs=1e-6)


def test_a_grid_that_gets_too_coarse_gives_way_to_draws(fit):
    """|z| is smooth where this fit starts; on the grid that is enough there it stops half an sd away."""
    y = torch.ones(1).double()

    def model(y):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        with pyro.plate("rows", 1):
            pyro.sample("y", dist.Normal(z.abs(), 0.3), obs=y)

    result = fit(model, {"y": y}, init={"z": torch.tensor(0.5)})
    assert result.plan["y"].method == "draws"
    assert any("no grid is enough" in note for note in result.plan.notes)
    nodes = torch.linspace(-9.0, 9.0, 40_001).double()
    weights = (-(nodes**2) / 2).softmax(0)

    def bound(loc, log_scale):
        z = loc + log_scale.exp() * nodes
        log_p = dist.Normal(0.5, 1.0).log_prob(z) + dist.Normal(z.abs(), 0.3).log_prob(y)
        return weights @ log_p + log_scale

    found = result.guide_params["guide.loc.z"], result.guide_params["guide.scale.z"].log()
    slopes = torch.autograd.functional.jacobian(bound, found)
    assert abs(float(slopes[0] * found[1].exp())) < 0.02
    assert abs(float(slopes[1])) < 0.02


def test_rows_of_one_scope_have_grids_of_their_own(fit):
    """A kink takes its own row off the grid, and no other."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("smooth", dist.Normal((3 * z).sin(), 1.0), obs=y)
        pyro.sample("kinked", dist.Normal(z.abs(), 0.3), obs=1 - y)

    result = fit(model, {"y": torch.tensor(0.0)}, init={"z": torch.tensor(0.7)})
    assert result.plan["smooth"].method == "quadrature"
    assert result.plan["kinked"].method == "draws"
    notes = [note for note in result.plan.notes if "no grid" in note]
    assert notes == ["kinked: sampled from here on: no grid is enough"]


def test_a_row_that_falls_silent_is_no_row_without_a_grid(fit):
    """At the optimum, z about -3, no draw is above zero: nothing is left to integrate."""

    def model(y):
        z = pyro.sample("z", dist.Normal(-3.0, 0.1))
        pyro.sample("y", dist.Normal(z.clamp(min=0.0) ** 4, 1.0), obs=y)

    result = fit(model, {"y": torch.tensor(0.0)}, init={"z": torch.tensor(0.5)})
    assert result.converged
    assert not any("no grid" in note for note in result.plan.notes)


@pytest.mark.parametrize("start", [2.0, -3.0])
def test_a_grid_is_judged_where_the_fit_ends(fit, start):
    """The factor is too wide for any grid on the way from these starts, and not at the optimum."""
    result = fit(mixture, {"y": Y}, init={"gap": torch.tensor(start)})
    assert result.plan["y"].method == "quadrature"
    assert result.elbo == pytest.approx(
        fit(mixture, {"y": Y}, init={"gap": torch.tensor(0.0)}).elbo, abs=1e-9
    )


def test_draws_are_added_where_others_would_move_the_optimum(fit):
    """A Student regression on exp(v) for five v: it does not compile, and 32 draws are too few."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 5, generator=generator).double()
    y = x @ torch.randn(5, generator=generator).exp().double() + 0.3

    def model(x, y):
        v = pyro.sample("v", dist.Normal(torch.zeros(5), 2.0).to_event(1))
        pyro.sample("y", dist.StudentT(200.0, x @ (1.5 * v).exp(), 6.0).to_event(1), obs=y)

    few = fit(model, {"x": x, "y": y}, options=vem.FitOptions(num_draws=32))
    many = fit(model, {"x": x, "y": y}, options=vem.FitOptions(num_draws=4096))
    assert any("draws: other ones moved the optimum" in row.note for row in few.history)
    assert few.setup.objective.num_draws > 32
    assert any("fixed draws: they move the optimum by about" in note for note in few.plan.notes)
    sds = many.guide_params["guide.scale.v"]
    shift = (few.guide_params["guide.loc.v"] - many.guide_params["guide.loc.v"]).abs() / sds
    assert float(shift.max()) < 0.2


@pytest.mark.parametrize("is_small", [False, True])
def test_derivatives_where_sds_grow_linearly(is_small):
    """Of a Gaussian's bound in its mean and the log of its sd, against differences of values."""
    origin, scale = np.array([0.3, -2.0]), np.array([0.2, 0.5])
    loss = Loss(lambda x: (x[0] + 2 * x[1].exp()).square() + (2 * x[1]).exp() - x[1], is_small=is_small)
    smooth = Smooth(loss, origin, scale, np.array([False, True]))
    for a in (np.array([1.0, 2.0]), np.array([-1.0, -2.0])):
        step = 1e-4 * np.eye(2)
        slope = [(smooth.value(a + e) - smooth.value(a - e)) / 2e-4 for e in step]
        assert smooth.gradient(a) == pytest.approx(slope, rel=1e-6, abs=1e-6)
        bend = [(smooth.gradient(a + e) - smooth.gradient(a - e)) / 2e-4 for e in step]
        hessian = [smooth.hessian_product(a, e) for e in np.eye(2)]
        assert np.array(hessian) == pytest.approx(np.array(bend), rel=1e-6, abs=1e-6)
    assert smooth.point(np.array([1.0, 2.0])) == pytest.approx([0.5, -2.0 + np.log(2)])


def test_second_derivatives_can_be_asked_for_after_all():
    """A function without the graph of its gradient, and in other units before and after that is taken."""
    x, scale = np.array([1.0, 2.0]), np.array([2.0, 0.5])
    loss = Loss(lambda a: (a**4).sum() + a.prod())
    v = np.array([0.3, -1.0])
    wanted = Smooth(loss, x, scale)
    product = wanted.hessian_product(wanted.zero, v)
    for is_known in (False, True):
        plain = Smooth(loss, x, np.ones(2), is_bent=False)
        plain.value(plain.zero)
        if is_known:
            plain.gradient(plain.zero)
        twin = plain.in_units_of(scale)
        assert np.allclose(twin.gradient(twin.zero), wanted.gradient(wanted.zero))
        assert np.allclose(twin.hessian_product(twin.zero, v), product)
        assert np.allclose(plain.gradient(plain.zero) * scale, wanted.gradient(wanted.zero))


def test_steps_go_on_where_the_function_shows_no_gain():
    """Beside 1e6 nats a gain of 1e-12 is rounding; the gradient of 1e-6 is not."""
    weights = torch.logspace(-3, 0, 5, dtype=torch.float64)
    loss = Loss(lambda x: 1e6 + (weights * (x - 1).cosh()).sum())
    found = minimise(loss, np.zeros(5), np.ones(5), gtol=1e-11, max_iter=100, method="newton")
    assert found.is_solved
    assert found.x == pytest.approx(np.ones(5), abs=1e-8)


def test_a_hessian_serves_near_by_only_where_it_explains_the_gradient():
    def count(function, step):
        smooth = Smooth(Loss(function, is_small=True, is_even=True), np.ones(2), np.ones(2))
        for a in (smooth.zero, step):
            exact = Smooth(Loss(function), smooth.point(a), np.ones(2))
            product = smooth.hessian_product(a, np.ones(2))
        return smooth._bent.point - 1, product, exact.hessian_product(exact.zero, np.ones(2))

    near, far = np.array([5e-4, 0.0]), np.array([5e-3, 0.0])
    kept, found, wanted = count(lambda x: (x**4).sum(), near)
    assert not kept.any()
    assert found == pytest.approx(wanted, rel=2e-3)
    steep = count(lambda x: (1e3 * (x - 1)).cosh().sum(), near)
    for kept, found, wanted in (count(lambda x: (x**4).sum(), far), steep):  # taken anew
        assert kept.any()
        assert found == pytest.approx(wanted, rel=1e-9)


def test_few_sds_that_start_too_small_do_not_hold_up_the_rest():
    """Five of 5,000 start three e-folds too low: a Newton step in their logs goes 200 beyond."""
    curvature = np.full(5000, np.exp(10.0))
    curvature[:5] = np.exp(4.0)
    loss = Loss(lambda x: ((2 * x).exp() * torch.as_tensor(curvature) / 2 - x).sum())

    def evaluations(log_sds):
        found = minimise(
            loss, np.full(5000, -5.0), np.full(5000, 0.5**0.5), gtol=1e-9, max_iter=100, method="newton",
            log_sds=log_sds,
        )  # fmt: skip
        assert found.x == pytest.approx(-np.log(curvature) / 2, abs=1e-6)
        return found.evaluations

    assert evaluations(np.ones(5000, dtype=bool)) < 0.7 * evaluations(None)


def bowl(seed, gain):
    """A quadratic of 500 coordinates, curvatures over four decades, so much above its minimum."""
    draw = torch.Generator().manual_seed(seed)
    curvature = 10 ** (-4 * torch.rand(500, generator=draw, dtype=torch.float64))
    slope = torch.randn(500, generator=draw, dtype=torch.float64) * curvature.sqrt()
    slope = slope * (gain / (0.5 * (slope**2 / curvature).sum())).sqrt()
    loss = Loss(lambda x: (0.5 * curvature * x**2 + slope * x).sum())
    return Smooth(loss, np.zeros(500), np.ones(500))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_to_gain_is_not_missed(seed):
    assert predicted_gain(bowl(seed, gain=2e-2), tol=1e-2) > 1e-2


def test_little_that_is_left_costs_few_products():
    smooth = bowl(0, gain=1e-5)
    assert 0 < predicted_gain(smooth, tol=1e-2) < 1e-5
    assert smooth.products == 10


def test_a_graph_that_looks_at_values_is_refused():
    def branch(x, other):
        return (x**2).sum() if float(x.sum()) > 0 else (x**4).sum()

    def escape(x, other):
        return (x**2).sum() * float(other.detach().numpy().sum())

    x = torch.ones(2, dtype=torch.float64)
    assert isinstance(capture(branch, x, x), str)
    assert isinstance(capture(escape, x, x), str)


@pytest.mark.slow
def test_a_compiled_fit_is_the_same_fit(fit, global_state):
    snapshot, same = global_state
    before = snapshot()
    plain, compiled = (fit(mixture, {"y": Y}, compile=mode) for mode in (False, True))
    same(before)
    assert compiled.elbo == pytest.approx(plain.elbo, abs=1e-8)
    assert any("E-step compiled" in note for note in compiled.plan.notes), compiled.plan.notes
    assert not plain.plan.notes


def test_a_fit_without_a_graph_loads_no_tracer():
    code = """
import sys, pyro, torch, pyro.distributions as dist, pyro_vem as vem
def model(y):
    gap = pyro.sample("gap", dist.Normal(2.0, 1.0))
    parts = dist.Normal(torch.stack([torch.zeros(()), gap]), 1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts), obs=y)
def drawn(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    parts = dist.Normal(m, 1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(5) / 5), parts), obs=y)
def weibull(y):
    k = pyro.sample("k", dist.LogNormal(0.0, 1.0))
    m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Weibull(m.sum().exp(), k), obs=y.exp())
for fn in (model, drawn, weibull):
    fit = vem.fit_vem(fn, {"y": torch.linspace(-2.0, 2.0, 200)}, progress=False)
    print(fit.plan["y"].method, "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["quadrature", "False", "False", *2 * ["draws", "False", "False"]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_arrays_come_from_memory_that_others_have_left():
    """A second set of arrays as large as a first one is no news to the system."""
    code = """
import resource, torch
from pyro_vem.model.runtime import reuse_memory
reuse_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [torch.ones(250_000, dtype=torch.float64) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (int(number) for number in out.stdout.split())
    assert second < first / 4


def test_a_support_that_ends_at_a_latent_stalls_and_says_so(fit):
    """y ~ Uniform(0, theta): the bound of any Gaussian is -inf, that of fixed draws has an edge."""

    def model(y):
        theta = pyro.sample("theta", dist.LogNormal(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, theta), obs=y)

    options = vem.FitOptions(step_iterations=20)
    result = fit(model, {"y": torch.tensor([0.5, 0.3, 0.2])}, options=options)
    assert not result.converged
    assert result.status in (vem.Status.stalled, vem.Status.nonfinite)
    assert result.n_iter < 30
