"""EM beside scikit-learn, statsmodels and pyPLNmodels: bounds, parameters, seconds.

Run by ``make bench-em``; the peers come with the extra "em-peers". Each pair runs in a process of its
own, so that first calls count what they import; data are loaded, and the packages imported, before.
"""

import argparse
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special
from torch import Tensor
from torch.distributions import constraints

import pyro_vem as vem

sys.path.append(str(Path(__file__).parents[1]))
import zoo_em

KEEP = {"progress": False}


class Result(NamedTuple):
    """One fit: its bound in nats, and the seconds of a first and a second call."""

    bound: float
    seconds: tuple[float, float]


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What a function returns, and the seconds of its first two calls."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        made = run()
        times.append(time.perf_counter() - start)
    return made, (times[0], times[1])


def mixture() -> tuple[Result, Result, str]:
    """Two Normal components on Old Faithful's waiting times."""
    from sklearn.mixture import GaussianMixture

    y = zoo_em.WAITING
    fit, seconds = timed(lambda: vem.fit_vem(zoo_em.two_waits, {"y": y}, **KEEP))
    data = y.numpy()[:, None]
    peer, peer_seconds = timed(
        lambda: GaussianMixture(
            2, tol=1e-12, max_iter=10_000, means_init=[[50.0], [80.0]], reg_covar=0.0
        ).fit(data)
    )
    off = np.abs(np.sort(peer.means_.ravel()) - fit.params["mu"].sort().values.numpy()).max()
    return (
        Result(fit.elbo, seconds),
        Result(float(peer.score(data)) * len(data), peer_seconds),
        f"means differ by {off:.1g}",
    )


def vectors() -> tuple[Result, Result, str]:
    """Three classes with full covariances on iris, from the same three rows."""
    from sklearn.datasets import load_iris
    from sklearn.mixture import GaussianMixture

    data = load_iris().data
    means, covariance = data[[76, 70, 113]], np.cov(data.T)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor(means))
        tril = torch.tensor(np.linalg.cholesky(covariance)).repeat(3, 1, 1)
        tril = pyro.param("tril", tril, constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=tril[z]), obs=x)

    fit, seconds = timed(lambda: vem.fit_vem(model, {"x": torch.tensor(data)}, **KEEP))
    peer, peer_seconds = timed(
        lambda: GaussianMixture(
            3, tol=1e-12, max_iter=10_000, weights_init=np.ones(3) / 3, means_init=means,
            precisions_init=np.stack([np.linalg.inv(covariance)] * 3), reg_covar=0.0,
        ).fit(data)
    )  # fmt: skip
    off = np.abs(peer.means_ - fit.params["mu"].numpy()).max()
    return (
        Result(fit.elbo, seconds),
        Result(float(peer.score(data)) * len(data), peer_seconds),
        f"means differ by {off:.1g}",
    )


def principal_components() -> tuple[Result, Result, str]:
    """Probabilistic PCA with two components on iris."""
    from sklearn.datasets import load_iris
    from sklearn.decomposition import PCA

    y = torch.tensor(load_iris().data)

    def model(y: Tensor) -> None:
        w = pyro.param("w", torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
        mu = pyro.param("mu", y.mean(0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(mu + z @ w, sd).to_event(1), obs=y)

    fit, seconds = timed(lambda: vem.fit_vem(model, {"y": y}, guide="auto", **KEEP))
    peer, peer_seconds = timed(lambda: PCA(2).fit(y.numpy()))
    values = np.linalg.eigvalsh(np.cov(y.numpy().T, ddof=0))[::-1]
    noise = values[2:].mean()
    exact = -0.5 * len(y) * (4 * math.log(2 * math.pi) + np.log(values[:2]).sum() + 2 * math.log(noise) + 4)
    return Result(fit.elbo, seconds), Result(float(exact), peer_seconds), f"PCA's score {peer.score(y):.5f}"


def factors() -> tuple[Result, Result, str]:
    """Factor analysis with two factors of six measurements, simulated."""
    from sklearn.decomposition import FactorAnalysis

    rng = np.random.default_rng(6)
    y = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 6)) + np.linspace(0.4, 1, 6) * rng.normal(
        size=(500, 6)
    )
    y -= y.mean(0)

    def model(y: Tensor) -> None:
        w = pyro.param("w", 0.1 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
        sd = pyro.param("sd", torch.ones(6), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ w, sd).to_event(1), obs=y)

    fit, seconds = timed(lambda: vem.fit_vem(model, {"y": torch.tensor(y)}, guide="auto", **KEEP))
    peer, peer_seconds = timed(
        lambda: FactorAnalysis(2, tol=1e-12, max_iter=100_000, svd_method="lapack").fit(y)
    )
    off = np.abs(np.sqrt(peer.noise_variance_) - fit.params["sd"].numpy()).max()
    return (
        Result(fit.elbo, seconds),
        Result(float(peer.score(y)) * len(y), peer_seconds),
        f"sds differ by {off:.1g}",
    )


