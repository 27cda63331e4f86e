"""`calibrate`: simulation-based calibration of a whole fit."""

import multiprocessing
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from ..fit.driver import fit_vem
from ..fit.status import Status
from ..model.data import Arguments
from ..model.device import on_device
from ..model.runtime import isolated
from .calibration_plot import FAILED, Calibration, Counts
from .simulate import Simulator, Task, replaced


def calibrate(
    model: Callable[..., Any],
    data: Any = None,
    *,
    num_simulations: int = 200,
    num_draws: int = 99,
    guide: Any = None,
    correction: Literal["linear_response", "psis"] | None = None,
    params: Mapping[str, Any] | None = None,
    num_workers: int = 1,
    seed: int = 0,
    progress: bool | None = None,
    **fit_options: Any,
) -> Calibration:
    """Simulation-based calibration: does the fit find what its data were simulated from?

    Each simulation draws the latents from their prior and data from the likelihood, fits the data
    and ranks the true values among draws from the fit. If the fit is the posterior, ranks are
    uniform. This tests model, guide and optimiser together, on data that the model itself makes.

    Parameters theta have no prior: data are simulated at one value of them, and every fit
    estimates them anew. Ranks of the latents then show the fit as it is used, and are uniform only
    so far as theta is estimated precisely. MAP sites are drawn from their prior and not ranked.

    Args:
        model: a Pyro model, decorated with `vem_model` or not.
        data: as for `fit_vem`, observed values included: they are replaced by simulated ones. Each
            must be an argument, a view of one (a column, ``y[t]``), or equal to one in value.
        num_simulations: fits. Of one scalar, 200 find draws with 0.7 of the right sd, or means off by
            0.4 sd, nine times of ten; 1,000 find 0.8 and 0.3 always.
        num_draws: draws of each fit; ranks are 0 to num_draws.
        guide: as for `fit_vem`.
        correction: of the draws, as for ``fit.sample``.
        params: values by name at which parameters are held when data are simulated; by default the
            estimates from a fit to ``data``. A latent without a proper prior can be held here too.
        num_workers: processes; each takes seconds to start, so they pay for slow fits. Results are
            the same for any number. A script needs ``if __name__ == "__main__":``.
        seed: of everything.
        progress: a bar on standard error; None shows it in a terminal only.
        fit_options: passed on to `fit_vem`.

    Returns:
        A `Calibration`.

    Raises:
        ModelError: where data cannot be simulated: an improper prior, a `pyro.factor`, a scaled
            site, an observed value that is no argument; the message names the site.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian inference
        algorithms with simulation-based calibration, arXiv:1804.06788. Säilynoja, Bürkner and
        Vehtari (2022), Statistics and Computing 32.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> calibrate(model, {"y": torch.tensor(0.0)}, num_simulations=20, progress=False)
        CALIBRATED. True values rank among the draws as they should, ...
        20 simulations, 99 draws each, 0 failed, ...
           p_value  inside  shift  spread hint
        z ...
    """
    from tqdm import tqdm

    if min(num_simulations, num_draws, num_workers) < 1:
        raise ValueError("num_simulations, num_draws and num_workers must be at least 1")
    begin = time.perf_counter()
    first = fit_vem(model, data, guide=guide, seed=seed, progress=False, **fit_options)
    with suppress(ModelError):  # of these data; a correction that is unknown is raised
        first.sample(1, seed, correction)
    with on_device(first.device):
        simulator = Simulator.of(first, params or {}, seed)
    refit = _Refit(model, guide, simulator.call, num_draws, correction, first.device, fit_options)
    tasks = (simulator.task(index) for index in range(num_simulations))
    outcomes = map(refit, tasks) if num_workers == 1 else _in_processes(refit, tasks, num_workers)
    disable = None if progress is None else not progress
    bar = tqdm(outcomes, "calibrate", num_simulations, unit=" fits", disable=disable)
    with on_device(first.device):
        done = sorted(bar, key=lambda outcome: outcome.index)
        names, kept = simulator.scalars()
    missing = np.full(len(kept), FAILED)
    ranks = np.stack([missing if outcome.failure else outcome.ranks for outcome in done])[:, kept]
    failures = {outcome.index: outcome.failure for outcome in done if outcome.failure}
    warned = Counter(text for outcome in done for text in outcome.warned)
    notes = [*simulator.notes, *(f"{count} fits warned: {text}" for text, count in warned.most_common(3))]
    columns = dict(zip(names, ranks.T.copy(), strict=True))
    return Calibration.of(columns, num_draws, failures, notes, time.perf_counter() - begin)


