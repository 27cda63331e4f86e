"""What a proof costs, and an SVI step with `AnalyticKL_ELBO` beside Pyro's TraceMeanField_ELBO.

Both run in one process, in turns; medians and their ratio are printed.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_vem as vem

ROUNDS, STEPS = 15, 100
SITES = 10


def model(y: torch.Tensor) -> None:
    """Ten latent sites, half of them with a positive prior."""
    total = torch.zeros(())
    for i in range(SITES):
        prior = dist.Gamma(2.0, 1.0) if i % 2 else dist.Normal(0.0, 1.0)
        total = total + pyro.sample(f"z{i}", prior)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def guide(y: torch.Tensor) -> None:
    """A factor of each site's own family, so that Pyro's own bound can be used."""
    for i in range(SITES):
        first = pyro.param(f"a{i}", torch.tensor(1.0), constraint=dist.constraints.positive)
        second = pyro.param(f"b{i}", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample(f"z{i}", dist.Gamma(first, second) if i % 2 else dist.Normal(first, second))


def seconds_per_step(elbo: ELBO, data: torch.Tensor) -> Callable[[], float]:
    """A function that runs some steps and gives the seconds of one."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            svi.step(data)
        return (time.perf_counter() - start) / STEPS

    run()
    return run


def main() -> None:
    """Print the cost of the proof and the ratio of the steps."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    data = torch.linspace(-1.0, 3.0, 50)

    proofs = []
    for _ in range(ROUNDS):
        elbo = vem.AnalyticKL_ELBO()
        first, second = (_seconds(lambda: elbo.loss(model, guide, data)) for _ in range(2))  # noqa: B023
        proofs.append(first - second)
    print(f"proof of {SITES} latent sites: {1e3 * statistics.median(proofs):.1f} ms, once")  # noqa: T201

    kinds = {
        "AnalyticKL_ELBO": vem.AnalyticKL_ELBO(),
        "TraceMeanField_ELBO": TraceMeanField_ELBO(),
        "Trace_ELBO": Trace_ELBO(),
    }
    runs = {name: seconds_per_step(elbo, data) for name, elbo in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run())
    ours = times.pop("AnalyticKL_ELBO")
    print(f"SVI step with AnalyticKL_ELBO: {1e3 * statistics.median(ours):.2f} ms")  # noqa: T201
    for name, theirs in times.items():
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"SVI step with {name}: {1e3 * statistics.median(theirs):.2f} ms, {ratio:.2f} times ours")  # noqa: T201


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