def topics(starts: int = 4, rounds: int = 36) -> tuple[Result, Result, str]:
    """Latent Dirichlet allocation on the Reuters set of the package lda, 20 topics."""
    import lda.datasets
    from sklearn.decomposition import LatentDirichletAllocation

    counts = lda.datasets.load_reuters().astype(float)
    document, word = counts.nonzero()
    count = counts[document, word]
    num_topics, (num_documents, num_words) = 20, counts.shape

    def model(document: Tensor, word: Tensor, count: Tensor) -> None:
        with pyro.plate("topics", num_topics):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((num_words,), 1 / num_topics)))
        with pyro.plate("documents", num_documents):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((num_topics,), 1 / num_topics)))
        with pyro.plate("words", len(word)), pyro.poutine.scale(scale=count):
            z = pyro.sample("z", dist.Categorical(theta[document]), infer={"enumerate": "parallel"})
            pyro.sample("word", dist.Categorical(phi[z]), obs=word)

    data = {
        "document": torch.tensor(document),
        "word": torch.tensor(word),
        "count": torch.tensor(count, dtype=torch.float64),
    }
    fit, seconds = timed(lambda: vem.fit_vem(model, data, num_starts=starts, max_iter=rounds, **KEEP))

    def peers() -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for seed in range(starts):
            peer = LatentDirichletAllocation(num_topics, max_iter=120, random_state=seed).fit(counts)
            found.append((peer._unnormalized_transform(counts), peer.components_))
        return found

    made, peer_seconds = timed(peers)
    bounds = [topics_bound(gamma, beta, document, word, count) for gamma, beta in made]
    again = topics_bound(
        fit.guide_params["guide.concentration.theta"].numpy(),
        fit.guide_params["guide.concentration.phi"].numpy(), document, word, count,
    )  # fmt: skip
    assert abs(again - fit.elbo) < 1e-6 * abs(fit.elbo), (again, fit.elbo)
    ours = sorted(start.elbo for start in fit.starts)
    note = (
        f"{starts} starts: {ours[0]:,.0f} to {ours[-1]:,.0f}; peer {min(bounds):,.0f} to {max(bounds):,.0f}"
    )
    return Result(fit.elbo, seconds), Result(max(bounds), peer_seconds), note


def topics_bound(
    gamma: np.ndarray, beta: np.ndarray, document: np.ndarray, word: np.ndarray, count: np.ndarray
) -> float:
    """The bound of factors of documents and topics, by hand; priors are 1 / topics."""
    prior = 1 / len(beta)

    def divergence(q: np.ndarray) -> float:
        log = special.digamma(q) - special.digamma(q.sum(1, keepdims=True))
        size = q.shape[1]
        value = ((prior - q) * log).sum() + special.gammaln(q).sum() - special.gammaln(q.sum(1)).sum()
        return float(value + len(q) * (special.gammaln(size * prior) - size * special.gammaln(prior)))

    log_theta = special.digamma(gamma) - special.digamma(gamma.sum(1, keepdims=True))
    log_phi = special.digamma(beta) - special.digamma(beta.sum(1, keepdims=True))
    rows = special.logsumexp(log_theta[document] + log_phi[:, word].T, axis=1)
    return float((count * rows).sum()) + divergence(gamma) + divergence(beta)


