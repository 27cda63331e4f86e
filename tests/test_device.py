"""Fits run on the device of their data: here on one made of host memory, on CUDA where there is one."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import ranks
import torch
import zoo
import zoo_em

import pyro_vem as vem

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
AGREEMENT = {"twin": 1e-12, "cuda": 1e-7}  # relative; another processor rounds otherwise


@pytest.fixture(params=["twin", CUDA])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param, 0)


def _on(device, data):
    return {name: value.to(device) for name, value in data.items()}


def _host(value):
    """Numbers of tensors, mappings of them, and whatever else holds some."""
    if isinstance(value, dict):
        return np.concatenate([_host(value[key]) for key in sorted(value)])
    return np.ravel(
        value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)
    )


def waits(y):
    """Factors of three families whose terms take draws: quantiles of Gamma with their own derivatives."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Weibull(1.0 + p[0] + rate.sin() ** 2, 1.0 + p[1]), obs=y)


def waits_guide(y):
    positive = dist.constraints.positive
    a = pyro.param("a", torch.tensor(2.0), constraint=positive)
    b = pyro.param("b", torch.tensor(1.0), constraint=positive)
    c = pyro.param("c", torch.full((2,), 3.0), constraint=positive)
    pyro.sample("rate", dist.Gamma(a, b))
    pyro.sample("p", dist.Dirichlet(c))


CASES = {
    "quantiles": (waits, {"y": torch.tensor([0.4, 1.0, 2.2, 0.9, 1.7])}, {"guide": waits_guide}),
    "closed forms": (zoo.random_effects, {"y": zoo.random_effects_data()}, {}),
    "quadrature": (zoo.eight_schools, zoo.SCHOOLS, {}),
    "conjugate factors": (zoo.pumps, zoo.PUMPS, {"guide": "auto"}),
    "discrete sites": (zoo_em.two_waits, {"y": zoo_em.WAITING}, {"num_starts": 2}),
    "a chain": (zoo_em.chain, {"y": torch.tensor([0.1, 0.2, 3.0, 3.2])}, {}),
    "factors of rows": (ranks.counts, ranks.CASES["counts"][1], {}),
    "matched moments": (ranks.vectors, ranks.CASES["vectors"][1], {"guide": "auto"}),
    "draws": (ranks.waves, ranks.WAVES, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_fit_is_the_same_on_another_device(fit, device, case):
    model, data, options = CASES[case]
    data = {name: value.double() for name, value in data.items()}
    here, there = fit(model, data, **options), fit(model, _on(device, data), **options)
    assert there.status is here.status is vem.Status.converged
    assert there.device == device
    # Pyro's tags cannot follow a twin through a guide of the user's: a grid stands in for a closed form.
    agreement = 1e-8 if case == "quantiles" else AGREEMENT[device.type]
    assert there.elbo == pytest.approx(here.elbo, rel=agreement)
    for mine, others in ((here.params, there.params), (here.guide_params, there.guide_params)):
        assert all(value.device == device for value in others.values())
        if mine:
            np.testing.assert_allclose(_host(others), _host(mine), rtol=1e3 * agreement, atol=1e3 * agreement)


X = torch.linspace(-1, 1, 80, dtype=torch.float64).reshape(40, 2) ** torch.tensor([1, 2])
Y = X @ torch.tensor([0.5, -1.0]).double() + 0.3 * torch.sin(7.0 * torch.arange(40))
LINES = {"x": X, "y": Y}


@vem.vem_model
def lines(x, y=None):
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", a + x @ b)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


ASKED = {
    "sample": lambda fit: fit.sample(20),
    "linear response": lambda fit: fit.sample(20, correction="linear_response"),
    "psis": lambda fit: fit.sample(20, correction="psis"),
    "covariance": lambda fit: fit.covariance(),
    "standard errors": lambda fit: fit.standard_errors(),
    "sandwich": lambda fit: fit.standard_errors(plate="rows"),
    "diagnose": lambda fit: fit.diagnose(restarts=1).khat,
    "predict": lambda fit: fit.predict(num_draws=10)["mean"],
    "log likelihood": lambda fit: fit.log_likelihood(num_draws=10),
    "arviz": lambda fit: fit.to_arviz(num_draws=10).posterior["b"].values,
    "criteria": lambda fit: fit.criteria("rows").aic,
    "steps": lambda fit: vem.plots.terms_over_steps(fit).lines[0].get_ydata(),
}


@pytest.fixture(scope="module")
def on_host():
    return vem.fit_vem(lines, LINES, progress=False)


@pytest.mark.parametrize("asked", ASKED)
def test_what_a_result_says_is_the_same(fit, device, on_host, asked):
    there = fit(lines, _on(device, LINES))
    expected, found = _host(ASKED[asked](on_host)), _host(ASKED[asked](there))
    np.testing.assert_allclose(found, expected, rtol=1e3 * AGREEMENT[device.type], atol=1e-6)


def test_a_result_goes_on_there(fit, device, on_host, tmp_path):
    """Saved, loaded, started from, and called as a Pyro model."""
    data = _on(device, LINES)
    there = fit(lines, data, init=on_host)
    there.save(tmp_path / "there.fit")
    again = vem.VEMResult.load(tmp_path / "there.fit", lines, data)
    assert again.device == again.sample(2)["b"].device == device
    assert again.diagnose().khat == pytest.approx(on_host.diagnose().khat, abs=1e-6)
    known = {name: value[0] for name, value in there.sample(1).items() if name in "ab"}
    trace = pyro.poutine.trace(pyro.poutine.condition(there.model, known)).get_trace(**data)
    assert torch.isfinite(trace.log_prob_sum())
    assert torch.isfinite(there.predict({"x": X[:3]}, num_draws=5)["y"]).all()  # rows in host memory
    assert vem.VEMResult.load(tmp_path / "there.fit", lines, LINES, device=device).device == device
    assert vem.VEMResult.load(tmp_path / "there.fit", lines, LINES).sample(2)["b"].device.type == "cpu"
    assert "NUTS" in str(there.compare_nuts(num_chains=1, num_samples=20, warmup_steps=10))


def test_calibration(device):
    calls = (
        {"data": data, "num_simulations": 3, "params": {"sigma": 0.3}} for data in (LINES, _on(device, LINES))
    )
    here, there = (vem.calibrate(lines, progress=False, **call) for call in calls)
    if device.type == "twin":  # elsewhere the data are of other generators
        np.testing.assert_array_equal(_host(there.ranks), _host(here.ranks))


class Coder(torch.nn.Module):
    def __init__(self, inputs, outputs, is_encoder):
        super().__init__()
        torch.manual_seed(inputs)
        self.net, self.is_encoder = torch.nn.Linear(inputs, outputs), is_encoder

    def forward(self, x):
        out = self.net(x)
        return (out[..., :2], (0.1 * out[..., 2:] - 1).exp()) if self.is_encoder else out


IMAGES = torch.sin(torch.arange(180.0)).reshape(60, 3).double()


def autoencoder(device):
    decoder = Coder(2, 3, False).to(device)

    def model(y):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 0.5).to_event(1), obs=y)

    return model, vem.AmortizedNormal(model, {"z": Coder(3, 4, True).to(device)}, inputs="y")


