"""`fit_vem`: the only loop. EM, variational EM, plain VI and MAP are settings of it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from ..bound.elbo import AnalyticKL_ELBO
from ..errors import warn
from ..model.batches import are_batches
from ..model.data import named_values, shape_of
from ..model.device import as_outside, device_of
from ..model.roles import roles_of
from ..model.runtime import isolated, repeatable, reuse_memory
from ..model.sites import near_median
from .capture import Compile
from .checkpoint import Checkpoint
from .jumps import jumping
from .minibatch import fit_batches
from .options import FitOptions
from .processes import Processes
from .result import VEMResult
from .run import Callback, MStep, Run, StepMethod
from .schedule import Schedule, schedule_of
from .setup import Setup, set_up
from .starts import best_of
from .state import State
from .status import Status, Step
from .together import drawn_again, from_starts

PILOT_TOL, PILOT_ROUNDS = 1e-2, 100
SERIAL = 10_000_000  # numbers in the data below which a fit runs on one thread


def fit_vem(
    model: Callable[..., Any],
    data: Any = None,
    *,
    guide: Any = None,
    elbo: AnalyticKL_ELBO | None = None,
    schedule: Schedule = "auto",
    e_step: StepMethod = "auto",
    m_step: MStep = "auto",
    tol: float = 1e-8,
    max_iter: int = 1000,
    num_starts: int = 1,
    batch_size: int | None = None,
    validation: Any = None,
    init: Any = None,
    checkpoint: str | Path | None = None,
    compile: Compile = "auto",
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    options: FitOptions | None = None,
) -> VEMResult:
    """Fit a Pyro model by variational EM: no learning rate, no step count.

    The bound is made deterministic (closed-form KL terms where they are valid, fixed
    moment-matched draws elsewhere) and climbed by second-order steps: the E-step moves the
    guide's parameters phi only, the M-step the model's parameters theta only. A model without
    parameters is plain variational inference, one without latents maximum likelihood or MAP.
    Everything runs in float64; parameter store, random state, default dtype, validation flags
    and handlers of the caller are as before when it returns or raises.

    Args:
        model: a Pyro model, decorated with `vem_model` or not.
        data: mapping of the model's argument names to tensors, arrays, pandas objects or plain
            values, or a data frame; a tuple is taken as positional arguments. The fit runs on their device.
        guide: None for `MeanFieldNormal` (`MeanFieldConjugate` where the model has discrete sites);
            "auto" for conjugate factors where every term has a closed form in them, which the plan
            proves; an `AmortizedNormal`; or any reparameterised guide.
        elbo: an `AnalyticKL_ELBO`, to require or forbid closed-form KL terms.
        schedule: "alternate" (EM or CAVI), "accelerated" (with Anderson's extrapolation), "profile"
            (quasi-Newton steps in theta on the bound maximised over phi), "joint" (one Newton
            problem in phi and theta) or "auto": two rounds of EM, then what suits the model.
        e_step: optimiser of the E-step where it has no closed form: "newton" (trust region),
            "lbfgs", or "auto".
        m_step: optimiser of the M-step, likewise; or a mapping from names of parameters to
            functions ``(latents, params) -> value`` that give them their next value, from draws of
            the latents, shaped ``(draws, *site)``, and the present parameters. Nothing else moves these;
            a value that lowers the bound is not taken, and the history says so.
        tol: predicted remaining gain of the joint problem, in nats, at which the fit stops.
        max_iter: most E/M rounds.
        num_starts: fits from different starts, of which the best is returned; ``fit.starts`` says
            how far the others agree. Starts after the first one draw latents without a value in ``init``
            from the prior, or responsibilities of discrete sites at random; where there is neither (a
            guide of your own, a model of parameters only), parameters are moved by standard normals on
            their unconstrained scale.
        batch_size: rows of a minibatch, for data that are too many for full sweeps (a DataLoader or
            another iterable of mappings as data says it itself). Every array whose first dimension a
            plate follows is sliced, and that plate is scaled by rows / batch in model and guide.
            ``max_iter`` counts epochs then.
        validation: held-out rows, as the data, for a fit with encoders on batches: the rate falls where
            their bound stops rising, and the best state is returned.
        init: initial values on the constrained scale by site and parameter name, a Pyro init
            strategy, or an earlier result (warm start).
        checkpoint: a file that holds the fit so far, written between rounds; an interrupted fit goes on
            from it when it is called again, and it is removed when the fit has ended.
        compile: whether a bound that runs the model is traced once and compiled (by inductor, which
            needs a C++ compiler): True at once, False never, "auto" when a fit has taken as long
            as compiling does. The plan says what was done.
        callbacks: each is called as ``callback(step, params)`` after every step, with the row of
            history and the parameters so far; raising KeyboardInterrupt in one ends the fit
            with `Status.interrupted`.
        progress: a bar on standard error; None shows it in a terminal only.
        seed: of the fixed draws. The same seed gives the same history bit for bit on the CPU.
        options: rare settings, see `FitOptions`.

    Returns:
        A frozen `VEMResult`.

    Raises:
        ModelError: if model, guide and data do not fit together; the message names the site.
        UnsupportedModelError: for what cannot be fitted yet (discrete latents that are not summed
            out with ``infer={"enumerate": "parallel"}``, devices without float64).
        NonMonotoneError: if the bound fell within a step.

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM
        algorithm, JRSS B 39. Neal and Hinton (1998), A view of the EM algorithm that justifies
        incremental, sparse, and other variants.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> @vem.vem_model
        ... def model(y):
        ...     mu = pyro.param("mu", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(y)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor([1.0, 2.0, 6.0])}, progress=False)
        >>> fit.status.name, round(float(fit.params["mu"]), 3)
        ('converged', 3.0)
    """
    options = options or FitOptions()
    _check_settings(schedule, e_step, m_step, tol, max_iter, num_starts, elbo, compile)
    begin = time.perf_counter()
    saved = Checkpoint.at(checkpoint, model, Processes.of(options.sharded))
    warm = saved.left or (init if isinstance(init, VEMResult) else None)
    usual = _warm_strategy(init) if isinstance(init, VEMResult) else None
    given = (_warm_held(model, init) or usual) if isinstance(init, VEMResult) else init
    is_batched = batch_size is not None or _is_stream(data)
    _check_batched(is_batched, schedule, e_step, m_step, num_starts, validation)
    _check_options(options, is_batched, m_step, num_starts, checkpoint)
    device = _device(data, options)
    reuse_memory()
    threads = 1 if is_batched else _threads(data)
    # Trial points may lie anywhere: what overflows there is +inf, and is not stepped to.
    with isolated(torch.float64, seed, threads, device), np.errstate(over="ignore", invalid="ignore"):
        if is_batched:
            return fit_batches(
                model, data, guide, elbo, given, options, seed, batch_size, validation, max_iter, compile,
                lambda setup: climb(setup, options, begin, PILOT_TOL, PILOT_ROUNDS)[0], tuple(callbacks),
                progress, warm, saved,
            )  # fmt: skip

        def set_up_at(start: int) -> Setup:
            others = init_to_sample if start else usual
            with pyro.get_param_store().scope():  # or all would begin at the guide of the first
                return set_up(model, data, guide, elbo, given, options, seed + start, compile, others=others)

        setup = set_up_at(0)
        is_scattered = setup.lifted is not None and bool(setup.lifted.lifted.discrete)

        def begun(start: int) -> Run:
            here = setup if is_scattered or not start else set_up_at(start)
            methods = e_step, m_step
            run = Run(here, options, tol, methods, begin, tuple(callbacks), progress, checkpoint=saved)
            run.start(None if start else warm, start)
            return run

        found = from_starts(
            begun, lambda run: _finished(run, max_iter, schedule), num_starts, schedule, max_iter
        )
        best = best_of(found)
    if not any(fit.status is Status.interrupted for fit in found.values()):
        saved.remove()
    return replace(best, seconds=time.perf_counter() - begin)


def _finished(run: Run, max_iter: int, schedule: Schedule) -> VEMResult:
    """Rounds from where a run is to their end."""
    try:
        status = _alternate(run, max_iter, schedule)
    except KeyboardInterrupt:
        if run.setup.processes.count > 1:  # the others do not know
            raise
        status = Status.interrupted
        if run.few.is_on:
            run.few.end(is_told=False)
        run.save(is_last=True)
    finally:
        run.close()
    return run.result(status)


def _check_batched(
    is_batched: bool, schedule: Any, e_step: Any, m_step: Any, num_starts: int, validation: Any
) -> None:
    """Settings that batches do not take, and one that only they do."""
    if not is_batched:
        if validation is not None:
            raise ValueError("validation= is for fits on batches: give batch_size=, or a DataLoader as data")
        return
    ignored = {
        "schedule=": schedule != "auto",
        "e_step=": e_step != "auto",
        "m_step=": m_step != "auto",
        "num_starts=": num_starts != 1,
    }
    names = ", ".join(name for name, is_given in ignored.items() if is_given)
    if names:
        raise ValueError(f"{names}: fits on batches of rows do not take it")


def _check_options(
    options: FitOptions, is_batched: bool, m_step: MStep, num_starts: int, checkpoint: Any
) -> None:
    """Settings that go with some fits only."""
    if options.sharded and (num_starts > 1 or isinstance(m_step, Mapping)):
        raise ValueError("FitOptions(sharded=) is for one fit from one start, without hooks in m_step=")
    if not is_batched and (options.encoder_steps > 1 or options.annealed_epochs):
        raise ValueError(
            "FitOptions(encoder_steps=, annealed_epochs=) are for fits on batches: give batch_size="
        )
    if checkpoint is not None and num_starts > 1:
        raise ValueError("checkpoint= is for fits from one start")


def _is_stream(data: Any) -> bool:
    """True for a DataLoader, or any other iterable of batches."""
    is_one = isinstance(data, Mapping | tuple | list | Tensor | np.ndarray) or hasattr(data, "to_numpy")
    return are_batches(data) or (not is_one and isinstance(data, Iterable))


def climb(
    setup: Setup, options: FitOptions, begin: float, tol: float = 1e-8, max_iter: int = 1000
) -> tuple[State, Status, tuple[Step, ...], int]:
    """The optimum of a problem that is set up already: where, how it ended, its history and rounds."""
    run = Run(setup, options, tol, ("auto", "auto"), begin, (), False)
    run.start(None)
    status = _alternate(run, max_iter, "auto")
    run.close()
    return run.state, status, tuple(run.history), run.iterations


def restart(fit: VEMResult, seed: int) -> VEMResult | None:
    """The problem of a fit again, from a start that is drawn; None where none has a bound.

    Held parameters keep the values that the fit has them at.
    """
    setup, begin = fit.setup, time.perf_counter()
    call, options = setup.problem.call, FitOptions()
    given = call.args or call.kwargs
    elbo = AnalyticKL_ELBO(analytic=setup.analytic, bounds=setup.bounds)

    def begun(start: int) -> Run:
        with pyro.get_param_store().scope():
            again = set_up(
                setup.problem.model.fn, given, setup.guide, elbo, dict(setup.held), options, seed,
                others=init_to_sample,
            )  # fmt: skip
        run = Run(again, options, 1e-8, ("auto", "auto"), begin, (), False)
        run.start(None, start)
        return run

    with (
        isolated(torch.float64, seed, _threads(given), fit.device),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        run = drawn_again(begun, 1)
        return None if run is None else _finished(run, 1000, "auto")


def _device(data: Any, options: FitOptions) -> torch.device:
    """Where the fit runs; a stream of batches is known by its first."""
    if not _is_stream(data) or options.device is not None:
        return device_of(named_values(data), options.device)
    with repeatable():
        return device_of(named_values(next(as_outside(data), None)))


def _threads(data: Any) -> int | None:
    """One thread for small data: two made fits many times slower on a machine with other work."""
    values = (value for _, value in named_values(data))
    total = sum(math.prod(shape_of(value)) for value in values)
    return 1 if total < SERIAL else None


def _alternate(run: Run, max_iter: int, schedule: Schedule) -> Status:
    """E-step and M-step in turn until nothing is left to gain."""
    run.few.begin(max_iter)
    run.start_factors()
    run.border.look_inside()
    run.few.begin(max_iter)  # where terms have become draws
    for iteration in range(run.iterations + 1, max_iter + 1):
        how = schedule_of(run, iteration, schedule)
        if how == "profile":
            run.profile(iteration)
        else:
            run.step("joint" if how == "joint" else "E", iteration)
        if run.few.is_on:
            run.few.watch()
        elif run.is_diverged():
            return Status.diverged
        elif run.is_converged() and not run.is_reopened():
            run.polish()
            return _ended(run, Status.converged)
        else:
            run.border.go()
            if run.is_stalled():
                return Status.diverged if run.is_diverged(is_last=True) else _ended(run, Status.stalled)
        if schedule_of(run, iteration + 1, schedule) in ("alternate", "accelerated"):
            run.maximise(iteration, how == "accelerated")
        run.save()
    if schedule != "joint":
        run.step("E", max_iter)
    return Status.max_iterations


def _ended(run: Run, status: Status) -> Status:
    """How a fit has ended that no step takes any further: stalled, with the reason, where a term jumps."""
    name = run.setup.processes.first(jumping(run.setup, run.state))
    if name is None:
        return status
    reason = (
        f"{name}: it changes with latents where its gradient is zero (a jump, or values that leave torch)"
    )
    run.setup.objective.add_note(reason)
    warn(f"site {reason}: {Status.stalled.value}")
    return Status.stalled


def _warm_strategy(warm: VEMResult) -> Callable[[dict[str, Any]], Tensor]:
    """Prototype values of an earlier fit's sites where they still fit, near prior medians elsewhere."""
    known = {} if warm._setup is None else {site.name: site.init for site in warm._setup.prototype.latents}

    def strategy(site: dict[str, Any]) -> Tensor:
        value = known.get(site["name"])
        if value is None or value.shape != site["fn"].shape():
            return near_median(site)
        return value.to(torch.get_default_device())

    return strategy


