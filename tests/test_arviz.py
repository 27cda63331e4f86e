"""Fits as ArviZ data, with InferenceData (ArviZ 0.x) and DataTree (1.x): the same tests for both."""

import json

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
import zoo
from pyro.contrib.autoname import scope
from scipy import stats

import pyro_vem as vem
from pyro_vem.posterior.arviz import ALL_GROUPS, DEFAULT_GROUPS, loo, nuts_data
from pyro_vem.posterior.containers import has_trees, psis

SCHOOLS = list("ABCDEFGH")


@pytest.fixture(scope="module")
def schools():
    return vem.fit_vem(zoo.eight_schools, zoo.SCHOOLS, progress=False)


@pytest.fixture(scope="module")
def pumps():
    return vem.fit_vem(zoo.pumps, zoo.PUMPS, progress=False)


def line(x, y=None, slope_sd=2.0):
    """Conjugate, with a correlated posterior: a mean-field guide is too narrow."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, slope_sd))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


X = torch.linspace(-1.6, 2.0, 12)
Y = torch.tensor([0.9, 0.2, 1.4, 1.1, 2.9, 1.4, 3.3, 2.2, 2.1, 3.9, 3.1, 5.5])


def exact_loo(x, y, sds):
    """log p(y_i | the other rows) of `line`, in closed form."""
    x, y = x.double().numpy(), y.double().numpy()
    design = np.stack([np.ones_like(x), x], axis=1)
    cov = design @ np.diag(np.square(sds)) @ design.T + np.eye(len(y))
    precision = np.linalg.inv(cov)
    var = 1 / np.diag(precision)
    return stats.norm(y - var * (precision @ y), var**0.5).logpdf(y)


def groups_of(data):
    return set(data.children) if has_trees() else set(data.groups())


def pointwise(result):
    return (result.elpd_i if has_trees() else result.loo_i).values


def test_the_same_groups_in_both_generations(schools):
    data = schools.to_arviz(coords={"school": SCHOOLS}, num_draws=500)
    assert groups_of(data) == set(DEFAULT_GROUPS)
    assert data.posterior.sizes == {"chain": 1, "draw": 500, "school": 8}
    assert data.posterior["theta"].dims == ("chain", "draw", "school")
    assert list(data.posterior["school"].values) == SCHOOLS
    assert data.log_likelihood["y"].dims == ("chain", "draw", "school")
    expected = torch.distributions.Normal(
        torch.tensor(data.posterior["theta"].values[0]), zoo.SCHOOLS_SIGMA.double()
    ).log_prob(zoo.SCHOOLS_Y.double())
    assert np.allclose(data.log_likelihood["y"].values[0], expected.numpy())
    assert np.allclose(data.observed_data["y"].values, zoo.SCHOOLS_Y.numpy())
    assert np.allclose(data.constant_data["sigma"].values, zoo.SCHOOLS_SIGMA.numpy())
    assert data.constant_data["sigma"].dims == ("school",)
    few = schools.to_arviz(groups=["posterior"], num_draws=20)
    assert groups_of(few) == {"posterior"}
    with pytest.raises(ValueError, match=r"unknown name 'posteror' \(did you mean 'posterior'"):
        schools.to_arviz(groups="posteror")


def test_weights_are_normalised_and_correct_the_draws(schools):
    """They move tau towards NUTS (mean 3.6 against the guide's 2.9)."""
    data = schools.to_arviz(num_draws=20_000)
    sample_stats = data.sample_stats
    assert set(sample_stats.data_vars) == {"lp", "log_q", "log_weight"}
    weight = np.exp(sample_stats["log_weight"].values[0])
    assert weight.sum() == pytest.approx(1.0)
    tau = data.posterior["tau"].values[0]
    assert weight @ tau > tau.mean() + 0.2
    ratio = (sample_stats["lp"] - sample_stats["log_q"]).values[0]
    assert sample_stats.attrs["pareto_k"] == psis(ratio)[1]
    assert 0.3 < sample_stats.attrs["pareto_k"] < 0.7
    assert data.posterior.attrs["correction"] == "none"


def test_corrected_draws(schools):
    plain = schools.to_arviz(num_draws=4000).posterior["tau"]
    for correction in ("linear_response", "psis"):
        data = schools.to_arviz(num_draws=4000, correction=correction)
        assert data.posterior.attrs["correction"] == correction
        assert float(data.posterior["tau"].mean()) > float(plain.mean()) + 0.2
        log_weight = data.sample_stats["log_weight"].values
        if correction == "psis":
            assert np.allclose(log_weight, -np.log(4000))
            assert 0.3 < data.sample_stats.attrs["pareto_k"] < 0.7
        else:
            assert np.ptp(log_weight) > 1.0


def test_parameters_with_standard_errors(fit, pumps):
    data = pumps.to_arviz(groups=["parameters"], num_draws=20)
    tau = data.parameters["tau"]
    assert list(data.parameters["statistic"].values) == ["estimate", "standard_error"]
    assert float(tau.sel(statistic="estimate")) == float(pumps.params["tau"])
    error = float(pumps.standard_errors()["tau"])
    assert float(tau.sel(statistic="standard_error")) == error
    assert error > 0
    unfinished = fit(zoo.pumps, zoo.PUMPS, max_iter=1).to_arviz(groups=["parameters"]).parameters
    assert np.isnan(unfinished["tau"].sel(statistic="standard_error"))
    assert "converge" in unfinished.attrs["standard_error"]
    attrs = pumps.to_arviz(num_draws=20).posterior.attrs
    assert json.loads(attrs["params"])["tau"] == pytest.approx(float(pumps.params["tau"]))
    assert attrs["inference_library"] == "pyro_vem"


def test_held_parameters_and_map_sites(fit):
    @vem.vem_model(map_sites=("sd",), fixed=("w",))
    def model(y):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("rows", len(y)):
            sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
            z = pyro.sample("z", dist.Normal(w.sum(), 1.0))
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    result = fit(model, {"y": torch.tensor([1.0, 2.0, 4.0])})
    data = result.to_arviz(groups=["posterior", "parameters"], dims={"w": ["term"]}, num_draws=20)
    assert data.parameters["w"].dims == ("statistic", "term")
    assert np.isnan(data.parameters["w"].sel(statistic="standard_error")).all()
    assert data.parameters["sd"].dims == ("statistic", "rows")
    assert data.posterior["sd"].dims == ("chain", "draw", "rows")


def test_names_of_events_and_clashing_and_scoped_names(fit):
    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("x", len(x)):  # the plate is called like a data argument
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    data = {"x": torch.randn(4, 2), "y": torch.randn(4)}
    result = fit(model, data)
    found = result.to_arviz(dims={"beta": ["term"]}, coords={"term": ["a", "b"]}, num_draws=20)
    assert found.posterior["beta"].dims == ("chain", "draw", "term")
    assert found.observed_data["y"].dims == ("x_plate",)
    with pytest.raises(ValueError, match=r"dims\['beta'\] has 2 names"):
        result.to_arviz(dims={"beta": ["term", "more"]}, num_draws=20)
    chains = {"beta": torch.zeros(3, 5, 2)}
    nuts = nuts_data(result, chains, {"diverging": torch.zeros(3, 5)}, {"beta": ["term"]}, {"term": "ab"})
    assert nuts.posterior["beta"].dims == ("chain", "draw", "term")
    assert nuts.posterior.sizes["chain"] == 3
    assert nuts.sample_stats["diverging"].shape == (3, 5)

    def scoped(y):
        with scope(prefix="part"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("draw", len(y)):  # a dimension of ArviZ's
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = fit(scoped, {"y": torch.ones(3)})
    found = result.to_arviz(num_draws=20)
    assert list(found.posterior.data_vars) == ["part.z"]
    assert found.log_likelihood["part.y"].dims == ("chain", "draw", "draw_plate")
    assert loo(result, var_name="part/y").n_data_points == 3


def test_events_and_factors_have_one_log_density_a_row(fit):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, torch.ones(2)).to_event(1), obs=y)
            pyro.factor("extra", -0.5 * (z - 1.0).square() * torch.ones(len(y)))

    result = fit(model, {"y": torch.ones(3, 2)})
    data = result.to_arviz(dims={"y": ["side"]}, num_draws=20)
    assert data.observed_data["y"].dims == ("rows", "side")
    assert data.log_likelihood["y"].dims == ("chain", "draw", "rows")
    assert data.log_likelihood["extra"].dims == ("chain", "draw", "rows")
    assert set(data.observed_data.data_vars) == {"y"}
    with pytest.raises(ValueError, match="var_name: several sites are observed"):
        loo(result)
    assert loo(result, var_name="y", num_draws=200).n_data_points == 3
    with pytest.raises(ValueError, match="var_name: unknown name 'z'"):
        loo(result, var_name="z")


