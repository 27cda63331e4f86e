"""NUTS beside a fit: the density it samples, the table, when it is no reference, and the picture."""

import dataclasses
import itertools
import math
import sys

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from scipy import stats

import pyro_vem as vem
from pyro_vem.model.runtime import isolated
from pyro_vem.posterior.arviz import nuts_data
from pyro_vem.posterior.comparison import Comparison, diagnostics, frame
from pyro_vem.posterior.containers import container, has_trees
from pyro_vem.posterior.density import Density
from pyro_vem.posterior.engines import ENGINES, NUTSOptions, Potential

QUICK = {"num_chains": 2, "num_samples": 100, "warmup_steps": 30, "progress": False}


@pytest.fixture(scope="module")
def schools():
    return vem.fit_vem(zoo.eight_schools, zoo.SCHOOLS, progress=False)


def line(x, y):
    """Conjugate and correlated: mean field is too narrow, its linear response is exact."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


LINE = {"x": torch.linspace(0.0, 2.0, 9), "y": torch.linspace(1.0, 2.0, 9)}


def line_exact():
    """Mean and covariance of (a, b)."""
    X = np.stack([np.ones(9), LINE["x"].double().numpy()], axis=1)
    covariance = np.linalg.inv(X.T @ X + np.eye(2) / 4)
    return covariance @ X.T @ LINE["y"].double().numpy(), covariance


@pytest.fixture(scope="module")
def linear():
    return vem.fit_vem(line, LINE, progress=False)


@pytest.fixture(params=["pyro", "nutpie"])
def sampler(request):
    if request.param == "nutpie":
        pytest.importorskip("nutpie")
    return request.param


# The density


def constrained(y):
    """Every kind of bijector, and shapes."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    s = pyro.sample("s", dist.Gamma(2.0, torch.ones(2)).to_event(1))
    u = pyro.sample("u", dist.Uniform(-1.0, 3.0))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(u, s[0]))
        pyro.sample("y", dist.Normal(z + (p @ chol).sum(), s[1]), obs=y)


@pytest.mark.parametrize("model", ["schools", "constrained"])
def test_the_density_is_that_of_pyro(fit, schools, model):
    """Against Pyro's potential: value and gradient at random points, also when captured."""
    result = schools if model == "schools" else fit(constrained, {"y": torch.tensor([0.5, 1.0, 2.5])})
    with isolated(torch.float64):
        ours, call = Density.of(result), result.setup.problem.call
        _, potential, transforms, _ = initialize_model(
            result.model, model_args=call.args, model_kwargs=call.kwargs
        )
        graph = ours.captured(is_long=False)
        assert graph.told == "traced"
        for seed in range(5):
            z = ours.start(seed)
            values = ours.values(z)
            at = {name: transforms[name](value) for name, value in values.items()}
            value, slope = ours.gradient(z)
            assert float(value) == pytest.approx(-float(potential(at)), rel=1e-9)
            assert torch.allclose(graph.gradient(z)[1], slope, rtol=1e-9)
            step = 1e-5 * torch.randn(ours.dim)
            rise = float(ours(z + step) - ours(z - step)) / 2
            assert float(slope @ step) == pytest.approx(rise, rel=1e-4, abs=1e-12)


def test_its_coordinates_are_those_of_the_linear_response(linear):
    """A Gaussian posterior is exactly standard normal in them."""
    with isolated(torch.float64):
        density = Density.of(linear)
        mean, covariance = line_exact()
        exact = stats.multivariate_normal(mean, covariance)
        gaps = []
        for seed in range(4):
            z = density.start(seed)
            values = density.values(z)
            gaps.append(float(density(z)) - exact.logpdf([float(values["a"]), float(values["b"])]))
            assert torch.allclose(density.gradient(z)[1], -z, atol=1e-5)
        assert np.ptp(gaps) < 1e-6
    assert density.origin == "linear response"


def test_errors_of_a_density(linear, sampler):
    """A matrix without a decomposition is a point outside; what else goes wrong is raised."""

    def failing(error):
        calls = itertools.count()

        def gradient(z):
            if next(calls) % 50 == 49:
                raise error
            return -0.5 * z @ z, -z

        return dataclasses.replace(density, graph=gradient)

    with isolated(torch.float64):
        density, options = Density.of(linear), NUTSOptions(1, 50, 30, progress=False)
        singular = torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite")
        assert ENGINES[sampler](failing(singular), options, 0).points.isfinite().all()
        with pytest.raises(KeyError, match="the user's own"):
            ENGINES[sampler](failing(KeyError("the user's own")), options, 0)
        with pytest.raises(vem.ModelError, match="none of 100 draws of the linear response has a finite"):
            dataclasses.replace(density, graph=lambda z: (z.sum() * torch.nan, z)).start(0)


