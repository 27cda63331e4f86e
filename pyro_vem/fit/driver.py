"""`fit_vem`: the only loop. EM, variational EM, plain VI and MAP are settings of it."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bound.elbo import AnalyticKL_ELBO
from ..errors import ModelError
from ..model.runtime import isolated
from ..model.sites import init_strategy
from .capture import Compile
from .exactness import compile_terms, more_draws, settle, settle_nodes
from .measure import disagreement
from .result import VEMResult
from .scales import Scales
from .setup import FitOptions, Setup, set_up
from .smooth import Method
from .state import State
from .status import Status, Step
from .steps import check_second_derivatives, note_idle, start_variances, step
from .stopping import remaining, runaway

Schedule = Literal["auto", "alternate", "joint"]
StepMethod = Literal["auto", "newton", "lbfgs"]
Callback = Callable[[Step, Mapping[str, Tensor]], None]
SERIAL = 10_000_000  # numbers in the data below which a fit runs on one thread
ROUNDING = 1e3 * float(np.finfo(np.float64).eps)  # of the bound, relative
SLOW_AFTER = 10  # rounds of EM before a joint step may follow
SELF_CHECK = 256  # draws that closed forms are held against at the start
MOST_KEPT = 100_000  # parameters of which the points after each step are kept, for plots
NEWTON_LIMIT = 5_000_000  # parameters in a block beyond which its Krylov vectors outgrow memory


def fit_vem(
    model: Callable[..., Any],
    data: Any = None,
    *,
    guide: Any = None,
    elbo: AnalyticKL_ELBO | None = None,
    schedule: Schedule = "auto",
    e_step: StepMethod = "auto",
    m_step: StepMethod = "auto",
    tol: float = 1e-8,
    max_iter: int = 1000,
    init: Any = None,
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
            values; a tuple is taken as positional arguments.
        guide: None for `MeanFieldNormal`; an `AmortizedNormal`; or any reparameterised guide.
        elbo: an `AnalyticKL_ELBO`, to require or forbid closed-form KL terms.
        schedule: "alternate" (EM), "joint" (one Newton problem in phi and theta) or "auto": EM,
            with joint steps once its gains shrink slowly.
        e_step: optimiser of the E-step: "newton" (trust region), "lbfgs", or "auto".
        m_step: optimiser of the M-step, likewise.
        tol: predicted remaining gain of the joint problem, in nats, at which the fit stops.
        max_iter: most E/M rounds.
        init: initial values on the constrained scale by site and parameter name, a Pyro init
            strategy, or an earlier result (warm start).
        compile: whether a bound that runs the model is traced once and compiled (by inductor, which
            needs a C++ compiler): True at once, False never, "auto" when a fit has taken as long
            as compiling does. The plan says what was done.
        callbacks: each is called as ``callback(step, params)`` after every step, with the row of
            history and the parameters so far; raising KeyboardInterrupt in one ends the fit
            with `Status.interrupted`.
        progress: a bar on standard error; None shows it in a terminal only.
        seed: of the fixed draws. The same seed gives the same history bit for bit.
        options: rare settings, see `FitOptions`.

    Returns:
        A frozen `VEMResult`.

    Raises:
        ModelError: if model, guide and data do not fit together; the message names the site.
        UnsupportedModelError: for what cannot be fitted yet (discrete latents, minibatches).
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
    _check_settings(schedule, e_step, m_step, tol, max_iter, elbo, compile)
    begin = time.perf_counter()
    # Trial points may lie anywhere: what overflows there is +inf, and is not stepped to.
    with isolated(torch.float64, seed, _threads(data)), np.errstate(over="ignore", invalid="ignore"):
        warm = init if isinstance(init, VEMResult) else None
        setup = set_up(
            model, data, guide, elbo, _warm_strategy(warm) if warm else init, options, seed, compile
        )
        run = _Run(setup, options, tol, (e_step, m_step), begin, tuple(callbacks), progress)
        run.start(warm)
        try:
            status = _alternate(run, max_iter, schedule)
        except KeyboardInterrupt:
            status = Status.interrupted
        finally:
            run.close()
        return run.result(status)


def _threads(data: Any) -> int | None:
    """One thread for small data: two made fits many times slower on a machine with other work."""
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple | list) else ()
    total = sum(int(np.prod(getattr(value, "shape", ()), dtype=int)) for value in values)
    return 1 if total < SERIAL else None


def _alternate(run: "_Run", max_iter: int, schedule: Schedule) -> Status:
    """E-step and M-step in turn until nothing is left to gain."""
    for iteration in range(1, max_iter + 1):
        is_joint = schedule == "joint" or (schedule == "auto" and run.is_slow())
        run.step("joint" if is_joint else "E", iteration)
        if run.is_diverged():
            return Status.diverged
        if run.is_converged() and not run.is_reopened():
            return Status.converged
        if schedule != "joint":
            run.step("M", iteration)
    if schedule != "joint":
        run.step("E", max_iter)
    return Status.max_iterations


@dataclass
class _Run:
    """The moving parts of one fit: the state, its history, and what watches it."""

    setup: Setup
    options: FitOptions
    tol: float
    methods: tuple[StepMethod, StepMethod]
    begin: float
    callbacks: tuple[Callback, ...]
    progress: bool | None
    history: list[Step] = field(default_factory=list)
    points: list[State] = field(default_factory=list)
    gtol: float = 1e-2
    failed: int = 0
    next_check: int = 0

    def start(self, warm: VEMResult | None) -> None:
        """Put both blocks at their initial values and the variances near their optimum."""
        setup = self.setup
        phi, theta = _initial(setup.phi, warm), _initial(setup.theta, warm)
        compile_terms(setup, self.options)
        setup.objective.prepare(
            setup.phi.constrained(torch.from_numpy(phi)), setup.theta_values(torch.from_numpy(theta))
        )
        self._check_closed_forms(phi, theta)
        settle_nodes(setup, phi, theta)
        self.state = State(phi, theta, _finite_elbo(setup, phi, theta))
        self.first = self.state
        if not (phi.size and theta.size):
            self.gtol = self._final_gtol()  # no other block to wait for
        self.iterations = 0
        self.scales = Scales(setup)
        if not setup.is_our_code:
            check_second_derivatives(setup, self.state, self.scales.of(self.state, "joint", 0))
        if warm is None:
            note_idle(setup, self.state)
        self.bar = _bar(self.progress)
        if warm is None:
            self.state, row = start_variances(setup, self.state)
            self._record(row)
            if settle_nodes(setup, self.state.phi, self.state.theta):  # now, not after a whole fit
                self._changed("more quadrature nodes")

    def _check_closed_forms(self, phi: NDArray[np.float64], theta: NDArray[np.float64]) -> None:
        """Sample what does not agree with draws, and say so in the plan."""
        setup = self.setup
        objective = setup.objective
        if not objective.is_random or objective.is_exact or not objective.plan.exact:
            return
        values = setup.phi.constrained(torch.from_numpy(phi)), setup.theta_values(torch.from_numpy(theta))
        gap = disagreement([setup.objective.sample(*values, SELF_CHECK, 1, ("densities", "terms"))])
        if gap is not None:
            setup.objective.plan = setup.objective.plan.demoted(gap)

    def step(self, block: str, iteration: int) -> None:
        """One step; a block without parameters is skipped."""
        size = {"E": self.setup.phi.size, "M": self.setup.theta.size}.get(block, 1)
        self.iterations = iteration
        if not size:
            return
        self.state, row = step(
            self.setup, self.state, block, self.scales,
            iteration=iteration, gtol=self.gtol, method=self._method(block),
            max_iter=self.options.step_iterations,
        )  # fmt: skip
        self._record(row)

    def is_converged(self) -> bool:
        """The stopping rule, tried only where the gains say that it may hold.

        A check costs as much as several steps, so after one that fails the next waits.
        """
        gain, tol, final = self._gain_of_round(), self._tolerance(), self._final_gtol()
        is_solved = self.gtol <= final
        # Inexact at first: a block need not be solved far beyond what a round gains.
        self.gtol = float(np.clip(0.1 * max(gain, 0.0) ** 0.5, final, max(final, self.gtol)))
        is_slow = self.setup.theta.size and self.setup.phi.size and gain > 1e3 * tol
        if not is_solved or is_slow or self.iterations < self.next_check:
            return False
        scale = self.scales.of(self.state, "joint", self.iterations)
        if remaining(self.setup, self.state, scale, tol).is_small(tol):
            return True
        self.failed += 1
        self.next_check = self.iterations + min(2**self.failed, 32)
        return False

    def _tolerance(self) -> float:
        """The caller's tolerance, or what rounding leaves of a bound of many nats."""
        return max(self.tol, ROUNDING * abs(self.state.elbo))

    def _final_gtol(self) -> float:
        """Scaled gradient norm at which a block counts as solved; lower after each failed check."""
        return max(1e-10, 0.1 * self._tolerance() ** 0.5 * 0.3**self.failed)

    def is_slow(self) -> bool:
        """True if EM has become linear: ten rounds, and the last gained over half of the one before."""
        if self.iterations < SLOW_AFTER or not (self.setup.phi.size and self.setup.theta.size):
            return False
        gains = [0.0, 0.0, 0.0]
        for row in self.history:
            if 0 <= self.iterations - row.iteration < 3:
                gains[self.iterations - row.iteration] += row.gain
        return gains[1] > 0.5 * gains[2] and gains[1] > 10 * self._tolerance()

    def is_reopened(self) -> bool:
        """True if the bound itself had to change at the point reached: the fit goes on from there."""
        change = settle(self.setup, self.state)
        if change is None:
            scale = self.scales.of(self.state, "joint", self.iterations)
            change = more_draws(self.setup, self.state, scale)
        if change is not None:
            self._changed(change)
            self.next_check = 0
        return change is not None

    def _changed(self, change: str) -> None:
        """Record that the bound itself is another one from here on."""
        self.setup.captures.forget()
        before = self.state.elbo
        with torch.no_grad():
            phi, theta = torch.from_numpy(self.state.phi), torch.from_numpy(self.state.theta)
            elbo = float(self.setup.elbo(phi, theta))
        self.state = replace(self.state, elbo=elbo)
        self._record(Step(self.iterations, "check", before, elbo, 0.0, 1, 0, 0.0, change))

    def _gain_of_round(self) -> float:
        """Gain of the last M-step and the E-step after it (or of the joint step)."""
        blocks = [row for row in self.history if row.iteration >= self.iterations - 1]
        last = [row for row in blocks if row.iteration == self.iterations or row.block == "M"]
        return sum((row.gain for row in last), 0.0)

    def is_diverged(self) -> bool:
        """True, with a warning that names it, if a site or parameter has run away."""
        name = runaway(self.setup, self.state, self.first)
        if name is not None:
            warnings.warn(f"site {name!r} has run away: {Status.diverged.value}", stacklevel=5)
        return name is not None

    def result(self, status: Status) -> VEMResult:
        """The frozen result at the present state."""
        return VEMResult.of(
            self.setup, self.state, status, tuple(self.history), self.iterations,
            time.perf_counter() - self.begin, self.options, tuple(self.points),
        )  # fmt: skip

    def close(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _method(self, block: str) -> Method:
        chosen = self.methods[1] if block == "M" else self.methods[0]
        if chosen != "auto":
            return chosen
        sizes = {"E": self.setup.phi.size, "M": self.setup.theta.size}
        size = sizes.get(block, sum(sizes.values()))
        return "newton" if size <= NEWTON_LIMIT else "lbfgs"

    def _record(self, row: Step | None) -> None:
        if row is None:
            return
        self.history.append(row)
        if self.state.joint.size <= MOST_KEPT:
            self.points.append(self.state)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{row.block}-step {row.iteration}, ELBO {row.after:.6f}", refresh=False)
            self.bar.update()
        for callback in self.callbacks:
            with torch.no_grad():
                callback(row, self.setup.theta_values(torch.from_numpy(self.state.theta)))


def _warm_strategy(warm: VEMResult) -> Callable[[dict[str, Any]], Tensor]:
    """Prototype values of an earlier fit's sites where they still fit, prior medians elsewhere."""
    median = init_strategy(None)
    known = {} if warm._setup is None else {site.name: site.init for site in warm.setup.prototype.latents}

    def strategy(site: dict[str, Any]) -> Tensor:
        value = known.get(site["name"])
        return median(site) if value is None or value.shape != site["fn"].shape() else value

    return strategy


def _initial(block: Any, warm: VEMResult | None) -> NDArray[np.float64]:
    values = {p.name: p.init for p in block.parameters}
    if warm is not None:
        for name, value in {**warm.params, **warm.guide_params}.items():
            if name in values and values[name].shape == value.shape:
                values[name] = value
    flat: NDArray[np.float64] = block.flat(values).numpy()
    return flat


def _finite_elbo(setup: Setup, phi: Any, theta: Any) -> float:
    with torch.no_grad():
        constrained = setup.phi.constrained(torch.from_numpy(phi))
        terms = setup.objective.terms(constrained, setup.theta_values(torch.from_numpy(theta)))
    for name, value in terms.items():
        if not bool(torch.isfinite(value)):
            raise ModelError(
                f"site {name!r}: its term of the bound is {float(value)}. {Status.nonfinite.value}"
            )
    return float(torch.stack(list(terms.values())).sum())


def _bar(progress: bool | None) -> Any:
    from tqdm import tqdm

    return tqdm(desc="fit_vem", unit=" steps", disable=None if progress is None else not progress)


def _check_settings(
    schedule: str, e_step: str, m_step: str, tol: float, max_iter: int, elbo: Any, compile: Any
) -> None:
    def one_of(name: str, value: str, known: Iterable[str]) -> Iterator[str]:
        if value not in known:
            yield f"{name}={value!r}: choose one of {', '.join(map(repr, known))}"

    problems = [
        *one_of("schedule", schedule, ("auto", "alternate", "joint")),
        *one_of("e_step", e_step, ("auto", "newton", "lbfgs")),
        *one_of("m_step", m_step, ("auto", "newton", "lbfgs")),
    ]
    if not (isinstance(compile, bool) or compile == "auto"):
        problems.append(f"compile={compile!r}: choose 'auto', True or False")
    if not tol > 0:
        problems.append(f"tol={tol}: give a positive number of nats")
    if max_iter < 1:
        problems.append(f"max_iter={max_iter}: at least one iteration is needed")
    if elbo is not None and not isinstance(elbo, AnalyticKL_ELBO):
        problems.append(f"elbo={elbo!r}: fit_vem takes an AnalyticKL_ELBO; for other bounds use pyro's SVI")
    if problems:
        raise ValueError("; ".join(problems))