def _warm_held(model: Callable[..., Any], warm: VEMResult) -> dict[str, Tensor]:
    """Parameters that the model holds, where an earlier fit has left them; of a module, all its weights."""
    fixed = roles_of(model).fixed
    return {n: v for n, v in warm.params.items() if n in fixed or n.split("$$$")[0] in fixed}


def _check_settings(
    schedule: str,
    e_step: str,
    m_step: Any,
    tol: float,
    max_iter: int,
    num_starts: int,
    elbo: Any,
    compile: Any,
) -> None:
    def one_of(name: str, value: Any, known: Iterable[str]) -> Iterator[str]:
        if value not in known:
            yield f"{name}={value!r}: choose one of {', '.join(map(repr, known))}"

    problems = [
        *one_of("schedule", schedule, get_args(Schedule)),
        *one_of("e_step", e_step, get_args(StepMethod)),
        *(() if isinstance(m_step, Mapping) else one_of("m_step", m_step, get_args(StepMethod))),
    ]
    if isinstance(m_step, Mapping) and schedule in ("joint", "profile"):
        problems.append(f"schedule={schedule!r}: no M-step would call the functions of m_step=")
    if not (isinstance(compile, bool) or compile == "auto"):
        problems.append(f"compile={compile!r}: choose 'auto', True or False")
    if not tol > 0:
        problems.append(f"tol={tol}: give a positive number of nats")
    for name, number in (("max_iter", max_iter), ("num_starts", num_starts)):
        if number < 1:
            problems.append(f"{name}={number}: at least one is needed")
    if elbo is not None and not isinstance(elbo, AnalyticKL_ELBO):
        problems.append(f"elbo={elbo!r}: fit_vem takes an AnalyticKL_ELBO; for other bounds use pyro's SVI")
    if problems:
        raise ValueError("; ".join(problems))