@pytest.fixture(scope="module")
def everything(schools):
    return schools.to_arviz(groups="all", coords={"school": SCHOOLS}, num_draws=300)


def test_predictive_groups(schools, everything):
    assert groups_of(everything) == set(ALL_GROUPS) - {"parameters"}  # eight_schools has none
    for group in ("posterior_predictive", "prior_predictive"):
        assert set(everything[group].data_vars) == {"y"}
        assert everything[group]["y"].dims == ("chain", "draw", "school")
    assert everything.prior["theta"].dims == ("chain", "draw", "school")
    assert everything.prior.sizes == everything.posterior.sizes
    assert float(everything.prior["tau"].median()) == pytest.approx(5.0, rel=0.3)  # HalfCauchy(5)
    # Predictive draws belong to the posterior draws beside them.
    error = everything.posterior_predictive["y"] - everything.posterior["theta"]
    scaled = (error / everything.constant_data["sigma"]).values.ravel()
    assert stats.kstest(scaled, "norm").pvalue > 0.001


def test_netcdf_keeps_everything(tmp_path, everything):
    everything.to_netcdf(tmp_path / "fit.nc")
    same(az.from_netcdf(tmp_path / "fit.nc"), everything)


@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:The data type")
def test_zarr_keeps_everything(tmp_path, everything):
    pytest.importorskip(
        "zarr", minversion="3", reason="xarray writes Zarr with zarr 3, which is not installed"
    )
    # ArviZ 0.x itself writes with zarr 2 only, and says to take this way.
    tree = everything if has_trees() else everything.to_datatree()
    tree.to_zarr(tmp_path / "fit.zarr")
    back = xr.open_datatree(tmp_path / "fit.zarr", engine="zarr")
    same(back if has_trees() else az.InferenceData.from_datatree(back), everything)


