"""Regressions of other families than the usual: seconds of fit_vem, compiled and on draws; in ``make bench``.

Each model is fitted twice, with what compiles and with draws alone, as a row of a plate: how much an
expectation in closed form or at nodes is worth, and whether both come to the same bound. ``--rows`` and
``--groups`` (with a scaled effect each, as in mixed models) say how large; names say which families.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_vem as vem

COLUMNS = 4
Family = Callable[[Tensor, Tensor], Any]


def _mixture(eta: Tensor, k: Tensor) -> Any:
    weights = torch.stack([torch.ones_like(k), k], -1).expand(*eta.shape, 2)
    parts = dist.Normal(eta.unsqueeze(-1), torch.tensor([0.5, 3.0], dtype=torch.float64))
    return dist.MixtureSameFamily(dist.Categorical(weights), parts)


FAMILIES: dict[str, Family] = {
    "Poisson": lambda eta, k: dist.Poisson(eta.exp()),
    "negative binomial": lambda eta, k: dist.NegativeBinomial(k, logits=eta - k.log()),
    "gamma": lambda eta, k: dist.Gamma(k, k / eta.exp()),
    "Student t": lambda eta, k: dist.StudentT(k, eta, 0.5),
    "probit": lambda eta, k: dist.Bernoulli(dist.Normal(torch.zeros_like(eta), 1.0).cdf(eta)),
    "softplus rate": lambda eta, k: dist.Poisson(softplus(eta)),
    "softplus scale": lambda eta, k: dist.Normal(k, softplus(eta)),
    "beta": lambda eta, k: dist.Beta(k * eta.sigmoid(), k * (1 - eta.sigmoid())),
    "beta-binomial": lambda eta, k: dist.BetaBinomial(k * eta.sigmoid(), k * (1 - eta.sigmoid()), 20),
    "zero-inflated Poisson": lambda eta, k: dist.ZeroInflatedPoisson(eta.exp(), gate_logits=-k.log()),
    "softmax": lambda eta, k: dist.Categorical(logits=torch.stack([0 * eta, eta, k - eta], -1)),
    "ordered": lambda eta, k: dist.OrderedLogistic(eta, torch.stack([0 * k, k, 2.5 * k])),
    "Weibull": lambda eta, k: dist.Weibull(eta.exp(), k),
    "mixture": _mixture,
}


def model(x: Tensor, y: Tensor, family: Family, group: Tensor | None) -> None:
    """A regression with a positive number beside its predictor, and effects of groups if there are any."""
    b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 2.0).to_event(1))
    k = pyro.sample("k", dist.LogNormal(0.5, 0.5))
    eta = x @ b
    if group is not None:
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with pyro.plate("groups", int(group.max()) + 1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        eta = eta + sd * u[group]
    with pyro.plate("rows", len(y)):
        pyro.sample("y", family(eta, k), obs=y)


def data(family: Family, rows: int, groups: int) -> dict[str, Any]:
    """Rows of the model itself, at round numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64)
    x[:, 0] = 1
    eta = x @ torch.tensor([0.5, 0.6, -0.4, 0.2], dtype=torch.float64)
    group = torch.arange(rows) % groups if groups else None
    if group is not None:
        eta = eta + 0.5 * torch.randn(groups, generator=generator, dtype=torch.float64)[group]
    with pyro.poutine.seed(rng_seed=1):
        y = pyro.sample("y", family(eta, torch.tensor(2.0, dtype=torch.float64)))
    if y.max() < 1 and y.min() > 0:
        y = y.clamp(1e-6, 1 - 1e-6)  # a share that is rounded to one has no density
    return {"x": x, "y": y, "family": family, "group": group}


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=0)
    given = parser.parse_args()
    size = f"{given.rows:,} rows" + (f", {given.groups} groups" if given.groups else "")
    sys.stdout.write(f"{size:24} seconds  method        on draws alone  ratio  bounds apart\n")
    for name in given.names:
        call = data(FAMILIES[name], given.rows, given.groups)
        seconds, fits = [], []
        for compiled in (True, False):
            start = time.perf_counter()
            options = vem.FitOptions(compiled=compiled)
            fits.append(vem.fit_vem(model, call, options=options, progress=False))
            seconds.append(time.perf_counter() - start)
        apart = fits[0].elbo - fits[1].elbo
        method = fits[0].plan["y"].method
        line = f"{name:24} {seconds[0]:7.2f}  {method:12}  {seconds[1]:14.2f}  {seconds[1] / seconds[0]:5.1f}"
        sys.stdout.write(f"{line}  {apart:12.4f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