def test_a_compiled_density_agrees(linear):
    with isolated(torch.float64):
        density = Density.of(linear)
        compiled = density.captured(is_long=True)
        z = density.start(7)
        # Without a C++ compiler there is a traced one.
        assert compiled.told in ("compiled", "traced")
        assert torch.allclose(compiled.gradient(z)[1], density.gradient(z)[1], rtol=1e-9)


@pytest.fixture(scope="module")
def branching():
    """A model that looks at values."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0 if z < 0.5 else 1.01), obs=y)

    return vem.fit_vem(model, {"y": torch.tensor([0.5, 1.0])}, progress=False)


def test_a_model_without_a_graph_is_run_itself(branching, sampler):
    with isolated(torch.float64):
        density = Density.of(branching).captured(is_long=False)
        assert density.told.startswith("not captured (")
        assert density.graph is None
        run = ENGINES[sampler](density, NUTSOptions(2, 100, 30, 0.8, progress=False), 0)
        draws = density.values(run.points)["z"]
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.25)
    assert float(draws.std()) == pytest.approx(3**-0.5, rel=0.3)


def test_many_latents_have_variances_only(fit, monkeypatch):
    monkeypatch.setattr("pyro_vem.posterior.density.MOST_DENSE", 5)
    result = fit(zoo.pumps, zoo.PUMPS)
    with isolated(torch.float64):
        density = Density.of(result)
    assert density.root.shape == (10,)
    assert np.allclose(density.root, result._linear_response.sd)
    assert "variances only" in result.compare_nuts(**QUICK).note


def test_other_guides_give_their_own_sds(fit):
    result = fit(line, LINE, guide=AutoMultivariateNormal(line))
    with isolated(torch.float64):
        density = Density.of(result)
    assert density.origin == "guide"
    _, covariance = line_exact()
    assert np.allclose(density.root, np.diag(covariance) ** 0.5, rtol=0.1)
    comparison = result.compare_nuts(num_chains=2, num_samples=300, warmup_steps=150, progress=False)
    assert comparison.correction is None or comparison.correction == "psis"
    assert float(comparison.table["mean_diff_sd"].abs().max()) < 0.3


# The table


def test_a_conjugate_model_has_the_known_table(linear, sampler):
    """Means agree; mean field is too narrow by the known factor, its linear response is right."""
    comparison = linear.compare_nuts(
        sampler=sampler, num_samples=600, warmup_steps=50, num_draws=20_000, progress=False
    )
    table = comparison.table
    assert comparison.is_reference, comparison.reasons
    assert comparison.divergences == 0
    assert str(comparison).startswith("NUTS is a reference")
    mean, covariance = line_exact()
    sd = np.diag(covariance) ** 0.5
    ratio = np.diag(np.linalg.inv(covariance)) ** -0.5 / sd
    error = 5 * (0.5 / table["ess_bulk"].min() + 0.5 / 20_000) ** 0.5
    assert (table["mean_diff_sd"].abs() < 5 * table["mean_diff_mcse"]).all()
    assert (table["mean_diff_mcse"] < 1.5 / table["ess_bulk"] ** 0.5).all()
    assert np.allclose(table["sd_ratio"], ratio, atol=error)
    assert np.allclose(table["sd_ratio_corrected"], 1.0, atol=2 * error)
    # Between centred Gaussians: quantiles are apart by z_p (ratio - 1), W1 by sqrt(2 / pi) |ratio - 1|.
    assert np.allclose(table["wasserstein_sd"], (2 / math.pi) ** 0.5 * (1 - ratio), atol=0.05)
    assert np.allclose(table["q5_error"], 1.645 * (1 - ratio), atol=0.12)
    assert np.allclose(table["q95_error"], -1.645 * (1 - ratio), atol=0.12)
    assert np.allclose(table["q50_error"], 0.0, atol=0.1)
    assert np.allclose(table["nuts_mean"], mean, atol=5 * sd.max() / table["ess_bulk"].min() ** 0.5)
    assert np.allclose(table["nuts_sd"], sd, rtol=error)


def test_a_run_is_repeatable_and_leaves_no_trace(linear, global_state, sampler):
    snapshot, same = global_state
    before = snapshot()
    tables = [linear.compare_nuts(sampler=sampler, seed=seed, **QUICK).table for seed in (3, 3, 4)]
    same(before)
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def radon():
    """A varying intercept for each of 85 counties, few of them with many houses."""
    rng = np.random.default_rng(2)
    county = torch.from_numpy(np.sort(np.concatenate([np.arange(85), rng.integers(85, size=834)])))
    level = torch.from_numpy(1.5 + 0.3 * rng.standard_normal(85))
    y = level[county] + 0.75 * torch.from_numpy(rng.standard_normal(919))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("counties", 85):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        with pyro.plate("houses", len(y)):
            pyro.sample("y", dist.Normal(mu + tau * raw[county], sigma), obs=y)

    return vem.fit_vem(model, {"y": y}, progress=False)


def cold_run(density, options):
    """Pyro with its defaults: uniform starts, unit metric, both adapted."""
    flat = {"loc": torch.zeros_like(density.loc), "root": torch.ones(density.dim)}
    starts = 4 * torch.rand(50, density.dim, generator=torch.Generator().manual_seed(0)) - 2
    density = dataclasses.replace(density, starts=starts, graph=None, **flat).captured(is_long=False)
    points = []
    for chain in range(options.num_chains):
        pyro.set_rng_seed(chain)
        kernel = NUTS(potential_fn=lambda at: Potential.apply(at["z"], density.gradient))
        start = {"z": density.start(chain)}
        mcmc = MCMC(kernel, options.num_samples, options.warmup_steps, start, disable_progbar=True)
        mcmc.run()
        points.append(mcmc.get_samples()["z"])
    return density.values(torch.stack(points))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schools", "radon"])
def test_a_warm_start_needs_half_the_warm_up(schools, name):
    """tests/benchmarks/nuts.py has the lengths that are needed; here 25 steps are held against a cold 50."""
    fit = schools if name == "schools" else radon()

    def smallest(values):
        idata = nuts_data(fit, values, {}, None, None)
        table = diagnostics(frame(idata, idata), 4)
        return table["ess_bulk"].min(), table["r_hat"].max()

    with isolated(torch.float64):
        density = Density.of(fit).captured(is_long=False)
        warm = ENGINES["pyro"](density, NUTSOptions(4, 250, 25, 0.8, progress=False), 0)
        cold = cold_run(density, NUTSOptions(4, 250, 50, 0.8, progress=False))
    ess, r_hat = smallest(density.values(warm.points))
    assert ess > 0.7 * smallest(cold)[0]
    assert r_hat < 1.03


def test_deterministic_sites_and_labels(schools, fit):
    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("school", len(sigma)):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + 5.0 * t)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    result = fit(model, zoo.SCHOOLS)
    comparison = result.compare_nuts(coords={"school": list("ABCDEFGH")}, **QUICK)
    assert "theta[C]" in comparison.table.index
    nuts = comparison.idata_nuts.posterior
    assert np.allclose(nuts["theta"].values, nuts["mu"].values[..., None] + 5.0 * nuts["t"].values)
    assert "diverging" in comparison.idata_nuts.sample_stats
    twice = result.compare_nuts(posterior=comparison.idata_nuts, coords={"school": list("AACDEFGH")})
    assert "theta[1]" in twice.table.index  # labels that are not unique are no labels


def test_parameters_are_held_and_constants_left_out(fit):
    @vem.vem_model(map_sites=("sd",))
    def model(y):
        sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.deterministic("fixed", 2.0 * mu)
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    result = fit(model, {"y": torch.tensor([1.0, 2.0, 4.0])})
    comparison = result.compare_nuts(num_chains=2, num_samples=300, warmup_steps=50, progress=False)
    assert "Parameters held at their estimates in both: mu, sd" in comparison.note
    assert list(comparison.table.index) == ["z[0]", "z[1]", "z[2]"]
    mu, sd = (float(result.params[name]) for name in ("mu", "sd"))
    wanted = (mu + np.array([1.0, 2.0, 4.0]) / sd**2) / (1 + 1 / sd**2)
    error = 5 * comparison.table["nuts_sd"] / comparison.table["ess_bulk"] ** 0.5
    assert (np.abs(comparison.table["nuts_mean"] - wanted) < error).all()


def test_elements_that_the_model_never_uses_are_not_sampled(fit):
    """With obs_mask Pyro has a latent for every row: NUTS walks off along those that have no term."""
    y = torch.tensor([1.0, 2.0, 3.0])

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=torch.tensor([True, False, True]))

    result = fit(model, {"y": y})
    idle = [site for site in result.setup.prototype.latents if site.idle is not None]
    assert idle, "the model has idle elements"
    comparison = result.compare_nuts(num_samples=500, progress=False)
    assert f"Elements of {idle[0].name} that the model never uses are held" in comparison.note
    assert comparison.is_reference, comparison.reasons
    missing = f"{idle[0].name}[1]"
    assert missing in comparison.table.index
    assert f"{idle[0].name}[0]" not in comparison.table.index
    assert comparison.table.loc["z", "nuts_mean"] == pytest.approx(4 / 3, abs=0.15)
    assert comparison.table.loc[missing, "nuts_sd"] == pytest.approx((1 + 1 / 3) ** 0.5, rel=0.15)


# When NUTS is no reference


def funnel(y):
    """Centred, with hardly any data: the classic that diverges."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))
        pyro.sample("y", dist.Normal(x, 10.0), obs=y)


