"""Seconds that ``import pyro_vem`` costs beyond ``import pyro``, in fresh processes; in ``make bench``."""

import os
import statistics
import subprocess
import sys
import tempfile

REPEATS = 15
TIMED = "import pyro, time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str, cache: str) -> list[float]:
    """Of fresh imports after pyro's; the first, which compiles to bytecode, is left out."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    command = [sys.executable, "-c", TIMED.format(module)]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(REPEATS + 1)
    ]
    return sorted(float(run.stdout) for run in runs[1:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        for module in ("pyro_vem", "scipy.optimize"):
            found = seconds(module, cache)
            spread = f"{found[0]:.2f} to {found[-1]:.2f}"
            sys.stdout.write(f"import {module} after pyro: {statistics.median(found):.2f} s ({spread})\n")
