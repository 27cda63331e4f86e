"""Discrete sites that depend on each other: log sums beside all paths written out."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_vem as vem
from pyro_vem.bound.lifted.contraction import Factor, log_rows
from pyro_vem.model.density import lean_log_prob

INF = float("inf")
SUMMED = {"enumerate": "parallel"}


def over_paths(factors, num_sites):
    """The same by a sum over all paths: the joint log factor, and its log sum."""
    total = torch.zeros((2,) * num_sites)
    for factor in factors:
        shape = [2 if site in factor.discrete else 1 for site in range(num_sites)]
        total = total + factor.value.reshape(shape)
    return total.reshape(-1).logsumexp(0)


def chain(emissions, transitions):
    values = [torch.tensor(v, requires_grad=True) for v in (*emissions, *transitions)]
    scopes = [(t,) for t in range(len(emissions))] + [(t, t + 1) for t in range(len(transitions))]
    return [
        Factor(str(scope), value, scope, 1.0) for scope, value in zip(scopes, values, strict=True)
    ], values


STICKY = [[0.0, -60.0], [-60.0, 0.0]]  # Pyro's log sums clamp slopes here: posterior marginals of 4e-11
LEFT_RIGHT = [[0.0, 0.0], [-INF, 0.0]]  # and underflow to -inf here
CONFLICTS = {
    "sticky": ([[0.0, -100.0], [-100.0, 0.0]], [STICKY]),
    "left-right": ([[-2000.0, 0.0], [0.0, -1000.0]], [LEFT_RIGHT]),
    "nothing leads on": ([[0.0, -INF], [-100.0, 0.0]], [[[0.0, -60.0], [-INF, -INF]]]),
    "four steps": ([[0.0, -900.0], [-900.0, 0.0], [0.0, -900.0], [-900.0, 0.0]], [STICKY] * 3),
}


@pytest.mark.parametrize(("emissions", "transitions"), CONFLICTS.values(), ids=CONFLICTS)
def test_factors_may_pull_apart(emissions, transitions):
    factors, values = chain(emissions, transitions)
    found = log_rows(factors, {site: () for site in range(len(emissions))}).sum()
    exact = over_paths(factors, len(emissions))
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-14)
    marginals, right = (torch.autograd.grad(v, values[: len(emissions)]) for v in (found, exact))
    for here, there in zip(marginals, right, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)
        assert float(here.sum()) == pytest.approx(1)


def test_loops_are_summed_out_together():
    torch.manual_seed(0)
    factors = [
        Factor(str(scope), torch.randn(2, 2).mul(30).requires_grad_(), scope, 1.0)
        for scope in itertools.combinations(range(4), 2)
    ]
    found, exact = log_rows(factors, {site: () for site in range(4)}).sum(), over_paths(factors, 4)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-14)
    values = [factor.value for factor in factors]
    for here, there in zip(*(torch.autograd.grad(v, values) for v in (found, exact)), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


def left_right(y):
    """A chain that starts in its first state and never returns. (Probabilities of 0 would count as 2e-16.)"""
    stay = pyro.param("stay", torch.tensor(0.8), constraint=constraints.unit_interval)
    rows = torch.stack([torch.stack([stay, 1 - stay]).log(), torch.tensor([-INF, 0.0])])
    start = torch.tensor([0.0, -INF])
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(logits=rows[z] if t else start), infer=SUMMED)
        pyro.sample(f"y{t}", dist.Normal(100.0 * z, 1.0), obs=y[t])


def test_a_chain_with_outliers_keeps_its_evidence(fit):
    """The datum of 43 is far from where the chain has to be after its change."""
    y = torch.tensor([0.3, -0.2, 100.5, 99.8, 43.0, 101.0])
    stay = 1 / 2  # it moves once, of the two times that it may

    def evidence(change):
        locs = torch.where(torch.arange(6) < change, 0.0, 100.0)
        moves = [stay] * (change - 1) + [1 - stay] * (change < 6)
        return dist.Normal(locs, 1.0).log_prob(y).sum() + torch.tensor(moves).log().sum()

    result = fit(left_right, {"y": y})
    assert result.converged
    assert result.elbo == pytest.approx(float(torch.stack([evidence(c) for c in range(1, 7)]).logsumexp(0)))
    assert float(result.params["stay"]) == pytest.approx(stay)


def test_chains_run_under_vmap(fit):
    """One run a draw made the last check of a chain slower than its fit."""

    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        rows = torch.stack([torch.stack([1 - p, p]), torch.stack([p, 1 - p])])
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(rows[z]), infer=SUMMED)
            pyro.sample(f"y{t}", dist.Normal(2.0 * z, 1.0), obs=y[t])

    result = fit(model, {"y": torch.tensor([0.1, -0.3, 2.2, 1.8])})
    assert result.converged
    assert "vmap" not in str(result.plan)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_hidden_markov_models_have_the_density_of_pyro(steps, batch):
    torch.manual_seed(1)
    vectors = dist.Normal(torch.randn(2, 5), 1.0).to_event(1)
    fn = dist.DiscreteHMM(torch.randn(*batch, 2), torch.randn(steps, 2, 2), vectors, duration=4)
    value = torch.randn(*batch, 4, 5)
    torch.testing.assert_close(lean_log_prob(fn, value), fn.log_prob(value))
    wider = fn.expand((6, *batch))
    torch.testing.assert_close(lean_log_prob(wider, value), wider.log_prob(value))


def hidden(y):
    """The chain of `left_right` by Pyro's own distribution."""
    stay = pyro.param("stay", torch.tensor(0.8), constraint=constraints.unit_interval)
    rows = torch.stack([torch.stack([stay, 1 - stay]).log(), torch.tensor([-INF, 0.0])])
    emission = dist.Normal(torch.tensor([0.0, 100.0]), 1.0)
    # Pyro moves once before the first datum: the chain starts where it comes to stand.
    first, rest = torch.tensor([[0.0, -INF], [-INF, 0.0]]), rows.expand(len(y) - 1, 2, 2)
    start, logits = torch.tensor([0.0, -INF]), torch.cat([first.unsqueeze(0), rest])
    pyro.sample("y", dist.DiscreteHMM(start, logits, emission), obs=y)