def test_too_few_draws_are_no_reference(linear):
    comparison = linear.compare_nuts(num_chains=2, num_samples=60, warmup_steps=30, progress=False)
    assert not comparison.is_reference
    assert any(
        "bulk ESS is below 400 for" in reason and "num_samples" in reason for reason in comparison.reasons
    )
    assert str(comparison).startswith("NUTS IS NO REFERENCE HERE")


def test_divergences_are_no_reference(fit, sampler):
    result = fit(funnel, {"y": torch.zeros(8)})
    comparison = result.compare_nuts(sampler=sampler, target_accept_prob=0.4, **QUICK)
    assert comparison.divergences > 0
    assert not comparison.is_reference
    assert f"{comparison.divergences} divergences" in comparison.reasons[-1]
    assert int(comparison.idata_nuts.sample_stats["diverging"].sum()) == comparison.divergences


def test_divergences_are_placed_and_have_a_remedy(linear):
    draws = linear.sample(2000, correction="linear_response")
    values = {name: (["chain", "draw"], value.reshape(2, 1000).numpy()) for name, value in draws.items()}
    flags = {"diverging": (["chain", "draw"], values["a"][1] < np.quantile(values["a"][1], 0.02))}
    data = container({"posterior": values, "sample_stats": flags}, {}, {})
    (reason,) = linear.compare_nuts(posterior=data).reasons
    for part in ("40 divergences, mostly where a is low", "target_accept_prob", "pyro.infer.reparam"):
        assert part in reason


