"""Simulation-based calibration: exact fits pass, wrong ones are caught, and nothing is dropped."""

import dataclasses
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.posterior import calibrate as module
from pyro_vem.posterior import simulate
from pyro_vem.posterior.calibrate import Calibration, calibrate
from pyro_vem.posterior.calibration_plot import FAILED, CalibrationVerdict, envelope, shape

ROWS, NOISE = 5, 2.0


def columns(y):
    """Independent latents with Normal posteriors: mean field is exact."""
    with pyro.plate("column", y.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("row", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)


def columns_exact(y):
    """Posterior means and sds of `columns`."""
    precision = 1 + ROWS / NOISE**2
    return y.sum(0) / NOISE**2 / precision, torch.full(y.shape[1:], precision**-0.5, dtype=torch.float64)


def run(model, data, **options):
    return calibrate(model, data, progress=False, **options)


# What must hold. Columns are independent: 20 with the same alteration are 20 calibrations of one scalar.

REPEATS = 20
ALTERED = {"": (1.0, 0.0), "too narrow": (0.8, 0.0), "too wide": (1.25, 0.0), "biased high": (1.0, 0.3)}
COLUMNS_DATA = {"y": torch.zeros(ROWS, REPEATS * len(ALTERED))}


def altered(fit, loc, scale):
    """The fit with another guide: sds are shrunk and means shifted, by a number of sds, column by column."""
    shrink, shift = torch.tensor(list(ALTERED.values())).double().repeat_interleave(REPEATS, 0).T
    guide = {"guide.loc.z": loc + shift * scale, "guide.scale.z": shrink * scale}
    return dataclasses.replace(fit, guide_params=guide)


def check_repetitions(result):
    assert not result.failures
    names = list(result.ranks)
    assert names == [f"z[{i}]" for i in range(REPEATS * len(ALTERED))]
    for i, hint in enumerate(ALTERED):
        group = {name: result.ranks[name] for name in names[i * REPEATS : (i + 1) * REPEATS]}
        calibration = Calibration.of(group, result.num_draws)
        p_values, hints = calibration.table["p_value"], set(calibration.table["hint"])
        if hint:  # 20 times of 20 outside the 99.9 % envelope
            assert (p_values <= 1e-3).all(), calibration
            assert calibration.verdict is CalibrationVerdict.MISCALIBRATED
            assert hints - {""} == {hint}
        else:
            assert (p_values > 1e-3).all(), calibration
            assert calibration.verdict is CalibrationVerdict.CALIBRATED


def test_a_thousand_exact_fits_stay_inside_and_wrong_ones_leave(monkeypatch, fit):
    """The closed form takes the place of the fit, for speed."""
    real = fit(columns, COLUMNS_DATA)
    monkeypatch.setattr(
        module, "fit_vem", lambda model, data, **_: altered(real, *columns_exact(data["y"].double()))
    )
    check_repetitions(run(columns, COLUMNS_DATA, num_simulations=1000))


@pytest.mark.slow
def test_the_same_with_real_fits(monkeypatch):
    plain = module.fit_vem

    def changed(model, data, **options):
        fit = plain(model, data, **options)
        return altered(fit, fit.guide_params["guide.loc.z"], fit.guide_params["guide.scale.z"])

    monkeypatch.setattr(module, "fit_vem", changed)
    check_repetitions(run(columns, COLUMNS_DATA, num_simulations=1000))


def test_real_fits_are_the_closed_form(fit):
    y = torch.randn(ROWS, 3, dtype=torch.float64)
    params, (mean, sd) = fit(columns, {"y": y}).guide_params, columns_exact(y)
    assert torch.allclose(params["guide.loc.z"], mean, atol=1e-5)
    assert torch.allclose(params["guide.scale.z"], sd, atol=1e-5)


# Real miscalibration

X = torch.linspace(1.0, 3.0, 10)


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def centred_schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


REGRESSION_DATA = {"x": X, "y": torch.zeros(10)}


@pytest.mark.slow
def test_mean_field_on_correlated_coefficients_is_too_narrow():
    result = run(regression, REGRESSION_DATA, num_simulations=30)
    assert set(result.table["hint"]) == {"too narrow"}
    assert "'a': too narrow" in " ".join(result.reasons)
    assert (result.table["spread"] > 1.5).all()


@pytest.mark.parametrize(
    ("correction", "num"),
    [
        ("linear_response", 30),
        pytest.param("linear_response", 300, marks=pytest.mark.slow),
        pytest.param("psis", 300, marks=pytest.mark.slow),
    ],
)
def test_corrections_mend_it(correction, num):
    result = run(regression, REGRESSION_DATA, num_simulations=num, correction=correction)
    assert result.verdict is CalibrationVerdict.CALIBRATED, result
    assert np.allclose(result.table["spread"], 1.0, atol=4 * (0.5 / num) ** 0.5)


@pytest.mark.slow
def test_centred_eight_schools_overstates_tau():
    result = run(centred_schools, zoo.SCHOOLS, num_simulations=25)
    assert result.verdict is CalibrationVerdict.MISCALIBRATED
    assert "biased high" in result.table["hint"]["tau"]
    assert list(result.table.index[:2]) == ["mu", "tau"]


# Envelope and shape


@pytest.mark.parametrize(("num", "largest"), [(3, 2), (4, 3), (5, 4), (6, 2)])
def test_p_values_agree_with_enumeration(num, largest):
    band = envelope(num, largest)
    samples = [np.array(ranks) for ranks in itertools.product(range(largest + 1), repeat=num)]
    p_values = np.array([band.p_value(band.counts(ranks)) for ranks in samples])
    for p in np.unique(p_values.round(12)):
        assert np.mean(p_values < p + 1e-9) == pytest.approx(p, abs=1e-12)


def test_the_envelope_is_that_of_arviz_where_its_level_can_be_found():
    arviz = pytest.importorskip("arviz.stats.ecdf_utils", reason="ArviZ 1.x has no such function")
    band = envelope(200, 99)
    share = band.points / 100
    theirs = arviz.ecdf_confidence_band(200, share, share, prob=0.95)
    for ours, other in zip(band.bounds(0.05), theirs, strict=True):
        assert np.allclose(ours, 200 * other, atol=1 + 1e-6)


def test_curves_inside_the_bounds_are_those_with_a_large_p_value():
    generator, band = np.random.default_rng(0), envelope(100, 19)
    low, high = band.bounds(0.2)
    is_inside = []
    for _ in range(300):
        counts = band.counts(generator.integers(0, 20, 100))
        is_inside.append(bool(((low <= counts) & (counts <= high)).all()))
        assert is_inside[-1] == (band.p_value(counts) > 0.2)
    assert np.mean(is_inside) == pytest.approx(0.8, abs=3 * (0.16 / 300) ** 0.5)


def test_many_draws_are_looked_at_in_199_points():
    band = envelope(50, 4000)
    assert len(band.points) == 199
    assert band.p_value(band.counts(np.arange(50) * 80 + 40)) > 0.5
    assert band.p_value(band.counts(np.arange(50) * 20)) == 1e-12


def test_ranks_count_draws_below_the_truth():
    draws = torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]])
    assert list(module._ranks(draws, torch.tensor([1.5, 4.0]), 0)) == [2, 0]
    tied = [int(module._ranks(torch.zeros(3, 1), torch.zeros(1), seed)[0]) for seed in range(200)]
    assert np.allclose(np.bincount(tied), 50, atol=25)  # underflow says nothing of the order


