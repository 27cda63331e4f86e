"""A file from which an interrupted fit goes on."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bound.tables import ElboTerms
from ..errors import ModelError
from ..model.parameters import Parameter
from .processes import Processes
from .result import VEMResult
from .setup import Setup
from .state import State
from .status import Status, Step

SHARE = 0.05  # of a fit's time that writing may take


@dataclass
class Checkpoint:
    """Written between rounds, and removed when the fit ends by itself.

    The first round is written; later ones as often as writing takes a twentieth of the time. Several
    processes write one file, of all rows, which any number of processes can go on from.

    Attributes:
        path: of the file; None for none.
    """

    path: Path | None = None
    cost: float = 0.0
    written: float = 0.0

    def found(self, model: Callable[..., Any]) -> VEMResult | None:
        """What an interrupted fit has left, if anything.

        Raises:
            ModelError: if the file is no checkpoint.
        """
        if self.path is None or not self.path.exists():
            return None
        return VEMResult.load(self.path, model)

    def save(self, make: Callable[[], VEMResult], processes: Processes) -> None:
        """Write what `make` gives, which takes part in every process, if it is time to."""
        start = time.perf_counter()
        is_due = processes.rank == 0 and start - self.written > self.cost / SHARE
        if self.path is None or not processes.any(is_due):
            return
        made = make()
        if processes.rank == 0:
            made.save(self.path)
        self.written = time.perf_counter()
        self.cost = self.written - start

    def remove(self, processes: Processes) -> None:
        """After the fit."""
        if self.path is not None and processes.rank == 0:
            self.path.unlink(missing_ok=True)


def snapshot(setup: Setup, state: State, history: tuple[Step, ...], n_iter: int, seconds: float) -> VEMResult:
    """A fit on its way, of the rows of all processes; its bound is what the steps have."""
    phi = setup.processes.joined(setup.phi.constrained(torch.from_numpy(state.phi)))
    theta = setup.theta_values(torch.from_numpy(state.theta))
    return VEMResult(
        theta, phi, state.elbo, 0.0, Status.interrupted, n_iter, history, seconds,
        setup.objective.shown_plan, ElboTerms((), state.elbo, 0.0), setup.objective.seed, setup,
    )  # fmt: skip


def check_same(path: Path, known: Mapping[str, Tensor], parameters: Iterable[Parameter]) -> None:
    """Raise `ModelError` for a checkpoint of another model or guide."""
    for parameter in parameters:
        if parameter.name not in known or known[parameter.name].shape != parameter.init.shape:
            raise ModelError(
                f"checkpoint {path} is of another fit: it has no {parameter.name!r} of shape "
                f"{tuple(parameter.init.shape)}; remove it, or name another file"
            )