def random_intercept() -> tuple[Result, Result, str]:
    """One-way random effects: parameters and standard errors of MixedLM."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 5)
    y = 2 + rng.normal(0, 0.7, 60)[group] + rng.normal(size=300)
    return _mixed(np.ones((300, 1)), group, y)


def random_slope() -> tuple[Result, Result, str]:
    """Random intercept and slope, correlated."""
    rng = np.random.default_rng(1)
    group, x = np.repeat(np.arange(60), 8), rng.normal(size=480)
    z = rng.normal(size=(60, 2)) @ np.array([[1.0, 0.0], [0.3, 0.5]]).T
    y = 1 + z[group, 0] + (2 + z[group, 1]) * x + 0.8 * rng.normal(size=480)
    return _mixed(np.stack([np.ones(480), x], 1), group, y)


def _mixed(design: np.ndarray, group: np.ndarray, y: np.ndarray) -> tuple[Result, Result, str]:
    from statsmodels.regression.mixed_linear_model import MixedLM

    size = design.shape[1]

    def model(design: Tensor, group: Tensor, y: Tensor) -> None:
        beta = pyro.param("beta", torch.zeros(size))
        tril = pyro.param("tril", torch.eye(size), constraint=constraints.lower_cholesky)
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("groups", int(group.max()) + 1):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(size), scale_tril=tril))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((design * (beta + z[group])).sum(-1), sd), obs=y)

    data = {"design": torch.tensor(design), "group": torch.tensor(group), "y": torch.tensor(y)}
    fit, seconds = timed(lambda: vem.fit_vem(model, data, guide="auto", **KEEP))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer, peer_seconds = timed(
            lambda: MixedLM(y, design, group, exog_re=design).fit(
                reml=False, gtol=1e-8, method=["lbfgs", "bfgs"]
            )
        )
    cov = (fit.params["tril"] @ fit.params["tril"].T).numpy()
    sd = float(fit.params["sd"])
    off = max(
        np.abs(fit.params["beta"].numpy() - peer.fe_params).max(),
        np.abs(cov - np.asarray(peer.cov_re)).max(),
        abs(sd**2 - peer.scale),
    )
    errors = fit.standard_errors()["beta"].numpy() / peer.bse_fe - 1
    ratio = _variance_errors(fit, cov, sd) / np.asarray(peer.bse)[size:] - 1
    note = f"parameters differ by {off:.1g}, errors by {100 * np.abs(errors).max():.1f} % (fixed effects)"
    note += f", {100 * np.abs(ratio).max():.1f} % (variances over the residual's)"
    return Result(fit.elbo, seconds), Result(float(peer.llf), peer_seconds), note


def _variance_errors(fit: vem.VEMResult, cov: np.ndarray, sd: float) -> np.ndarray:
    """Standard errors of cov / sd^2, lower triangle, by the delta method."""
    size = len(cov)
    frame = fit.covariance("params")
    names = [n for n in frame.index if n.startswith(("tril", "sd"))]
    point = torch.tensor([*fit.params["tril"].reshape(-1).tolist(), sd], dtype=torch.float64)

    def ratios(x: Tensor) -> Tensor:
        tril = x[:-1].reshape(size, size)
        rows, columns = np.tril_indices(size)
        return (tril @ tril.T / x[-1] ** 2)[rows, columns]

    jacobian = torch.autograd.functional.jacobian(ratios, point).numpy()
    return np.sqrt(np.diag(jacobian @ frame.loc[names, names].to_numpy() @ jacobian.T))


def counts(is_full: bool) -> tuple[Result, Result, str]:
    """Poisson log-normal model on 500 cells and 50 genes shipped with pyPLNmodels."""
    import contextlib
    import io

    from pyPLNmodels import Pln, PlnDiag, load_scrna

    with contextlib.redirect_stdout(io.StringIO()):
        table = load_scrna(n_samples=500, dim=50)["endog"]
    y = torch.tensor(table.to_numpy(), dtype=torch.float64)

    def diagonal(y: Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(y.shape[1]))
        sd = pyro.param("sd", torch.ones(y.shape[1]), constraint=constraints.positive)
        with pyro.plate("cells", y.shape[0], dim=-2), pyro.plate("genes", y.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(mu, sd))
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    def full(y: Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(y.shape[1]))
        tril = pyro.param("tril", torch.eye(y.shape[1]), constraint=constraints.lower_cholesky)
        with pyro.plate("cells", y.shape[0]):
            z = pyro.sample("z", dist.MultivariateNormal(mu, scale_tril=tril))
            pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)

    model, peers, best = (full, Pln, -63525.996) if is_full else (diagonal, PlnDiag, -78090.119)
    fit, seconds = timed(lambda: vem.fit_vem(model, {"y": y}, guide="auto", tol=0.1, **KEEP))
    with contextlib.redirect_stdout(io.StringIO()):
        peer, peer_seconds = timed(lambda: peers(table, exog=None).fit())
    # Its bound has Stirling's formula for log y!, at 1 for 0.
    safe = y.clamp(min=1)
    stirling = safe * safe.log() - safe + 0.5 * (2 * math.pi * safe).log()
    shift = float((stirling - torch.lgamma(y + 1)).sum())
    note = f"{best - fit.elbo:.3f} nats below the optimum, {best:,.3f}"
    return Result(fit.elbo, seconds), Result(float(peer.elbo) + shift, peer_seconds), note


PROBLEMS = {
    "mixture": mixture,
    "mixture of vectors": vectors,
    "principal components": principal_components,
    "factor analysis": factors,
    "random intercept": random_intercept,
    "random slope": random_slope,
    "counts (diagonal PLN)": lambda: counts(False),
    "counts (full PLN)": lambda: counts(True),
    "topics (LDA)": topics,
}


def row_of(name: str) -> str:
    """One problem's row of the table."""
    ours, peer, note = PROBLEMS[name]()
    cells = [name, f"{ours.bound:.4f}", f"{peer.bound:.4f}"]
    for here, there in zip(ours.seconds, peer.seconds, strict=True):
        cells += [f"{here:.3g}", f"{there:.3g}", f"{there / here:.2g}"]
    return "| " + " | ".join([*cells, note]) + " |"


def main() -> None:
    """Print one row a problem, each from a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--here", action="store_true", help="in this process, without a table")
    parser.add_argument("--out", type=Path, default=Path("build/bench/em.md"))
    chosen = parser.parse_args()
    if chosen.here:
        say("\n".join(row_of(name) for name in chosen.problems))
        return
    lines = [
        "| problem | bound | peer's | first call, s | peer's | ratio | second call, s | peer's | ratio | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    say("\n".join(lines))
    for name in chosen.problems:
        command = [sys.executable, __file__, "--here", name]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        lines.append(out.strip().splitlines()[-1])
        say(lines[-1])
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