def test_chains_that_disagree_are_no_reference(linear):
    draws = np.random.default_rng(0).standard_normal((2, 500))
    draws[1] += 1.0
    both = {"a": (["chain", "draw"], draws), "b": (["chain", "draw"], draws[::-1])}
    comparison = linear.compare_nuts(posterior=container({"posterior": both}, {}, {}))
    assert comparison.reasons[0].startswith("R-hat is above 1.01 for a (1.")
    assert comparison.divergences is None
    assert np.isnan(comparison.seconds_nuts)
    assert "nan" not in str(comparison)


def test_a_single_chain_is_no_reference(linear):
    (reason,) = linear.compare_nuts(posterior=linear.to_arviz(num_draws=1000)).reasons
    assert reason.startswith("a single chain has no R-hat")


def test_diagnostics_of_draws_that_are_known():
    """Independent draws: ESS is their number, the error of a mean is sd / sqrt(n)."""
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 2))
    frame = diagnostics(pd.DataFrame(draws, columns=["a", "b"]), 4)
    assert np.allclose(frame["ess_bulk"], 4000, rtol=0.1)
    assert np.allclose(frame["mcse"], 2.0 / 4000**0.5, rtol=0.1)
    assert (frame["r_hat"] < 1.005).all()


# Draws of the user's own