def same(back, data):
    assert groups_of(back) == groups_of(data)
    for group in groups_of(data):
        one, other = (d[group].to_dataset() if has_trees() else d[group] for d in (back, data))
        xr.testing.assert_equal(one, other)
        assert one.attrs == other.attrs


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23
def test_summaries_and_plots_work(everything):
    import matplotlib.pyplot as plt

    table = az.summary(everything, kind="stats")
    assert {"mu", "tau", "theta[A]"} <= set(table.index)
    az.plot_forest(everything, var_names=["mu", "theta"])
    (az.plot_ppc_dist if has_trees() else az.plot_ppc)(everything)
    plt.close("all")


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arviz_loo_works_on_the_object(everything):
    assert np.isfinite(pointwise(az.loo(everything, pointwise=True))).all()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_against_the_closed_form(fit):
    """A mean-field guide of a correlated posterior; the plain formula fails at the same tolerance."""
    result = fit(line, {"x": X, "y": Y})
    exact = exact_loo(X, Y, (2.0, 2.0))
    seeds = range(10)
    corrected = [loo(result, num_draws=2000, seed=seed) for seed in seeds]
    assert max(float(one.pareto_k.max()) for one in corrected) < 0.8
    plain = [
        az.loo(
            result.to_arviz(groups=["posterior", "log_likelihood"], num_draws=2000, seed=s), pointwise=True
        )
        for s in seeds
    ]
    assert largest_z(corrected, exact) < 5
    assert largest_z(plain, exact) > 10
    again = corrected[0]
    total = again.elpd if has_trees() else again.elpd_loo
    assert total == pytest.approx(exact.sum(), abs=0.3)
    assert pointwise(again).sum() == pytest.approx(total)
    se = (len(exact) * pointwise(again).var()) ** 0.5
    assert again.se == pytest.approx(se, rel=0.05)  # 1.x divides by n - 1
    assert "elpd_loo" in str(again)
    better = [loo(result, num_draws=2000, seed=seed, correction="linear_response") for seed in seeds]
    assert largest_z(better, exact) < 5


