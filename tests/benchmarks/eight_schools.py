"""Seconds to the best diagonal Gaussian of eight schools: fit_vem beside Pyro's SVI, in one process.

SVI runs Adam with the step size that did best of those tried (0.02) and is stopped, with the benefit of
hindsight, at the first multiple of 250 steps where its true ELBO is within 0.1 nat of the optimum.
Run by ``make bench``; prints medians and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

sys.path.insert(0, str(Path(__file__).parent.parent))
import zoo

import pyro_vem as vem

TARGET = zoo.SCHOOLS_BEST_ELBO - 0.1
REPEATS = 3


def fit_seconds(seed):
    """One fit, and the ELBO that it reports."""
    start = time.perf_counter()
    fit = vem.fit_vem(zoo.eight_schools, zoo.SCHOOLS, seed=seed, progress=False)
    return time.perf_counter() - start, fit.elbo


def svi_seconds(seed, most=5000):
    """SVI until its ELBO, measured outside of the clock, is within 0.1 nat; infinite if it never is."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoNormal(zoo.eight_schools)
    svi = SVI(zoo.eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    judge = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    seconds = 0.0
    for _ in range(most // 250):
        start = time.perf_counter()
        for _ in range(250):
            svi.step(**zoo.SCHOOLS)
        seconds += time.perf_counter() - start
        with torch.no_grad():
            elbo = -judge.loss(zoo.eight_schools, guide, **zoo.SCHOOLS)
        if elbo > TARGET:
            return seconds, elbo
    return float("inf"), elbo


def main():
    """Print medians and the ratio."""
    first, _ = fit_seconds(0)
    ours = [fit_seconds(seed) for seed in range(REPEATS)]
    theirs = [svi_seconds(seed) for seed in range(REPEATS)]
    our_time, their_time = (statistics.median(t for t, _ in runs) for runs in (ours, theirs))
    print(f"fit_vem  first {first:.2f} s, then {our_time:.2f} s, ELBO {ours[0][1]:.3f}")  # noqa: T201
    print(f"Pyro SVI {their_time:.2f} s, ELBO {theirs[0][1]:.3f}")  # noqa: T201
    print(f"ratio    {their_time / our_time:.0f}")  # noqa: T201


if __name__ == "__main__":
    main()