def test_hidden_markov_models_keep_their_evidence(fit):
    y = torch.tensor([0.3, -0.2, 100.5, 99.8, 43.0, 101.0])
    chain, whole = fit(left_right, {"y": y}), fit(hidden, {"y": y})
    assert whole.converged
    assert whole.elbo == pytest.approx(chain.elbo, abs=1e-9)
    assert float(whole.params["stay"]) == pytest.approx(0.5, abs=1e-4)
    assert "vmap" not in str(whole.plan)


def test_the_bound_for_svi_keeps_its_slopes():
    """A change of state that costs 60 nats, and data that ask for it: Pyro's own slope is 3e-20 there."""
    pyro.clear_param_store()
    y, rows, locs = torch.tensor([0.1, 20.2]), torch.tensor(STICKY), torch.tensor([0.0, 20.0])

    def model():
        shift = pyro.param("shift", torch.tensor(0.5))
        z = 0
        for t in pyro.markov(range(2)):
            fn = dist.Categorical(logits=rows[z]) if t else dist.Categorical(torch.tensor([0.5, 0.5]))
            z = pyro.sample(f"z{t}", fn, infer=SUMMED)
            pyro.sample(f"y{t}", dist.Normal(locs[z] + shift, 1.0), obs=y[t])

    loss = vem.AnalyticKL_ELBO(max_plate_nesting=0).differentiable_loss(model, lambda: None)
    (found,) = torch.autograd.grad(loss, [pyro.param("shift").unconstrained()])
    shift = torch.tensor(0.5, requires_grad=True)
    seen = dist.Normal(locs + shift, 1.0).log_prob(y.unsqueeze(-1))
    exact = (seen[0].unsqueeze(-1) + rows + seen[1]).logsumexp((0, 1)) - torch.tensor(2.0).log()
    (right,) = torch.autograd.grad(exact, [shift])
    assert float(loss.detach()) == pytest.approx(-float(exact.detach()), rel=1e-12)
    torch.testing.assert_close(found, -right)
