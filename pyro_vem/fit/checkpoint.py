"""A file from which an interrupted fit goes on."""

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bound.tables import ElboTerms
from ..errors import ModelError
from ..model.data import Arguments
from .exactness import values_of
from .processes import Processes
from .result import VEMResult
from .setup import Setup
from .state import State
from .status import Status, Step

SHARE = 0.05  # of a fit's time that writing may take
MARK = "checkpoint of data"  # in the notes; several processes leave none, which share data out anew


@dataclass
class Checkpoint:
    """Written between rounds, and removed when the fit has ended by itself.

    The first round is written; later ones as often as writing takes a twentieth of the time. Several
    processes write one file, of all rows, which any number of processes can go on from.

    Attributes:
        path: of the file; None for none.
        left: what an interrupted fit has left there.
        processes: that share the fit.
        mark: of the data, in the notes of the file.
        cost, written: seconds that the last writing took, and when it was.
    """

    path: Path | None = None
    left: VEMResult | None = None
    processes: Processes = field(default_factory=Processes)
    mark: str = ""
    cost: float = 0.0
    written: float = 0.0

    @classmethod
    def at(cls, path: str | Path | None, model: Callable[..., Any], processes: Processes) -> "Checkpoint":
        """The checkpoint at a path, with what is there already.

        Raises:
            ModelError: if the file is no checkpoint, if there is no such folder, or if processes were
                given different paths.
        """
        if len(set(processes.gathered(str(path)))) > 1:
            raise ModelError(
                "checkpoint= differs between processes: give all of them one path; the first writes"
            )
        if path is None:
            return cls()
        path = Path(path)
        if not path.parent.is_dir():
            raise ModelError(f"checkpoint={str(path)!r}: there is no folder {path.parent}")
        left = VEMResult.load(path, model) if processes.rank == 0 and path.exists() else None
        return cls(path, processes.gathered(left)[0], processes)

    def check(self, shapes: Mapping[str, tuple[int, ...]], call: Arguments) -> None:
        """Look whether what is there belongs to this fit.

        Args:
            shapes: of all parameters, by name.
            call: data of the fit, or its first batch.

        Raises:
            ModelError: if it is of another model, guide or data.
        """
        if self.path is None:
            return
        # Shares of the data may be cut anew, for another number of processes.
        self.mark = f"{MARK} {_fingerprint(call):08x}" if self.processes.count == 1 else ""
        if self.left is None:
            return
        known = {n: tuple(v.shape) for n, v in {**self.left.guide_params, **self.left.params}.items()}
        for name in sorted({*known, *shapes}):
            if known.get(name) != shapes.get(name):
                raise self._other(f"its {name!r} has shape {known.get(name)}, here {shapes.get(name)}")
        known_marks = [note for note in self.left.plan.notes if note.startswith(MARK)]
        if self.mark and known_marks and self.mark not in known_marks:
            raise self._other("its data are not these")

    def _other(self, why: str) -> ModelError:
        return ModelError(f"checkpoint {self.path} is of another fit: {why}; remove it, or name another file")

    def save(self, make: Callable[[], VEMResult], is_last: bool = False) -> None:
        """Write what `make` gives, which takes part in every process, if it is time to."""
        start = time.perf_counter()
        is_due = is_last or (self.processes.rank == 0 and start - self.written > self.cost / SHARE)
        if self.path is None or not self.processes.any(is_due):
            return
        made = make()
        if self.processes.rank == 0:
            notes = (self.mark,) if self.mark else ()
            replace(made, plan=made.plan.with_notes(*notes)).save(self.path)
        self.written = time.perf_counter()
        self.cost = self.written - start

    def remove(self) -> None:
        """After the fit, in all processes."""
        if self.path is not None:
            if self.processes.rank == 0:
                self.path.unlink(missing_ok=True)
            self.processes.any(False)  # wait: the next fit must not find it


def _fingerprint(call: Arguments) -> int:
    found = 0
    for value in call.named.values():
        if isinstance(value, Tensor):
            found = zlib.crc32(value.detach().contiguous().numpy().data, found)
    return found


def snapshot(setup: Setup, state: State, history: tuple[Step, ...], n_iter: int, seconds: float) -> VEMResult:
    """A fit on its way, of the rows of all processes; its bound is what the steps have."""
    phi, theta = values_of(setup, state.phi, state.theta)
    return VEMResult(
        theta, setup.processes.joined(phi), state.elbo, 0.0, Status.interrupted, n_iter, history, seconds,
        setup.objective.shown_plan, ElboTerms((), state.elbo, 0.0), setup.objective.seed, setup,
    )  # fmt: skip
