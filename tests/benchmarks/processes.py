"""One fit by 1, 2 and 4 processes, and one that loses a worker on the way.

Run by ``make bench-scale``. The script of each process is tutorials/groups.py; a line of it is printed
for each number of processes, with seconds of the fit and the largest peak memory of a process.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tutorials" / "groups.py"


def launched(
    count: int, num_groups: int, folder: str, restarts: int = 0, script: Path = SCRIPT
) -> "subprocess.Popen[str]":
    """torchrun with some processes on this machine."""
    # torch 2.5 and later share the launcher's store with the workers, where a restart finds the addresses
    # of processes that are gone (pytorch issue 135712).
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
            "--max-restarts", str(restarts), str(script), str(num_groups), folder,
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_worker(launcher: int, rank: int) -> None:
    """End one worker at once, as a machine that fails would."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def interrupted(count: int, num_groups: int, folder: str) -> str:
    """What is printed if the last worker is killed once a checkpoint is there, and all are restarted."""
    run = launched(count, num_groups, folder, restarts=1)
    while not (Path(folder) / "groups.checkpoint").exists() and run.poll() is None:
        time.sleep(0.005)
    kill_worker(run.pid, count - 1)
    return run.communicate(timeout=600)[0].strip()


def main(num_groups: int = 20_000) -> None:
    """Print the table."""
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(launched(count, num_groups, folder).communicate(timeout=600)[0])
            sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(interrupted(2, num_groups, folder) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
