"""NUTS started from a fit beside NUTS started cold, and nutpie beside Pyro, in one process.

Warm-up: the smallest number of steps at which the smallest bulk ESS of all latents is within 10 % of that
of a cold start with the longest warm-up, and the largest R-hat below 1.01; medians over seeds. A cold
start has Pyro's defaults (uniform starts, unit metric, both adapted), on the captured density, so that
only the start differs. A warm one is compare_nuts'. Both accept 0.8 of their steps, Pyro's default.

Speed: milliseconds of a log density with its gradient, and whole runs with as much warm-up as they need,
compiling included, and compare_nuts as it comes (0.95 accepted, 200 steps of warm-up). All in turns;
medians, and medians of paired ratios. Pyro on its own potential runs once.
"""

import argparse
import dataclasses
import os
import statistics
import time
import warnings

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # every run pays for its compiler

import data
import models_pyro
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from time_to_accuracy import say, text, write

import pyro_vem as vem
from pyro_vem.model.runtime import isolated
from pyro_vem.posterior.arviz import nuts_data
from pyro_vem.posterior.comparison import diagnostics, frame
from pyro_vem.posterior.density import Density
from pyro_vem.posterior.engines import ENGINES, NUTSOptions, Potential
from pyro_vem.posterior.nuts import sample

CHAINS, ACCEPT = 4, 0.8
WORKLOADS = ("eight_schools_noncentred", "radon")
COLUMNS = ("workload", "sampler", "start", "warmup", "ess", "r_hat", "divergences", "gradients", "seconds")
RUN = ("run", "warmup", "ess", "r_hat", "seconds", "ess_per_second", "times")


class Counted:
    """A gradient that counts how often it is taken."""

    def __init__(self, gradient):
        self.gradient, self.count = gradient, 0

    def __call__(self, z):
        self.count += 1
        return self.gradient(z)


def fitted(workload):
    model, arrays, sizes = data.load(workload)
    given = {name: torch.as_tensor(value) for name, value in arrays.items()} | sizes
    return vem.fit_vem(getattr(models_pyro, model), given, progress=False)


def cold(density):
    """The same density of the unconstrained latents themselves, started as Pyro does."""
    generator = torch.Generator().manual_seed(0)
    starts = 4 * torch.rand(1000, density.dim, generator=generator) - 2
    flat = {"loc": torch.zeros_like(density.loc), "root": torch.ones(density.dim)}
    return dataclasses.replace(density, starts=starts, graph=None, **flat)


def told(fit, chains, diverging):
    """Smallest bulk ESS and largest R-hat of the latents, and divergences."""
    idata = nuts_data(fit, chains, {"diverging": diverging}, None, None)
    table = diagnostics(frame(idata, idata), CHAINS)
    found = {"ess": table["ess_bulk"].min(), "r_hat": table["r_hat"].max()}
    return found | {"divergences": int(diverging.sum())}


def pyro_cold(density, draws, warmup, seed):
    """Pyro with its defaults on the captured density."""
    points, diverging = torch.empty(CHAINS, draws, density.dim), torch.zeros(CHAINS, draws, dtype=torch.bool)
    for chain in range(CHAINS):
        pyro.set_rng_seed(1000 * seed + chain)
        kernel = NUTS(potential_fn=lambda at: Potential.apply(at["z"], density.gradient))
        start = {"z": density.start(1000 * seed + chain)}
        mcmc = MCMC(kernel, draws, warmup_steps=warmup, initial_params=start, disable_progbar=True)
        mcmc.run()
        points[chain] = mcmc.get_samples()["z"]
        diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
    return points, diverging


