"""Counts in groups, fitted by several processes, each with its own groups.

On one machine::

    torchrun --standalone --nproc-per-node 2 tutorials/groups.py

"""

import os
import resource
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed

import pyro_vem as vem


@vem.vem_model
def counts(x, y):
    """Poisson counts with a random intercept for each group."""
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    b = pyro.sample("b", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("groups", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sd))
        with pyro.plate("counts", y.shape[1], dim=-1):
            pyro.sample("y", dist.Poisson((b[0] + b[1] * x + u).exp()), obs=y)


def simulated(num_groups):
    """Covariates and counts, five in each group."""
    generator = torch.Generator().manual_seed(0)
    u = 0.7 * torch.randn(num_groups, 1, generator=generator)
    x = torch.randn(num_groups, 5, generator=generator)
    return x, torch.poisson((0.5 + 0.3 * x + u).exp(), generator=generator)


def main(num_groups=20_000, folder="build"):
    """Fit, and let the first process report and save."""
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(num_groups * rank // count, num_groups * (rank + 1) // count)
    x, y = (value[own].clone() for value in simulated(num_groups))  # or what this machine's disk holds
    Path(folder).mkdir(exist_ok=True)
    fit = vem.fit_vem(
        counts,
        {"x": x, "y": y},
        checkpoint=f"{folder}/groups.checkpoint",
        options=vem.FitOptions(sharded=("groups",)),
        progress=False,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks = [None] * count
    torch.distributed.all_gather_object(peaks, peak)
    if rank == 0:
        fit.save(f"{folder}/groups.fit")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        print(
            f"{count} processes, {restarts} restarts: {fit.status.name}, ELBO {fit.elbo:.8f}, "
            f"sd {float(fit.params['sd']):.8f}, {fit.seconds:.1f} s, at most {max(peaks):.0f} MB each"
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
