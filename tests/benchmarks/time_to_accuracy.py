"""Seconds to the best diagonal Gaussian: fit_vem beside NumPyro, PyMC and Pyro, each in fresh processes.

Target: over all scalar latents the root mean square of (m - m*)/s* and that of log s - log s* are both at
most 0.05, where m*, s* are the unconstrained means and sds of the optimum of this family. A root mean
square is the generous reading: --worst holds every latent to it. The optimum is fit_vem's at
tol 1e-10, held against L-BFGS on bounds written by hand (`exact`); the gap is printed. The horseshoe has
several optima: there the target is a bound, by hand, within 0.1 nat of the best found.

Both calls of a process must meet the target. A peer has the best of a small grid, tried in order of cost
until one setting does; the search itself costs it nothing. It ends after three budgets, and a peer that
is not there yet is "not reached", shown with the attempt that came closest. The winner is repeated,
in turn with fit_vem, and medians are shown. Imports are reported apart. Each package threads as it
likes (XLA takes all cores); PyMC starts without its cache of C code. Pyro's own SVI, a Python loop, runs
on the small models only. sklearn and statsmodels answer slightly other questions (mode, REML, other
priors): they are context, without a target.

Peers run in the interpreter PEERS_PYTHON (default: this one). Run by ``make bench-peers``.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import data as workloads
import exact
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "build" / "bench"
TARGET, NATS = 0.05, 0.1
ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | os.environ
CONFIRM = 2_500  # latents up to which L-BFGS on the bound by hand is tried
SMALL = 100  # latents up to which a Python loop is tried

RATES = (0.05, 0.1, 0.01)
GRIDS = {
    "pyro_svi": [{"lr": lr, "steps": n} for n in (1000, 5000, 20000) for lr in RATES],
    "numpyro_svi": [{"lr": lr, "steps": n} for n in (1000, 2000, 5000, 10000, 20000) for lr in RATES],
    "numpyro_scan": [{"lr": lr, "steps": n} for n in (1000, 2000, 5000, 10000, 20000) for lr in RATES],
    "pymc_advi": [{"steps": n} | o for n in (5000, 10000, 30000) for o in ({}, {"lr": 0.05}, {"lr": 0.01})],
    "pymc_dadvi": [{"draws": n} for n in (30, 1000, 4000)],  # by its default optimiser, trust-ncg
    "pymc_dadvi_lbfgs": [{"draws": n} for n in (30, 1000, 4000)],
}
CONTEXT = {
    "sklearn_ridge": ("logistic",),
    "statsmodels_mixed": ("radon", "hierarchical_logistic", "poisson_glmm"),
}
CONTEXT_BUDGET = 30
COLUMNS = (
    "workload", "method", "setting", "outcome", "first_seconds", "first_ratio", "second_seconds",
    "second_ratio", "import_seconds", "mean_error", "log_sd_error", "worst_error", "nats_below", "peak_mb",
)  # fmt: skip
COLOURS = dict(
    zip(["fit_vem", *GRIDS, *CONTEXT], ["C3", "C1", "C0", "C9", "C2", "C4", "C6", "0.5", "0.5"], strict=True)
)


def run(method, workload, setting, budget):
    """What the process printed and its moments by call; or what went wrong."""
    python = (
        sys.executable
        if method in ("fit_vem", "pyro_svi")
        else os.environ.get("PEERS_PYTHON", sys.executable)
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "moments.npz"
        command = [python, HERE / "methods.py", method, workload, json.dumps(setting), "--out", file]
        # PyTensor keeps compiled code on disk: with a folder of its own, a first call is one.
        environment = ENVIRONMENT | {"PYTENSOR_FLAGS": f"base_compiledir={folder}"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=budget, env=environment)
        except subprocess.TimeoutExpired:
            return {"failed": f"over {budget:g} s"}, []
        if done.returncode:
            return {"failed": (done.stderr.strip() or "killed").splitlines()[-1]}, []
        stored = np.load(file)
        calls = []
        for number in "01":
            sites = {name.split(".")[1] for name in stored if name.startswith(number)}
            calls.append({s: (stored[f"{number}.{s}.0"], stored[f"{number}.{s}.1"]) for s in sites})
        return json.loads(done.stdout), calls


class Judge:
    """Holds moments against the optimum of a workload, on average or for each latent."""

    def __init__(self, workload, is_strict):
        self.is_strict = is_strict
        model, arrays, sizes = workloads.load(workload)
        self.model, self.data = model, arrays | sizes
        told, calls = run("fit_vem", workload, {"tol": 1e-10}, 1200)
        if "failed" in told:
            raise RuntimeError(f"no optimum of {workload}: {told['failed']}")
        self.best = calls[0]
        self.elbo = exact.bound(model, self.data, self.best)
        self.latents = sum(m.size for m, _ in self.best.values())
        say(f"\n{workload}: {self.latents} latents, bound {self.elbo:.6f}, by fit_vem {told['elbo']:.6f}")
        if self.latents <= CONFIRM:
            self._confirm()

    def _confirm(self):
        shapes = {site: m.shape for site, (m, _) in self.best.items()}
        starts = 3 if self.latents <= 500 else 1
        elbo, moments = exact.maximise(self.model, self.data, shapes, starts)
        off = ", ".join(f"{e:.1e}" for e in self.errors(moments))
        say(f"  best of L-BFGS by hand: bound {elbo:.6f}, gap {elbo - self.elbo:.1e} nat, errors {off}")
        if self.model == "horseshoe" and elbo > self.elbo:
            self.best, self.elbo = moments, elbo

    def errors(self, moments):
        """Root mean squares of the standardised means and of the log sds, and the largest of all."""
        pairs = [(*(np.ravel(p) for p in moments[s]), *map(np.ravel, self.best[s])) for s in self.best]
        m, s, best_m, best_s = (np.concatenate(part) for part in zip(*pairs, strict=True))
        by_mean, by_sd = (m - best_m) / best_s, np.log(s / best_s)
        return rms(by_mean), rms(by_sd), float(max(np.abs(by_mean).max(), np.abs(by_sd).max()))

    def verdict(self, calls):
        """The worse of two calls: errors, nats below the optimum, and whether the target is met."""
        mean, log_sd, worst = (max(e) for e in zip(*(self.errors(c) for c in calls), strict=True))
        below = max(self.elbo - exact.bound(self.model, self.data, c) for c in calls)
        error = worst if self.is_strict else max(mean, log_sd)
        is_met = below <= NATS if self.model == "horseshoe" else error <= TARGET
        found = {"mean_error": mean, "log_sd_error": log_sd, "worst_error": worst, "nats_below": below}
        return found, is_met


def measure(method, grid, workload, judge, budget, repeats):
    """The row of a method: its first setting that meets the target, repeated, or the closest attempt."""
    begin, closest = time.perf_counter(), None
    for setting in grid:
        if time.perf_counter() - begin > 3 * budget:
            break
        told, calls = run(method, workload, setting, budget)
        row = {"workload": workload, "method": method, "setting": shown(setting), **told}
        if "failed" in told:
            say(f"  {method} {row['setting']}: {told['failed']}")
            closest = closest or row | {"outcome": f"not reached: {told['failed']}"}
            if told["failed"].startswith("over"):  # what follows costs as much or more
                break
            continue
        verdict, is_met = judge.verdict(calls)
        row |= verdict
        if is_met:
            return row | repeated(told, method, workload, setting, budget, repeats) | {"outcome": "reached"}
        if closest is None or distance(row) < distance(closest):
            closest = row | {"outcome": "not reached"}
    return closest


def repeated(told, method, workload, setting, budget, repeats):
    """Medians of a run and some more of it, and their ratios to runs of fit_vem after each of them.

    What else the machine does comes and goes within minutes, so that earlier runs are no pairs. The
    ratios of fit_vem itself say how far runs differ.
    """
    theirs, ours = [told], [run("fit_vem", workload, {}, budget)[0]]
    for _ in range(repeats - 1):
        theirs.append(run(method, workload, setting, budget)[0])
        ours.append(run("fit_vem", workload, {}, budget)[0])
    found = {}
    for name in ("import_seconds", "first_seconds", "second_seconds"):
        found[name], fit = (statistics.median(t[name] for t in runs if name in t) for runs in (theirs, ours))
        found[name.replace("seconds", "ratio")] = found[name] / fit
    return found


def distance(row):
    return np.nan_to_num(max(row.get("mean_error", np.inf), row.get("log_sd_error", np.inf)), nan=np.inf)


def context(workload, model, methods):
    for method, models in CONTEXT.items():
        if model in models and method in methods:
            told, _ = run(method, workload, {}, CONTEXT_BUDGET)
            yield {"workload": workload, "method": method, "outcome": told.get("failed", "context"), **told}


def compare(workload, options):
    """All rows of a workload, fit_vem first."""
    judge = Judge(workload, options.worst)
    rows = []
    for method, grid in {"fit_vem": [{}], **GRIDS}.items():
        if method in options.methods and (method != "pyro_svi" or judge.latents <= SMALL):
            known = [row["setting"] for row in rows if row["method"].startswith("numpyro")]
            if known and method.startswith("numpyro"):  # the same steps: what did well there goes first
                grid = sorted(grid, key=lambda setting: shown(setting) not in known)
            rows.append(measure(method, grid, workload, judge, options.budget, options.repeats))
            say("  " + "  ".join(f"{c} {text(rows[-1][c])}" for c in COLUMNS[1:] if c in rows[-1]))
    return rows + list(context(workload, judge.model, options.methods))


def about(peers):
    """The machine, and the packages of both interpreters."""
    cpu = next(
        (line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    lines = [f"{os.cpu_count()} cores, {cpu}; OMP_NUM_THREADS={ENVIRONMENT['OMP_NUM_THREADS']}"]
    for python in dict.fromkeys([sys.executable, peers]):
        found = subprocess.run(
            [python, HERE / "methods.py", "versions"], capture_output=True, text=True, check=True
        )
        lines.append(", ".join(f"{name} {version}" for name, version in json.loads(found.stdout).items()))
    return lines


def cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(rows, lines, name="time_to_accuracy", columns=COLUMNS):
    """The same table as CSV and Markdown."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / f"{name}.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    body = [columns, ["---"] * len(columns), *([text(row.get(c, "")) for c in columns] for row in rows)]
    markdown = "\n".join("| " + " | ".join(cells) + " |" for cells in body)
    (OUT / f"{name}.md").write_text(markdown + "\n\n" + "\n\n".join(lines) + "\n")
    return markdown