@dataclass(frozen=True)
class _Outcome:
    """Ranks of every scalar, or why there are none."""

    index: int
    ranks: Counts
    failure: str
    warned: tuple[str, ...]


@dataclass(frozen=True)
class _Refit:
    """Fits a simulated data set and ranks its true values; what a worker process is sent."""

    model: Callable[..., Any]
    guide: Any
    call: Arguments
    num_draws: int
    correction: Literal["linear_response", "psis"] | None
    device: torch.device
    options: Mapping[str, Any]

    def __call__(self, task: Task) -> _Outcome:
        ranks, failure = np.zeros(0, dtype=np.int64), task.failure
        # One thread, as in a worker: sums in another order would be other numbers.
        with (
            isolated(torch.float64, threads=1, device=self.device),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            if not failure:
                try:
                    ranks, failure = self._ranked(task)
                except Exception as error:  # counted and shown
                    failure = f"{type(error).__name__}: {error}"
        return _Outcome(task.index, ranks, failure, tuple(sorted({str(entry.message) for entry in caught})))

    def _ranked(self, task: Task) -> tuple[Counts, str]:
        call = replaced(self.call, task.values)
        fit = fit_vem(
            self.model, call.args or call.kwargs, guide=self.guide, seed=task.seeds[0], progress=False,
            **self.options,
        )  # fmt: skip
        if fit.status is Status.interrupted:  # Ctrl-C ends everything, not one fit of many
            raise KeyboardInterrupt
        draws = fit.sample(self.num_draws, task.seeds[1], self.correction)
        ranks = [_ranks(draws[name], true, task.seeds[1]) for name, true in task.truth.items()]
        return np.concatenate(ranks), "" if fit.converged else f"{fit.status.name}: {fit.status.value}"


def _ranks(draws: Tensor, true: Tensor, seed: int) -> Counts:
    """Draws below each true value; ties (of values that have underflowed) are broken at random."""
    below, ties = (relation(draws, true).sum(0).reshape(-1).numpy() for relation in (torch.lt, torch.eq))
    return below + np.random.default_rng(seed).integers(0, ties + 1)


_refit: _Refit  # of a worker process


def _start(packed: bytes) -> None:
    global _refit
    torch.set_num_threads(1)
    _refit = pickle.loads(packed)


def _work(packed: bytes) -> _Outcome:
    return _refit(pickle.loads(packed))


def _in_processes(refit: _Refit, tasks: Iterator[Task], num_workers: int) -> Iterator[_Outcome]:
    """Outcomes as they come, a few data sets ahead.

    Processes are spawned: a fork would inherit locks of threads that it does not have. Tensors go
    as bytes: torch's own way keeps a file open for each.
    """
    context = multiprocessing.get_context("spawn")
    waiting: set[Future[_Outcome]] = set()
    with ProcessPoolExecutor(num_workers, context, _start, (_packed(refit),)) as pool:
        try:
            for task in tasks:
                waiting.add(pool.submit(_work, pickle.dumps(task)))
                if len(waiting) >= 2 * num_workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died: a script must call calibrate under if __name__ == '__main__':, "
                "and each worker needs the memory of a fit; or use num_workers=1"
            ) from error


def _packed(refit: _Refit) -> bytes:
    # cloudpickle, where it is installed, takes functions of notebooks and closures too.
    pickler = import_module("cloudpickle" if find_spec("cloudpickle") else "pickle")
    try:
        packed: bytes = pickler.dumps(refit)
    except Exception as error:
        raise ModelError(
            f"the model cannot be sent to other processes ({error}): define it in a module, install "
            "cloudpickle, or use num_workers=1"
        ) from error
    return packed