def test_a_users_own_mcmc(schools, fit):
    mcmc = MCMC(NUTS(zoo.eight_schools), 100, warmup_steps=100, num_chains=1, disable_progbar=True)
    mcmc.run(**zoo.SCHOOLS)
    comparison = schools.compare_nuts(posterior=mcmc)
    assert {"mu", "tau", "t[0]"} <= set(comparison.table.index)
    assert comparison.divergences == len(mcmc.diagnostics()["divergences"]["chain 0"])
    assert "theta[0]" in comparison.table.index or not schools.setup.prototype.deterministic
    other = fit(zoo.normal_mean, {"y": torch.ones(2)})
    with pytest.raises(vem.ModelError, match="have none of the fit's sites"):
        other.compare_nuts(posterior=comparison.idata_nuts)
    fewer = {"sigma": zoo.SCHOOLS_SIGMA[:5], "y": zoo.SCHOOLS_Y[:5]}
    with pytest.raises(vem.ModelError, match=r"'t' is shaped \(5,\) in the fit and \(8,\)"):
        fit(zoo.eight_schools, fewer).compare_nuts(posterior=mcmc)


def test_arviz_data_of_either_generation(schools):
    xr = pytest.importorskip("xarray")
    draws = schools.sample(500)
    values = {
        name: (
            ["chain", "draw", *["plate"][: value.dim() - 1]],
            value.reshape(2, 250, *value.shape[1:]).numpy(),
        )
        for name, value in draws.items()
    }
    flags = {"diverging": (["chain", "draw"], np.zeros((2, 250), dtype=bool))}
    trees = [xr.DataTree.from_dict({"posterior": xr.Dataset(values), "sample_stats": xr.Dataset(flags)})]
    if not has_trees():
        trees.append(az.InferenceData(posterior=xr.Dataset(values), sample_stats=xr.Dataset(flags)))
    tables = []
    for data in trees:
        comparison = schools.compare_nuts(posterior=data)
        assert comparison.divergences == 0
        tables.append(comparison.table)
        assert (comparison.table["sd_ratio"].sub(1).abs() < 0.2).all()
    assert all(table.equals(tables[0]) for table in tables)


def test_what_cannot_be_compared(schools, fit, monkeypatch):
    with pytest.raises(vem.ModelError, match="a dict without draws"):
        schools.compare_nuts(posterior={"mu": torch.ones(3)})
    with pytest.raises(ValueError, match="choose one of 'pyro', 'nutpie'"):
        schools.compare_nuts(sampler="stan")
    with pytest.raises(TypeError, match="num_sample"):
        schools.compare_nuts(num_sample=10)
    with pytest.raises(ValueError, match="four draws at least"):
        schools.compare_nuts(num_samples=1)
    with pytest.raises(ValueError, match="leave out num_samples"):
        schools.compare_nuts(posterior=schools.to_arviz(), num_samples=10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        NUTSOptions(target_accept_prob=1.0)
    with pytest.raises(vem.ModelError, match=r"call its run\(\) first"):
        schools.compare_nuts(posterior=MCMC(NUTS(zoo.eight_schools), 10))
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(vem.ModelError, match=r'pip install "pyro-vem\[nutpie\]"'):
        schools.compare_nuts(sampler="nutpie", **QUICK)


# The card and the picture


@pytest.fixture(scope="module")
def made(schools):
    """A comparison with draws that cost nothing."""
    return schools.compare_nuts(posterior=schools.to_arviz(num_draws=4000, seed=5), num_draws=4000)


def test_the_card_fits_a_terminal(made):
    assert isinstance(made, Comparison)
    lines = str(made).splitlines()
    assert max(map(len, lines)) <= 100
    for part in ("R-hat", "ESS", "sd ratio", "corrected", "W1", "VEM 0."):
        assert part in str(made)
    wide = made.table.set_axis([f"a_site_with_a_long_name[school {i}, 1, 2]" for i in range(len(made.table))])
    many = dataclasses.replace(made, table=pd.concat([wide] * 10))
    assert max(map(len, str(many).splitlines())) <= 100
    assert "scalars, those that differ most" in str(many)


def test_the_picture(made, tmp_path):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert made.plot(ax) is ax
    assert [label.get_text() for label in ax.get_legend().get_texts()] == [
        "VEM",
        f"VEM, {made.correction}",
        "NUTS",
    ]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == list(made.table.index)
    low, high = ax.get_ylim()
    assert low > high  # the first row on top
    scaled = made.plot(var_names=["mu", "tau"], scaled=True)
    assert [label.get_text() for label in scaled.get_yticklabels()] == ["mu", "tau"]
    medians = [line.get_xdata() for line in scaled.get_lines() if line.get_label() == "NUTS"]
    assert np.abs(medians).max() < 0.5
    with pytest.raises(ValueError, match="did you mean 'tau'"):
        made.plot(var_names=["tua"])
    scaled.figure.savefig(tmp_path / "forest.png")
    plt.close("all")