def plot(rows, lines):
    """A line of points for each pair: first call full, second call hollow, grey crosses where not reached."""
    positions, labels, y = [], [], 0.0
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.27 * (len(rows) + len({r["workload"] for r in rows}))))
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1]["workload"] != row["workload"]:
            y += 1.0
            axes.text(
                0.0,
                y,
                f" {row['workload']}",
                transform=axes.get_yaxis_transform(),
                weight="bold",
                va="center",
            )
        y += 1.0
        positions.append(y)
        labels.append(row["method"] + (" (context)" if row["method"] in CONTEXT else ""))
        if "first_seconds" not in row:
            axes.text(
                0.5, y, row["outcome"], transform=axes.get_yaxis_transform(), color="0.5", va="center", size=8
            )
            continue
        x = [row["first_seconds"], row["second_seconds"]]
        is_missed = row["outcome"].startswith("not")
        colour = "0.6" if is_missed else COLOURS[row["method"]]
        axes.plot(x, [y, y], color=colour, linewidth=1)
        axes.plot(x[:1], [y], "x" if is_missed else "o", color=colour)
        axes.plot(x[1:], [y], "x" if is_missed else "o", color=colour, markerfacecolor="white")
    axes.set(xscale="log", xlabel="seconds to the target (log scale)", yticks=positions, yticklabels=labels)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(y + 0.8, 0.2)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("full: first call; hollow: second call; grey cross: target not reached", size=10)
    figure.text(0.01, 0.005, lines[0], size=7, color="0.4")
    figure.tight_layout()
    figure.savefig(OUT / "time_to_accuracy.png", dpi=130)
    plt.close(figure)


