"""Data and models for EM: mixtures, chains, random effects, item responses, with exact answers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

# Waiting times between eruptions of Old Faithful, minutes (Azzalini and Bowman, 1990), two digits each.
_WAITING = (
    "7954746285558885518554847847835262845279514778697483557678797377668074524880599080588458738364538259"
    "7590548054837164778159844882609278786573825679716276607876837582706573887680488660905078637284755182"
    "6288498381478452868175598979598150855987536977568881458255904583568946825186537981608277765980499653"
    "7777658171708193538945865878667663885293495777688181735085745577838351788446835581577684778187775178"
    "6082915378467784498371804975647653945576508254757879787870797054865090545477796475478663858257826774"
    "54837373888071835679788458834360758146904674"
)
WAITING = torch.tensor([float(_WAITING[i : i + 2]) for i in range(0, len(_WAITING), 2)], dtype=torch.float64)

# Counts of the 32 response patterns of LSAT section 6 (Bock and Lieberman, 1970), 00000 to 11111.
LSAT_COUNTS = [
    3, 6, 2, 11, 1, 1, 3, 4, 1, 8, 0, 16, 0, 3, 2, 15,
    10, 29, 14, 81, 3, 28, 15, 80, 16, 56, 21, 173, 11, 61, 28, 298,
]  # fmt: skip
LSAT = torch.tensor([[int(b) for b in f"{i:05b}"] for i in range(32)], dtype=torch.float64)
LSAT = LSAT.repeat_interleave(torch.tensor(LSAT_COUNTS), 0)


def two_waits(y):
    weights = pyro.param("weights", torch.full((2,), 0.5), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([50.0, 80.0]))
    sd = pyro.param("sd", torch.full((2,), 5.0), constraint=constraints.positive)
    with pyro.plate("eruption", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)


def two_waits_bayes(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 2.0])))
    with pyro.plate("component", 2):
        tau = pyro.sample("tau", dist.Gamma(2.0, 20.0))
        mu = pyro.sample("mu", dist.Normal(70.0, 20.0))
    with pyro.plate("eruption", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], tau[z].rsqrt()), obs=y)


def normal_gamma(y):
    mu = pyro.sample("mu", dist.Normal(1.0, 10.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


GROUPS, PER_GROUP = 200, 4


def random_intercept(group, y):
    mu = pyro.param("mu", torch.tensor(0.0))
    between = pyro.param("between", torch.tensor(1.5), constraint=constraints.positive)
    within = pyro.param("within", torch.tensor(1.5), constraint=constraints.positive)
    with pyro.plate("groups", int(group.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(mu, between))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], within), obs=y)


def slow_em_data(seed):
    """Balanced groups whose means nearly agree: EM is slow there."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(2, 0.3, GROUPS)
    y = rng.normal(theta[:, None], 1.0, (GROUPS, PER_GROUP)).reshape(-1)
    return {"group": torch.arange(GROUPS).repeat_interleave(PER_GROUP), "y": torch.tensor(y)}


def balanced_log_likelihood(mu, between, within, y):
    """Exact marginal log likelihood of the balanced random intercept model; differentiable."""
    rows = y.reshape(GROUPS, PER_GROUP)
    inside = (rows - rows.mean(1, keepdim=True)).square().sum()
    outside = PER_GROUP * (rows.mean(1) - mu).square().sum()
    total = within**2 + PER_GROUP * between**2
    logs = GROUPS * (PER_GROUP - 1) * (within**2).log() + GROUPS * total.log()
    return -0.5 * (y.numel() * math.log(2 * math.pi) + logs + inside / within**2 + outside / total)


def best_balanced(y):
    """Maximum of `balanced_log_likelihood` in closed form: mu, between, within."""
    rows = y.reshape(GROUPS, PER_GROUP)
    mu = rows.mean()
    inside = (rows - rows.mean(1, keepdim=True)).square().sum()
    outside = PER_GROUP * (rows.mean(1) - mu).square().sum()
    within = inside / (GROUPS * (PER_GROUP - 1))
    total = outside / GROUPS
    if total < within:  # the edge: all groups have one mean
        within = total = (inside + outside) / y.numel()
    return mu, ((total - within) / PER_GROUP).clamp(min=0).sqrt(), within.sqrt()


def random_slope(x, group, y):
    beta = pyro.param("beta", torch.zeros(2))
    tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
    within = pyro.param("within", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", int(group.max()) + 1):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
    with pyro.plate("rows", len(y)):
        mean = beta[0] + z[group, 0] + (beta[1] + z[group, 1]) * x
        pyro.sample("y", dist.Normal(mean, within), obs=y)


def random_slope_data(groups=40, per_group=6):
    rng = np.random.default_rng(3)
    x = rng.normal(size=groups * per_group)
    group = np.repeat(np.arange(groups), per_group)
    z = rng.normal(size=(groups, 2)) @ np.array([[1.0, 0.0], [0.3, 0.5]]).T
    y = 1 + z[group, 0] + (2 + z[group, 1]) * x + 0.8 * rng.normal(size=len(x))
    return {"x": torch.tensor(x), "group": torch.tensor(group), "y": torch.tensor(y)}


def slope_log_likelihood(beta, tril, within, x, group, y):
    """Exact marginal log likelihood of the random slope model; differentiable."""
    design = torch.stack([torch.ones_like(x), x], -1)
    total = torch.zeros((), dtype=y.dtype)
    for g in range(int(group.max()) + 1):
        rows = design[group == g]
        cov = rows @ tril @ tril.T @ rows.T + within**2 * torch.eye(len(rows), dtype=y.dtype)
        total = total + torch.distributions.MultivariateNormal(rows @ beta, cov).log_prob(y[group == g])
    return total


def chain(y):
    """A hidden Markov chain with two states and Normal emissions."""
    start = pyro.param("start", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    moves = pyro.param("moves", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(y))):
        probs = start if z is None else moves[z]
        z = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(mu[z], sd[z]), obs=y[t])


def item_responses(y):
    slope = pyro.param("slope", torch.ones(5))
    level = pyro.param("level", torch.zeros(5))
    with pyro.plate("students", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=slope * theta.unsqueeze(-1) + level).to_event(1), obs=y)


def topics(document, word, count, num_topics=4, num_words=20_000):
    """Latent Dirichlet allocation, as one writes it."""
    with pyro.plate("topics", num_topics):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((num_words,), 0.1)))
    with pyro.plate("documents", int(document.max()) + 1):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((num_topics,), 0.5)))
    with pyro.plate("words", len(word)), pyro.poutine.scale(scale=count):
        z = pyro.sample("z", dist.Categorical(theta[document]), infer={"enumerate": "parallel"})
        pyro.sample("word", dist.Categorical(phi[z]), obs=word)