def largest_z(results, exact):
    """Furthest mean over the results from the exact values, in standard errors."""
    values = np.stack([pointwise(one) for one in results])
    return np.max(np.abs(values.mean(0) - exact) / (values.std(0, ddof=1) / len(values) ** 0.5))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of pandas 3.1, in ArviZ 0.23
def test_loo_ranks_models(fit):
    good = fit(line, {"x": X, "y": Y})
    flat = fit(line, {"x": X, "y": Y, "slope_sd": 0.01})
    table = az.compare({"flat": loo(flat), "line": loo(good)})
    assert list(table.index) == ["line", "flat"]
    expected = exact_loo(X, Y, (2.0, 2.0)).sum() - exact_loo(X, Y, (2.0, 0.01)).sum()
    assert abs(float(table.loc["flat", "elpd_diff"])) == pytest.approx(expected, abs=0.5)


def test_loo_warns_of_rows_that_it_cannot_leave_out(fit):
    y = Y.clone()
    y[-1] = 40.0
    with pytest.warns(UserWarning, match="Estimated shape parameter"):
        found = loo(fit(line, {"x": X, "y": y}), num_draws=2000)
    assert found.warning
    assert np.argmax(found.pareto_k.values) == 11


def test_loo_refuses_point_estimates(fit):
    @vem.vem_model(map_sites=("z",))
    def point(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(vem.ModelError, match="nothing to leave out"):
        loo(fit(point, {"y": torch.ones(3)}))


def test_loo_of_what_is_summed_out_together(fit):
    """Two sites see one discrete site: a row's likelihood is that of both, and stands at the first."""

    def model(y, w):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m + 4 * z, 1.0), obs=y)
            pyro.sample("w", dist.Normal(2 * z, 1.0), obs=w)

    y, w = torch.tensor([0.0, 4.0, 4.1, -0.5]), torch.tensor([0.0, 2.0, 2.1, 0.2])
    result = fit(model, {"y": y, "w": w})
    assert loo(result, var_name="y").n_data_points == 4
    with pytest.raises(vem.ModelError, match=r"'w' shares .* with 'y', .*var_name='y'"):
        loo(result, var_name="w")
    pointwise = result.log_likelihood(num_draws=3)
    assert set(pointwise) == {"y"}
    assert set(result.to_arviz(num_draws=3).log_likelihood.data_vars) == {"y"}
    assert torch.allclose(pointwise["y"], result.log_likelihood({"y": y, "w": w}, num_draws=3)["y"])
    m = result.sample(3)["m"].unsqueeze(1)
    parts = [
        p + dist.Normal(m + 4 * k, 1.0).log_prob(y) + dist.Normal(2.0 * k, 1.0).log_prob(w)
        for k, p in enumerate(torch.tensor([0.7, 0.3], dtype=torch.float64).log())
    ]
    assert torch.allclose(pointwise["y"], torch.logaddexp(*parts))