def pyro_alone(fit, draws, warmup):
    """Pyro with its defaults on its own potential: no part of this package."""
    call, chains, start = fit.setup.problem.call, [], time.perf_counter()
    diverging = torch.zeros(CHAINS, draws, dtype=torch.bool)
    for chain in range(CHAINS):
        pyro.set_rng_seed(chain)
        mcmc = MCMC(NUTS(fit.model), draws, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(*call.args, **call.kwargs)
        chains.append(mcmc.get_samples())
        diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
    seconds = time.perf_counter() - start
    stacked = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return told(fit, stacked, diverging) | {"seconds": seconds, "gradients": None}


def run(fit, density, sampler, start, draws, warmup, seed):
    """One run: what it found, what it cost."""
    counted = Counted(density.graph)
    density, begun = dataclasses.replace(density, graph=counted), time.perf_counter()
    if (sampler, start) == ("pyro", "cold"):
        points, diverging = pyro_cold(density, draws, warmup, seed)
    else:
        options = NUTSOptions(CHAINS, draws, warmup, ACCEPT, progress=False)
        points, diverging = ENGINES[sampler](density, options, seed)
    seconds = time.perf_counter() - begun
    return told(fit, density.values(points), diverging) | {"seconds": seconds, "gradients": counted.count}


def medians(rows):
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def gradients(fit, density, traced, compiled, rounds=25, calls=40):
    """Milliseconds of a log density with its gradient, each way in turns; how much faster than Pyro's."""
    call = fit.setup.problem.call
    init, potential, _, _ = initialize_model(fit.model, model_args=call.args, model_kwargs=call.kwargs)
    z = density.start(0)
    ways = {
        "Pyro's potential": lambda: potential_grad(potential, init),
        "the model, eagerly": lambda: density.gradient(z),
        "traced graph": lambda: traced.gradient(z),
        "compiled graph": lambda: compiled.gradient(z),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            for _ in range(calls):
                way()
            times[name].append(1e3 * (time.perf_counter() - begun) / calls)
    theirs = times["Pyro's potential"]
    return [
        {
            "density": name,
            "ms": statistics.median(own),
            "times": statistics.median(b / a for a, b in zip(own, theirs, strict=True)),
        }
        for name, own in times.items()
    ]


def enough(rows, start, sampler, ess):
    """The smallest warm-up that does what the longest cold one did."""
    good = [
        row["warmup"]
        for row in rows
        if (row["sampler"], row["start"]) == (sampler, start)
        and row["ess"] >= 0.9 * ess
        and row["r_hat"] < 1.01
    ]
    return min(good, default=None)


def warmups(workload, fit, densities, options):
    """A row for each sampler, start and length of warm-up."""
    rows = []
    for warmup in options.warmups:
        for sampler in options.samplers:
            for start, density in densities.items():
                runs = [
                    run(fit, density, sampler, start, options.draws, warmup, n) for n in range(options.seeds)
                ]
                key = {"workload": workload, "sampler": sampler, "start": start, "warmup": warmup}
                rows.append(key | medians(runs))
                say(", ".join(text(rows[-1][name]) for name in COLUMNS))
    return rows


def whole_runs(fit, density, densities, needed, options):
    """Seconds and ESS a second, compiling included."""
    begun = time.perf_counter()
    density.captured(True)
    compiling = time.perf_counter() - begun
    rows = {}
    if options.alone:
        warmup = needed["pyro", "cold"]
        rows["Pyro alone, cold"] = [{"warmup": warmup, **pyro_alone(fit, options.draws, warmup)}]
    for seed in range(options.seeds):
        for (sampler, start), warmup in needed.items():
            row = run(fit, densities[start], sampler, start, options.draws, warmup, seed)
            row |= {"warmup": warmup, "seconds": row["seconds"] + compiling}
            rows.setdefault(f"{sampler}, captured, {start}", []).append(row)
        for sampler in options.samplers:
            settings, begun = NUTSOptions(progress=False), time.perf_counter()
            chains, diverging, _ = sample(fit, sampler, settings, seed)
            row = {"warmup": settings.warmup_steps, "seconds": time.perf_counter() - begun}
            rows.setdefault(f"compare_nuts(sampler={sampler!r})", []).append(
                row | told(fit, chains, diverging)
            )
    found = []
    for name, own in rows.items():
        for row in own:
            row["ess_per_second"] = row["ess"] / row["seconds"]
        found.append({"run": name, **medians([{key: row[key] for key in RUN[1:-1]} for row in own])})
        ratios = [row["ess_per_second"] / next(iter(rows.values()))[0]["ess_per_second"] for row in own]
        found[-1]["times"] = statistics.median(ratios)
    return found


def compare(workload, options):
    fit, longest = fitted(workload), max(options.warmups)
    with isolated(torch.float64, threads=1):
        density = Density.of(fit)
        densities = {"warm": density.captured(True), "cold": cold(density).captured(True)}
        rows = warmups(workload, fit, densities, options)
        needed = {}
        for sampler in options.samplers:
            at = {(row["start"], row["warmup"]): row for row in rows if row["sampler"] == sampler}
            for start in densities:
                least = enough(rows, start, sampler, at["cold", longest]["ess"])
                needed[sampler, start] = least or longest
                if least is None:
                    say(f"{sampler}, {start}: not even with {longest} steps of warm-up")
        speed = gradients(fit, density, density.captured(False), densities["warm"])
        return rows, needed, speed, whole_runs(fit, density, densities, needed, options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--draws", type=int, default=1000, help="of each of four chains")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmups", type=int, nargs="*", default=(25, 50, 100, 200, 400))
    parser.add_argument("--samplers", nargs="*", default=("pyro", "nutpie"), choices=sorted(ENGINES))
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="without Pyro's own potential")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for workload in options.workloads:
        rows, needed, speed, whole = compare(workload, options)
        say(f"\n{workload}\n\n" + write(shown(rows), [], f"nuts_{workload}", COLUMNS))
        for sampler in options.samplers:
            warm, other = needed[sampler, "warm"], needed[sampler, "cold"]
            say(f"\n{sampler}: warm-up needed, warm {warm}, cold {other}, ratio {warm / other:.2f}")
        say("\n" + write(speed, [], f"nuts_{workload}_gradient", ("density", "ms", "times")))
        say("\n" + write(shown(whole), [], f"nuts_{workload}_runs", RUN))


def shown(rows):
    return [row | {"ess": f"{row['ess']:.0f}", "r_hat": f"{row['r_hat']:.4f}"} for row in rows]


if __name__ == "__main__":
    main()