class Rows(torch.utils.data.Dataset):
    """Works with tensors of its own, and with NumPy, as if no fit were on its way."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return torch.as_tensor(IMAGES[i].numpy() + torch.zeros(3).numpy())


def _loader():
    return torch.utils.data.DataLoader(
        Rows(),
        batch_size=20,
        shuffle=True,
        generator=torch.Generator().manual_seed(4),
        collate_fn=lambda rows: {"y": torch.stack(rows)},
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_networks_are_trained_there(fit, device, is_stream):
    """Batches that are in host memory go to the device one by one."""

    def trained(where):
        model, guide = autoencoder(where)
        data, size = (_loader(), None) if is_stream else ({"y": IMAGES}, 20)
        options = vem.FitOptions(device=where)
        return fit(
            model,
            data,
            guide=guide,
            batch_size=size,
            max_iter=3,
            validation={"y": IMAGES[:20]},
            options=options,
        )

    here, there = trained("cpu"), trained(device)
    assert there.device == device
    assert there.elbo == pytest.approx(here.elbo, rel=1e3 * AGREEMENT[device.type])
    if is_stream:
        return
    rows = [{"y": IMAGES[:7].to(result.device)} for result in (here, there)]
    gaps = [result.amortization_gap(new).mean for result, new in zip((here, there), rows, strict=True)]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-5)
    assert there.infer(rows[1]).elbo == pytest.approx(here.infer(rows[0]).elbo, rel=1e-6)


def test_batches_with_factors_of_rows(fit, device):
    data, options = ranks.CASES["counts"][1], vem.FitOptions(device=device)
    here = fit(ranks.counts, data, batch_size=25, max_iter=2)
    there = fit(ranks.counts, data, batch_size=25, max_iter=2, options=options)
    assert there.elbo == pytest.approx(here.elbo, rel=1e3 * AGREEMENT[device.type])
    again = fit(ranks.counts, data, batch_size=25, max_iter=1, options=options, init=here)
    assert again.device == device


def test_data_on_two_devices_are_refused(fit, device):
    with pytest.raises(vem.ModelError, match=r"data\['x'\] on cpu, data\['y'\] on .*FitOptions\(device=\)"):
        fit(lines, {"x": X, "y": Y.to(device)})


def test_a_device_without_numbers_is_refused(fit):
    with pytest.raises(vem.UnsupportedModelError, match="device meta holds no numbers"):
        fit(lines, {"x": X.to("meta"), "y": Y.to("meta")})


def test_the_caller_keeps_the_default_device(fit, device):
    fit(lines, _on(device, LINES)).diagnose()
    assert torch.zeros(1).device.type == "cpu"
    with torch.device(device):
        assert fit(lines, {name: value.numpy() for name, value in LINES.items()}).device == device
        assert fit(lines, LINES).device.type == "cpu"
        assert torch.zeros(1).device == device