def test_shift_and_spread_are_in_posterior_sds():
    grid = (np.arange(1000) + 0.5) / 1000
    true = torch.distributions.Normal(0.4, 1.3).icdf(torch.from_numpy(grid)).numpy()
    posterior = torch.distributions.Normal(0.0, 1.0)
    ranks = (posterior.cdf(torch.from_numpy(true)).numpy() * 1000).astype(np.int64)
    shift, spread, hint = shape(ranks, 999)
    assert (shift, spread) == pytest.approx((0.4, 1.3), abs=0.03)
    assert hint == "biased low and too narrow"


# Failures


def test_failed_fits_are_counted_as_misses():
    at = {"mu": 0.0, "tau": 1.0}
    result = run(zoo.pumps, zoo.PUMPS, num_simulations=6, max_iter=1, params=at)
    assert list(result.failures) == list(range(6))
    assert all(text.startswith("max_iterations") for text in result.failures.values())
    assert (result.ranks["rate[3]"] == FAILED).all()
    assert result.verdict is CalibrationVerdict.MISCALIBRATED
    assert set(result.table["hint"]) == {"failed fits"}
    assert "6 fits failed and count as misses" in result.reasons[-1]
    assert "6 failed" in repr(result)


def test_failures_do_harm_on_either_side():
    ranks = np.arange(200) % 100
    for side in (0, 99):
        shifted = np.where(np.arange(200) < 6, side, ranks)
        lone = Calibration.of({"z": shifted}, 99)
        failed = np.where(np.arange(200) >= 194, FAILED, shifted)
        worse = Calibration.of({"z": failed}, 99, {i: "failed" for i in range(194, 200)})
        assert worse.table["p_value"]["z"] < lone.table["p_value"]["z"]
        assert worse.reasons[-1].startswith("6 fits failed")


