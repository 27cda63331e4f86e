"""How seconds, evaluations and memory of fit_vem grow with the latents: Poisson GLMMs of five rows a group.

Each size runs in a fresh process, whose peak memory includes torch itself. Run by ``make bench``.
"""

import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from time_to_accuracy import HERE, OUT, about, say, write

SIZES = (2_000, 20_000, 200_000)
COLUMNS = ("groups", "rows", "status", "seconds", "evaluations", "products", "peak_mb", "elbo")


def fit(groups):
    command = [sys.executable, HERE / "methods.py", "fit_vem", f"poisson_glmm_{groups}", "--calls", "1"]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {"groups": groups, "rows": 5 * groups, "seconds": told["first_seconds"], **told}


def plot(rows):
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    x = [row["groups"] for row in rows]
    panels[0].plot(x, [row["seconds"] for row in rows], "o-", color="C3", label="fit_vem")
    panels[0].plot(x, [rows[0]["seconds"] * n / x[0] for n in x], ":", color="0.5", label="linear")
    panels[1].plot(x, [row["evaluations"] for row in rows], "o-", color="C0", label="gradients")
    panels[1].plot(x, [row["products"] for row in rows], "s-", color="C2", label="Hessian products")
    panels[2].plot(x, [row["peak_mb"] for row in rows], "o-", color="C3", label="process, torch included")
    for panel, title in zip(panels, ("seconds, first call", "evaluations", "peak memory, MB"), strict=True):
        panel.set(xscale="log", title=title, xlabel="groups")
        if title == "evaluations":  # no products beyond the size where Newton gives way to L-BFGS
            panel.set_ylim(bottom=0)
        else:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.savefig(OUT / "scaling.png", dpi=130)


def main():
    rows = [fit(groups) for groups in SIZES]
    say(write(rows, about(os.environ.get("PEERS_PYTHON", sys.executable)), "scaling", COLUMNS))
    plot(rows)


if __name__ == "__main__":
    main()