def rms(x):
    return float(np.sqrt(np.mean(x**2)))


def shown(setting):
    return (
        " ".join(f"{k}={v:g}" if isinstance(v, int | float) else v for k, v in setting.items()) or "default"
    )


def text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def say(line):
    print(line, flush=True)  # noqa: T201


def arguments():
    names: Iterable[str] = ("fit_vem", *GRIDS, *CONTEXT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workloads", nargs="+", choices=workloads.WORKLOADS, default=list(workloads.WORKLOADS)
    )
    parser.add_argument(
        "--methods", nargs="+", choices=names, default=list(names), help="fit_vem always runs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a process")
    parser.add_argument("--worst", action="store_true", help="hold every latent to the target")
    parser.add_argument("--quick", action="store_true", help="two models, no repeats")
    options = parser.parse_args()
    options.methods = ["fit_vem", *options.methods]
    if options.quick:
        options.workloads, options.repeats = list(workloads.WORKLOADS)[:3], 1
    return options


def main():
    options = arguments()
    lines = about(os.environ.get("PEERS_PYTHON", sys.executable))
    say("\n".join(lines))
    rows = []
    for workload in options.workloads:
        rows += compare(workload, options)
        table = write(rows, lines)
        plot(rows, lines)
    say("\n" + table)


if __name__ == "__main__":
    main()