def test_an_error_in_a_fit_is_one_failure(monkeypatch):
    plain = module.fit_vem

    def sometimes(model, data, **options):
        if float(data["y"][0]) > 1.0:
            raise vem.ModelError("too large")
        return plain(model, data, **options)

    monkeypatch.setattr(module, "fit_vem", sometimes)
    result = run(zoo.normal_mean, {"y": torch.zeros(3)}, num_simulations=12)
    assert 0 < len(result.failures) < 12
    assert set(result.failures.values()) == {"ModelError: too large"}
    assert [i for i, rank in enumerate(result.ranks["z"]) if rank == FAILED] == list(result.failures)


def test_data_that_cannot_be_drawn_are_a_failure(monkeypatch):
    plain = simulate._drawn

    def sometimes(site, idle):
        if site["name"] == "y" and float(site["fn"].mean[0]) > 1.0:
            raise ValueError("rate too large")
        return plain(site, idle)

    monkeypatch.setattr(simulate, "_drawn", sometimes)
    result = run(zoo.normal_mean, {"y": torch.zeros(3)}, num_simulations=12)
    assert 0 < len(result.failures) < 12
    assert set(result.failures.values()) == {"the data could not be simulated: ValueError: rate too large"}


def test_interruption_ends_it_all():
    def stop(step, params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(zoo.normal_mean, {"y": torch.zeros(3)}, num_simulations=5, callbacks=[stop])


# Reproducible, isolated


def test_results_are_the_same_in_processes():
    alone, spread = (run(zoo.eight_schools, zoo.SCHOOLS, num_simulations=4, num_workers=n) for n in (1, 2))
    assert alone.ranks.keys() == spread.ranks.keys()
    assert all(np.array_equal(alone.ranks[name], spread.ranks[name]) for name in alone.ranks)
    assert alone.table.equals(spread.table)
    assert (alone.failures, alone.notes, alone.reasons) == (spread.failures, spread.notes, spread.reasons)


def test_a_simulation_depends_on_the_seed_and_its_number_only():
    data = {"y": torch.zeros(3)}
    few, more = (run(zoo.normal_mean, data, num_simulations=n).ranks["z"] for n in (3, 5))
    assert np.array_equal(few, more[:3])
    assert not np.array_equal(few, run(zoo.normal_mean, data, num_simulations=3, seed=1).ranks["z"])


def test_a_model_that_does_not_pickle_is_refused(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(vem.ModelError, match="num_workers=1"):
        run(lambda y: zoo.normal_mean(y), {"y": torch.zeros(3)}, num_simulations=3, num_workers=2)


def test_nothing_of_the_caller_changes(global_state):
    snapshot, same = global_state
    pyro.param("mine", torch.tensor(3.0))
    torch.manual_seed(5)
    before = snapshot(), np.random.get_state()[1].copy()  # noqa: NPY002
    y = torch.tensor([1.0, 2.0, 6.0])
    result = run(zoo.normal_mean, {"y": y}, num_simulations=3)
    same(before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert y.tolist() == [1.0, 2.0, 6.0]
    with pytest.raises(AttributeError):
        result.verdict = None


def test_progress_is_shown_on_request(capsys):
    calibrate(zoo.normal_mean, {"y": torch.zeros(3)}, num_simulations=2, progress=True)
    assert "calibrate" in capsys.readouterr().err
    calibrate(zoo.normal_mean, {"y": torch.zeros(3)}, num_simulations=2)
    assert capsys.readouterr().err == ""


# Where observations stand


def simulated(model, data, **options):
    """The arguments of a simulated data set, by key, and the sites' values in the same run."""
    first = vem.fit_vem(model, data, progress=False, **options)
    simulator = simulate.Simulator.of(first, {}, 0)
    return simulator.task(5).values, simulator._run(simulator._seeds(5)[0]).sites


def series(y):
    rho = pyro.sample("rho", dist.Normal(0.0, 0.5))
    last = torch.tensor(0.0)
    for t in range(len(y)):
        last = pyro.sample(f"y_{t}", dist.Normal(rho * last, 1.0), obs=y[t])


def test_one_site_a_step_goes_on_from_the_drawn_value():
    values, sites = simulated(series, (torch.zeros(6),))
    assert values[0].tolist() == [float(sites[f"y_{t}"]["value"]) for t in range(6)]
    assert float(sites["y_3"]["fn"].loc) == pytest.approx(
        float(sites["rho"]["value"] * sites["y_2"]["value"])
    )


@pytest.mark.slow
def test_a_series_is_calibrated():
    result = run(series, (torch.zeros(6),), num_simulations=300)
    assert result.verdict is CalibrationVerdict.CALIBRATED, result


def test_views_and_copies_of_arguments_are_found():
    def model(table, count):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(table)):
            pyro.sample("first", dist.Normal(z, 1.0), obs=table[:, 0])
            pyro.sample("second", dist.Normal(z * table[:, 1], 1.0), obs=table[:, 2])
            pyro.sample("count", dist.Poisson(z.exp()), obs=count.double())

    table = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    values, sites = simulated(model, {"table": table, "count": torch.tensor([3, 1, 2, 0])})
    assert torch.equal(values["table"][:, 0], sites["first"]["value"])
    assert torch.equal(values["table"][:, 2], sites["second"]["value"])
    assert torch.equal(values["table"][:, 1], table[:, 1].double())
    assert values["count"].dtype == torch.int64
    assert torch.equal(values["count"].double(), sites["count"]["value"])


def test_missing_values_are_drawn_and_ranked_where_they_are_missing():
    def model(y, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=mask)

    data = {"y": torch.zeros(4), "mask": torch.tensor([True, False, True, True])}
    assert list(run(model, data, num_simulations=2).ranks) == ["z", "y_unobserved[1]"]


def factor(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("lik", -((y - z) ** 2).sum())


def scaled(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=0.5), pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def improper(y):
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b + z, 1.0), obs=y)


def masked(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def autoregression(y):
    rho = pyro.sample("rho", dist.Normal(0.0, 0.5))
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("y", dist.Normal(rho * y[:-1], 1.0), obs=y[1:])


def data_in_the_prior(y):
    z = pyro.sample("z", dist.Normal(y.mean(), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def standardised(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y / 2)


def twice(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("one", dist.Normal(z, 1.0), obs=y)
        pyro.sample("two", dist.Normal(z, 2.0), obs=y)


def nothing_latent(y):
    m = pyro.param("m", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (factor, "site 'lik' is a pyro.factor"),
        (scaled, "site 'y' is scaled"),
        (improper, r"site 'b': ImproperUniform cannot be drawn.*params=\{'b'"),
        (masked, "site 'z' is masked"),
        (autoregression, "site 'y': its distribution depends on observed values"),
        (data_in_the_prior, "site 'z': its distribution depends on observed values"),
        (standardised, r"site 'y': no argument .* is equal to its observed value"),
        (twice, "site 'one': simulated values do not come back from the argument 'y'"),
        (nothing_latent, "nothing to calibrate"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(model, message):
    init = {"b": 0.0} if model is improper else None
    with pytest.raises(vem.ModelError, match=message):
        run(model, {"y": torch.tensor([1.0, 2.0, 4.0])}, num_simulations=2, init=init)


def test_equal_arguments_are_not_guessed_between():
    def model(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z + x, 1.0), obs=y + 0)

    with pytest.raises(vem.ModelError, match=r"the arguments \['x', 'y'\] are all equal"):
        run(model, {"x": torch.ones(3), "y": torch.ones(3)}, num_simulations=2)


def test_no_observations_and_bad_settings_are_refused():
    with (
        pytest.warns(UserWarning, match="no observed site"),
        pytest.raises(vem.ModelError, match="no observed site"),
    ):
        run(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), None)
    data = {"y": torch.zeros(3)}
    with pytest.raises(ValueError, match="at least 1"):
        run(zoo.normal_mean, data, num_simulations=0)
    with pytest.raises(TypeError, match="max_itr"):
        run(zoo.normal_mean, data, max_itr=3)


# Parameters and MAP sites


def test_parameters_are_held_in_the_simulations_and_estimated_in_the_fits():
    def model(y):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    data = {"y": torch.tensor([9.0, 10.0, 11.0, 10.0])}
    first = vem.fit_vem(model, data, progress=False)
    assert float(simulate.Simulator.of(first, {}, 0).params["mu"]) == pytest.approx(10.0, abs=1e-4)
    result = run(model, data, num_simulations=3)
    assert "their estimates from the data, estimated anew in every fit: mu" in result.notes[0]
    result = run(model, data, num_simulations=3, params={"mu": 2.0})
    assert "given values, estimated anew in every fit: mu" in result.notes[0]
    assert result.notes[0] in repr(result)
    held = vem.vem_model(fixed=("mu",))(lambda y: model(y))
    assert not run(held, data, num_simulations=2, init={"mu": 1.0}, params={"mu": 1.0}).notes
    for wrong, message in (
        ({"mu": 2.0}, "is not the value of fixed="),
        ({"mu": [2.0]}, r"shape \(1,\), not \(\)"),
        ({"nu": 2.0}, "unknown name 'nu'"),
    ):
        with pytest.raises(vem.ModelError, match=message):
            run(held, data, num_simulations=2, params=wrong)
    with pytest.raises(vem.ModelError, match="no estimates to simulate at"):
        run(model, data, num_simulations=2, max_iter=1, tol=1e-12)


def test_map_sites_and_held_latents_are_not_ranked():
    @vem.vem_model(map_sites=("sd",))
    def model(y):
        sd = pyro.sample("sd", dist.InverseGamma(3.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, sd), obs=y)

    data = {"y": torch.tensor([1.0, 2.0, 4.0])}
    result = run(model, data, num_simulations=2)
    assert list(result.ranks) == ["z"]
    assert result.notes == ("MAP sites, drawn from their prior and not ranked: sd",)
    result = run(improper, data, num_simulations=2, init={"b": 0.0}, params={"b": 1.0})
    assert list(result.ranks) == ["z"]
    assert "held at given values in the simulations and not ranked: b" in result.notes[0]


def test_sites_that_are_summed_out_are_drawn_and_not_ranked():
    """Components are ten sds apart, so that data tell which they are of: fits are all but exact."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m + 10 * z, 1.0), obs=y)

    data = {"y": torch.tensor([0.0, 10.0, 1.0])}
    first = vem.fit_vem(model, data, progress=False)
    simulator = simulate.Simulator.of(first, {}, 0)
    drawn = torch.stack([simulator.task(i).values["y"] for i in range(200)])
    share = float((drawn > 5).double().mean())
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 600) ** 0.5)
    result = run(model, data, num_simulations=20)
    assert list(result.ranks) == ["m"]
    assert not result.failures
    assert result.verdict is CalibrationVerdict.CALIBRATED


# Reading it


def test_a_calibration_reads_well(tmp_path):
    import matplotlib.pyplot as plt

    generator = np.random.default_rng(1)
    good = {f"t[{i}]": generator.integers(0, 100, 300) for i in range(3)}
    result = Calibration.of({"tau": generator.integers(0, 100, 300) // 2, **good}, 99, seconds=1.0)
    text = repr(result)
    for part in ("MISCALIBRATED. ", "300 simulations, 99 draws each, 0 failed, 1.0 s", "'tau': biased high"):
        assert part in text, text
    assert text.index("tau ") < text.index("t[0] ")  # the worst first
    _, ax = plt.subplots()
    assert result.plot(ax) is ax
    labels = [entry.get_text() for entry in ax.get_legend().get_texts()]
    assert labels == ["envelope of uniform ranks", "3 scalars inside", "tau: biased high and too wide"]
    new = Calibration.of(good, 99).plot()
    assert new is not ax
    new.figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000
    plt.close("all")
