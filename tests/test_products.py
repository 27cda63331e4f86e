"""Residuals with products of latents: two moments in closed form, and refusals where they are not enough."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vem as vem
from pyro_vem.fit.turns import Turns
from pyro_vem.model.runtime import isolated

D = torch.float64
ROWS, COLUMNS, FACTORS = 6, 4, 2


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


Y = draws(ROWS, COLUMNS)
X = draws(ROWS, seed=1)
USER = torch.randint(0, ROWS, (15,), generator=torch.Generator().manual_seed(2))
ITEM = torch.randint(0, COLUMNS, (15,), generator=torch.Generator().manual_seed(3))
RATED = draws(15, seed=4)
SEEN = draws(ROWS, COLUMNS, seed=5) > -0.5


def vectors(name, size, family=None):
    with pyro.plate(f"{name}s", size):
        return pyro.sample(name, (family or dist.Normal(torch.zeros(FACTORS), 1.0)).to_event(1))


def factors(mean=lambda w, z: z @ w.T, observe=None, loading=None):
    """Scores and loadings, an intercept and a scale for each column."""

    def model():
        w, z = vectors("w", COLUMNS, loading), vectors("z", ROWS)
        with pyro.plate("columns", COLUMNS):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        (observe or (lambda m, s: pyro.sample("y", dist.Normal(m, s).to_event(2), obs=Y)))(b + mean(w, z), s)

    return model


def turned():
    """Factors first, plates in the other order."""
    with pyro.plate("factors", FACTORS, dim=-3):
        with pyro.plate("columns", COLUMNS, dim=-1):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", ROWS, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", ROWS, dim=-2), pyro.plate("columns", COLUMNS, dim=-1):
        pyro.sample("y", dist.Normal((w * z).sum(-3), 0.7), obs=Y)


def ratings():
    u, v = vectors("u", ROWS), vectors("v", COLUMNS)
    with pyro.plate("ones", ROWS):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("ratings", 15):
        pyro.sample("y", dist.Normal(a[USER] + (u[USER] * v[ITEM]).sum(-1), s), obs=RATED)


def listed():
    """A site for each factor."""
    with pyro.plate("columns", COLUMNS):
        w = [pyro.sample(f"w{k}", dist.Normal(0.0, 1.0)) for k in range(3)]
    with pyro.plate("rows", ROWS):
        z = [pyro.sample(f"z{k}", dist.Normal(0.0, 1.0)) for k in range(3)]
    mean = sum(b.unsqueeze(-1) * a for a, b in zip(w, z, strict=True))
    pyro.sample("y", dist.Normal(mean, 0.7).to_event(2), obs=Y)


def shared_hub():
    """Scores that are a mean plus a deviation: a loading multiplies both, and scores are added too."""
    w, z, m = vectors("w", COLUMNS), vectors("z", ROWS), vectors("m", 2)
    score = z + m[torch.arange(ROWS) % 2]
    pyro.sample("y", dist.Normal(score @ w.T + 0.5 * w.sum(-1), 0.7).to_event(2), obs=Y)


def states():
    """Vectors, one after the other, seen through one matrix."""
    w, x = vectors("w", COLUMNS), torch.zeros(FACTORS)
    for t in range(4):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, 1.0).to_event(1))
        pyro.sample(f"y{t}", dist.Normal(w @ x, 0.5).to_event(1), obs=Y[t])


def means_of_latents():
    """The products are the mean of a latent."""
    w, z = vectors("w", COLUMNS), vectors("z", ROWS)
    f = pyro.sample("f", dist.Normal(z @ w.T, 0.5).to_event(2))
    pyro.sample("y", dist.Poisson(f.exp()).to_event(2), obs=Y.exp().round())


def in_plates(m, s):
    with pyro.plate("i", ROWS, dim=-2), pyro.plate("j", COLUMNS, dim=-1), pyro.poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(m, s), obs=Y)


def partly_observed(m, s):
    with pyro.plate("i", ROWS, dim=-2), pyro.plate("j", COLUMNS, dim=-1):
        pyro.sample("y", dist.Normal(m, s), obs=Y, obs_mask=SEEN)


def scaled(m, s):
    with pyro.plate("i", ROWS, dim=-2), pyro.plate("j", COLUMNS, dim=-1), pyro.poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal(m, s), obs=Y)


def nonnegative():
    """Non-negative matrix factorisation."""
    w = vectors("w", COLUMNS, dist.Exponential(torch.ones(FACTORS)))
    h = vectors("h", ROWS, dist.Gamma(torch.full((FACTORS,), 2.0), 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
    pyro.sample("y", dist.Normal(h @ w.T, s).to_event(2), obs=Y.exp())


def exponentials():
    """A sum of exponentials of latents: each is a product with a constant."""
    v = pyro.sample("v", dist.Normal(torch.zeros(COLUMNS), 0.5).to_event(1))
    pyro.sample("y", dist.Normal(Y @ v.exp(), 0.7).to_event(1), obs=X)


MODELS = {
    "exponentials": exponentials,
    "factors": factors(),
    "einsum": factors(lambda w, z: torch.einsum("jk,ik->ij", w, z)),
    "of covariates": factors(lambda w, z: X.unsqueeze(-1) * (z @ w.T) + 2 * z.sum(-1, keepdim=True)),
    "triangular": factors(lambda w, z: z @ (w * torch.ones(COLUMNS, FACTORS).tril()).T),
    "positive loadings": factors(loading=dist.LogNormal(torch.zeros(FACTORS), 0.3)),
    "of logs": factors(observe=lambda m, s: pyro.sample("y", dist.LogNormal(m, s).to_event(2), obs=Y.exp())),
    "masked": factors(observe=in_plates),
    "partly observed": factors(observe=partly_observed),
    "scaled": factors(observe=scaled),
    "turned": turned,
    "ratings": ratings,
    "listed": listed,
    "shared hub": shared_hub,
    "states": states,
    "means of latents": means_of_latents,
    "nonnegative": nonnegative,
}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_the_averages_of_draws(fit, name):
    """Each term at the fitted guide, against 20,000 draws through the ordinary model."""
    result = fit(MODELS[name], max_iter=20)
    objective = result.setup.objective
    assert objective.is_exact, objective.exact.refused
    assert any("products of" in row.proof for row in result.plan.rows)
    at = result.guide_params, result.params
    with isolated(D):
        found = objective.sample(*at, 20_000, 5, ("densities", "terms"))["terms"]
        terms = objective.terms(*at)
    for site, values in found.items():
        se = float(values.std()) / 20_000**0.5
        assert abs(float(terms[site]) - float(values.mean())) <= 4.5 * se + 1e-7, site


def of_three():
    w, z, g = vectors("w", COLUMNS), vectors("z", ROWS), vectors("g", 1)
    pyro.sample("y", dist.Normal((z * g) @ w.T, 0.7).to_event(2), obs=Y)


def symmetric():
    w = vectors("w", ROWS)
    pyro.sample("y", dist.Normal(w @ w.T, 0.7).to_event(2), obs=Y @ Y.T)


def squared():
    w = vectors("w", ROWS)
    pyro.sample("y", dist.Normal((w**2).sum(-1), 0.7).to_event(1), obs=X)


def scale_of_a_factor():
    w, z = vectors("w", COLUMNS), vectors("z", ROWS)
    pyro.sample("y", dist.Normal(z @ w.T, (0.1 * w.sum(-1)).exp()).to_event(2), obs=Y)


def added_otherwise():
    """(w + n) (z + m), but for n m: a square of four latents that is no product of two sums."""
    w, z = vectors("w", COLUMNS), vectors("z", ROWS)
    n, m = vectors("n", COLUMNS), vectors("m", ROWS)
    pyro.sample("y", dist.Normal(z @ w.T + z @ n.T + m @ w.T, 0.7).to_event(2), obs=Y)


def of_a_student():
    w, z = vectors("w", COLUMNS), vectors("z", ROWS)
    pyro.sample("y", dist.StudentT(4.0, z @ w.T, 0.7).to_event(2), obs=Y)


def bent():
    w, z = vectors("w", COLUMNS), vectors("z", ROWS)
    pyro.sample("y", dist.Normal(z.tanh() @ w.T, 0.7).to_event(2), obs=Y)


REFUSED = {
    of_three: "products of",
    symmetric: "several elements of w",
    squared: "several elements of w",
    scale_of_a_factor: "which its scale depends on too",
    added_otherwise: "products of",
    of_a_student: "products of several elements",
    bent: "several elements of z",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_other_products_stay_on_draws(fit, model):
    result = fit(model, max_iter=1, options=vem.FitOptions(num_draws=32, step_iterations=2))
    assert result.plan["y"].method == "draws"
    assert REFUSED[model] in result.plan["y"].proof, result.plan["y"].proof


def coordinate_ascent(y, sd, w, z, rounds=5000):
    """The optimum of `y ~ Normal(z w', sd)` under independent Gaussians by hand, from some means."""
    v_w, v_z, unit = np.ones_like(w), np.ones_like(z), np.eye(w.shape[1])
    for _ in range(rounds):
        precision = unit + (w.T @ w + np.diag(v_w.sum(0))) / sd**2
        z, v_z = np.linalg.solve(precision, w.T @ y.T / sd**2).T, 1 / np.diag(precision) + 0 * z
        precision = unit + (z.T @ z + np.diag(v_z.sum(0))) / sd**2
        w, v_w = np.linalg.solve(precision, z.T @ y / sd**2).T, 1 / np.diag(precision) + 0 * w
    square = (y - z @ w.T) ** 2 + z**2 @ v_w.T + v_z @ (w**2 + v_w).T
    divergence = 0.5 * sum((m**2 + v - 1 - np.log(v)).sum() for m, v in ((w, v_w), (z, v_z)))
    return -0.5 * (square / sd**2 + np.log(2 * np.pi * sd**2)).sum() - divergence


def matrix(y, factors):
    with pyro.plate("columns", y.shape[1]):
        w = pyro.sample("w", dist.Normal(torch.zeros(factors), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(factors), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ w.T, 0.5).to_event(1), obs=y)


def matrix_data(rows=40, columns=8, factors=2):
    return draws(rows, factors) @ draws(columns, factors, seed=1).T + 0.5 * draws(rows, columns, seed=2)


def test_the_optimum_is_that_of_coordinate_ascent(fit):
    y = matrix_data()
    result = fit(matrix, {"y": y, "factors": 2})
    starts = [(draws(8, 2, seed=s).numpy(), draws(40, 2, seed=s + 1).numpy()) for s in (10, 20)]
    best = max(coordinate_ascent(y.numpy(), 0.5, *start) for start in starts)
    assert result.converged
    assert result.elbo == pytest.approx(best, abs=1e-6)
    assert result.history[0].before < best - 100


@pytest.mark.parametrize("is_full", [True, False])
def test_rows_of_a_matrix_are_matrix_products(fit, is_full):
    """All pairs of rows and columns make a grid; a few of them are taken one by one."""
    row, column = torch.cartesian_prod(torch.arange(30), torch.arange(7)).T
    some = torch.arange(210) if is_full else torch.arange(0, 210, 5)
    row, column, y = row[some].flip(0), column[some].flip(0), draws(len(some))

    def model(y):
        w, z = vectors("w", 7), vectors("z", 30)
        pyro.sample("y", dist.Normal((w[column] * z[row]).sum(-1), 0.5).to_event(1), obs=y)

    result = fit(model, {"y": y})
    found = result.setup.objective.exact.compiled.terms["y"].slots["residual"].products
    assert found.is_grid is is_full
    assert len(found.first.offset) == (2 * 7 if is_full else 2 * len(some))
    values = {"w": draws(14, seed=1), "z": draws(60, seed=2)}
    expected = (values["w"].reshape(7, 2)[column] * values["z"].reshape(30, 2)[row]).sum(-1)
    torch.testing.assert_close(found.at(values), -expected, rtol=1e-9, atol=1e-9)


def test_parameters_in_products_make_probabilistic_pca_exact(fit):
    """Loadings as parameters: with one factor the bound is the log likelihood (Tipping and Bishop, 1999)."""
    y = matrix_data(60, 5, 1)

    def model(y):
        w = pyro.param("w", draws(5, 2, seed=3))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ w.T, 0.5).to_event(1), obs=y)

    result = fit(model, {"y": y})
    values, vectors = torch.linalg.eigh(y.T @ y / 60)
    w = vectors[:, -2:] * (values[-2:] - 0.25).clamp_min(0).sqrt()
    cov = w @ w.T + 0.25 * torch.eye(5, dtype=D)
    evidence = dist.MultivariateNormal(torch.zeros(5, dtype=D), cov).log_prob(y).sum()
    assert "products of z, w" in result.plan["y"].proof
    assert result.elbo == pytest.approx(float(evidence), abs=1e-6)


def test_a_bend_that_no_probe_meets_is_found_at_the_end(fit):
    """The clamp is out of reach of the probes; the fit ends inside of it."""

    def model(y):
        w, z = vectors("w", 4), vectors("z", 10, dist.Normal(torch.zeros(FACTORS), 30.0))
        pyro.sample("y", dist.Normal(z.clamp(max=15.0) @ w.T, 1.0).to_event(2), obs=y)

    few = vem.FitOptions(num_draws=32, step_iterations=60)  # what follows is not the question
    result = fit(model, {"y": 40 * draws(10, 2) @ draws(2, 4, seed=1)}, max_iter=2, options=few)
    assert result.plan["y"].method == "draws"
    assert any("sampled from here on" in note and "y" in note for note in result.plan.notes)


def test_what_can_be_turned_is_turned(fit, monkeypatch):
    """The same optimum in fewer products: the valley of rotations is followed along its bend."""
    data = {"y": matrix_data(100, 12, 3), "factors": 3}
    found = fit(matrix, data)
    monkeypatch.setattr(Turns, "of", staticmethod(lambda setup, block: None))
    plain = fit(matrix, data)
    assert found.elbo == pytest.approx(plain.elbo, abs=1e-7)
    products, before = (sum(row.products for row in one.history) for one in (found, plain))
    assert products < 0.5 * before


def test_short_steps_of_later_rounds_need_no_turns(fit, monkeypatch):
    """Loadings by MAP, an M-step beside an E-step: rounds are a few Newton steps each."""

    def model(y):
        w, z = vectors("w", 3), vectors("z", len(y))
        s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
        pyro.sample("y", dist.Normal(X.abs().repeat(2)[:, None] * (z @ w.T), s).to_event(2), obs=y)

    model, y = vem.vem_model(model, map_sites=("w",)), matrix_data(12, 3)
    found = fit(model, {"y": y})
    monkeypatch.setattr(Turns, "of", staticmethod(lambda setup, block: None))
    plain = fit(model, {"y": y})
    assert found.elbo == pytest.approx(plain.elbo, abs=1e-6)
    products, before = (sum(row.products for row in one.history) for one in (found, plain))
    assert products < 1.3 * before, (products, before)


def test_columns_of_factors_are_turned_against_each_other():
    """The sums of products of means stay as they are, whatever the matrix; nothing else moves."""
    w, z = torch.arange(8).reshape(4, 2).T, 8 + torch.arange(12).reshape(6, 2).T
    turns = Turns(((w, z),))
    x = draws(25)
    there = turns.placed(torch.cat([x, draws(4, seed=1)]))
    assert bool((there[:20] != x[:20]).all())
    torch.testing.assert_close(there[20:], x[20:])
    torch.testing.assert_close(there[w].T @ there[z], x[w].T @ x[z])
    torch.testing.assert_close(turns.placed(torch.cat([x, torch.zeros(4, dtype=D)])), x)


def test_groups_that_share_a_variable_are_turned_together(fit):
    """Two sets of loadings multiply the same scores; a triangle of loadings has no turns."""

    def model(y):
        w, z, v = vectors("w", 4), vectors("z", 12), vectors("v", 3)  # z first in the second pair
        pyro.sample("y", dist.Normal(z @ w.T, 0.5).to_event(2), obs=y[:, :4])
        pyro.sample("x", dist.Normal(v @ z.T, 0.5).to_event(2), obs=y[:, 4:].T)

    result = fit(model, {"y": draws(12, 7)})
    (turns,) = Turns.of(result.setup, "E").sides
    assert sorted(side.shape[1] for side in turns) == [7, 12]
    assert Turns.of(fit(MODELS["triangular"]).setup, "E") is None
    assert Turns.of(fit(listed).setup, "E") is None


def test_a_start_at_the_saddle_ends_at_the_optimum(fit):
    data = {"y": matrix_data(20, 6), "factors": 2}
    found = fit(matrix, data, init={"w": torch.zeros(6, 2), "z": torch.zeros(20, 2)})
    assert any("left a saddle of the bound" in row.note for row in found.history)
    assert found.elbo == pytest.approx(fit(matrix, data).elbo, abs=1e-6)