@pytest.mark.parametrize("shape", ["changepoint", "chain"])
def test_loo_refuses_rows_that_a_discrete_site_ties_together(fit, shape):
    """One density of all rows: no row can be left out."""

    def changepoint(y):
        early, late = (pyro.sample(name, dist.Exponential(1.0)) for name in ("early", "late"))
        when = pyro.sample("when", dist.Categorical(torch.ones(6) / 6), infer={"enumerate": "parallel"})
        with pyro.plate("year", 6):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(6) < when, early, late)), obs=y)

    def chain(y):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        z = torch.tensor(0)
        for t in pyro.markov(range(6)):
            prob = torch.tensor([0.2, 0.8])[z.long()]
            z = pyro.sample(f"z{t}", dist.Bernoulli(prob), infer={"enumerate": "parallel"})
            pyro.sample(f"y{t}", dist.Normal(m + 4 * z, 1.0), obs=y[t])

    y = torch.tensor([4.0, 5.0, 4.0, 0.0, 1.0, 0.0])
    result = fit({"changepoint": changepoint, "chain": chain}[shape], {"y": y})
    name, tie = {"changepoint": ("y", "'when'"), "chain": ("y0", "'z0', .* and 1 more")}[shape]
    with pytest.raises(vem.ModelError, match=rf"'{name}' hang together .*\({tie}\)"):
        loo(result, var_name=name)


def test_loo_adds_up_sites_of_the_same_rows(fit):
    """Observed and censored waits: one data set in two sites, the same as in one."""
    wait = torch.tensor([0.5, 2.0, 1.5, 3.0, 0.2])
    seen = torch.tensor([True, False, True, False, True])

    def parts(wait, seen):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("rows", 5):
            with pyro.poutine.mask(mask=seen):
                pyro.sample("wait", dist.Exponential(rate), obs=wait)
            pyro.factor("censored", torch.where(seen, 0.0, -rate * wait))
        pyro.sample("other", dist.Normal(rate, 1.0), obs=torch.tensor(1.0))

    def whole(wait, seen):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("rows", 5):
            pyro.factor("row", seen * rate.log() - rate * wait)
        pyro.sample("other", dist.Normal(rate, 1.0), obs=torch.tensor(1.0))

    data = {"wait": wait, "seen": seen}
    both, one = fit(parts, data), fit(whole, data)
    found = loo(both, var_name=["wait", "censored"])
    exact = loo(one, var_name="row")
    assert found.n_data_points == 5
    assert abs(float(pointwise(found).sum() - pointwise(exact).sum())) < 0.02
    with pytest.raises(ValueError, match="several in the same plates"):
        loo(both)
    with pytest.raises(ValueError, match="'wait' and 'other' are in different plates"):
        loo(both, var_name=["wait", "other"])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of few persons
def test_loo_of_rows_with_a_discrete_site_each(fit):
    """Latent classes: the answers of a person count together."""
    x = (torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) < 0.6).double()

    def model(x):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("classes", 2, dim=-1), pyro.plate("each", 4, dim=-2):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("persons", len(x), dim=-2):
            z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
            with pyro.plate("items", 4, dim=-1) as j:
                pyro.sample("x", dist.Bernoulli(p[j, z]), obs=x)

    assert loo(fit(model, {"x": x})).n_data_points == 30


def test_psis_finds_the_tail_index():
    """Ratios with an exact Pareto tail of index k."""
    uniform = np.random.default_rng(0).random(20_000)
    for k in (0.3, 0.8):
        log_weights, khat = psis(-k * np.log(uniform))
        assert khat == pytest.approx(k, abs=5 * (1 + k) / (3 * 20_000**0.5) ** 0.5)
        assert np.exp(log_weights).sum() == pytest.approx(1.0)
        assert log_weights[np.argmin(uniform)] == log_weights.max()
        assert np.allclose(psis(1e4 - k * np.log(uniform))[0], log_weights)


def test_psis_where_no_tail_can_be_fitted():
    log_weights, khat = psis(np.full(100, -3.0))
    assert khat == 0.0
    assert np.allclose(log_weights, -np.log(100))
    few = np.random.default_rng(0).standard_normal(10)
    log_weights, khat = psis(few)
    assert khat == np.inf
    assert np.allclose(np.exp(log_weights), np.exp(few) / np.exp(few).sum())
    log_weights, khat = psis(np.array([0.0, -np.inf, 1.0]))
    assert khat == np.inf
    assert np.allclose(np.exp(log_weights), [1 / (1 + np.e), 0, np.e / (1 + np.e)])  # no density, no weight
    log_weights, khat = psis(np.array([0.0, np.nan, 1.0]))
    assert khat == np.inf
    assert np.isnan(log_weights).all()
