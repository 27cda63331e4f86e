"""`VEMResult`: what a fit found, frozen, with everything one does next as a method."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from ..bound.tables import ElboTerms, Plan, TermRow, text_table
from ..errors import ModelError
from ..model.data import Arguments
from ..model.runtime import isolated
from .setup import FitOptions, Setup
from .state import State
from .status import Status, Step


@dataclass(frozen=True, repr=False)
class VEMResult:
    """The result of `fit_vem`.

    Attributes:
        params: point estimates by name on the constrained scale, float64: the model's
            parameters (held ones included) and the values of ``map_sites``.
        guide_params: the guide's parameters by name, constrained.
        elbo: evidence lower bound in nats, from fresh draws.
        elbo_se: its Monte Carlo standard error.
        status: how the fit ended.
        n_iter: E/M rounds.
        history: one `Step` a step.
        seconds: wall time of the fit.
        plan: the method of each term of the bound.
        terms: the bound as a table.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_vem as vem
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vem.fit_vem(model, {"y": torch.tensor(2.0)}, progress=False)
        >>> print(fit.terms)
        site  plates  kind        method       ...
        ...
        >>> fit.sample(5)["z"].shape
        torch.Size([5])
    """

    params: Mapping[str, Tensor]
    guide_params: Mapping[str, Tensor]
    elbo: float
    elbo_se: float
    status: Status
    n_iter: int
    history: tuple[Step, ...]
    seconds: float
    plan: Plan
    terms: ElboTerms
    seed: int = 0
    _setup: Setup | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        setup: Setup,
        state: State,
        status: Status,
        history: tuple[Step, ...],
        n_iter: int,
        seconds: float,
        options: FitOptions,
    ) -> "VEMResult":
        """Freeze a state; its bound is measured on fresh draws."""
        phi = _detached(setup.phi.constrained(torch.from_numpy(state.phi)))
        theta = _detached(setup.theta_values(torch.from_numpy(state.theta)))
        # A converged exact bound has been held against draws already (`pyro_vem.fit.exactness`).
        is_settled = status is Status.converged and setup.objective.is_exact
        terms = (
            exact_table(setup, phi, theta) if is_settled else measure(setup, phi, theta, options.elbo_draws)
        )
        if not torch.isfinite(torch.tensor(terms.elbo)) and status is Status.converged:
            status = Status.nonfinite
        return cls(
            theta, phi, terms.elbo, terms.elbo_se, status, n_iter, history, seconds,
            setup.objective.shown_plan, terms, setup.objective.seed, setup,
        )  # fmt: skip

    @property
    def converged(self) -> bool:
        """True if the stopping rule held."""
        return self.status is Status.converged

    @property
    def stop_reason(self) -> str:
        """What happened, and what to do, in a sentence."""
        return self.status.value

    @property
    def setup(self) -> Setup:
        """Model, guide and data of the fit.

        Raises:
            ModelError: on a result that was loaded without data.
        """
        if self._setup is None:
            raise ModelError("this result was loaded without data: VEMResult.load(path, model, data)")
        return self._setup

    @property
    def model(self) -> Callable[..., Any]:
        """The model with the fitted parameters in place, an ordinary Pyro callable.

        Works in Predictive and NUTS with an empty parameter store. It computes in float64, as
        the fit did, and takes data of any floating dtype. Weights of modules are swapped in
        while it runs, and the user's modules are never changed.
        """
        program = self.setup.problem.model
        points = {name: self.params[name] for name in self.setup.problem.map_sites}
        params = {name: value for name, value in self.params.items() if name not in points}

        def model(*args: Any, **kwargs: Any) -> Any:
            call = Arguments.of(args, kwargs).cast(torch.float64)
            with pyro.condition(data=points):
                return program.call(params, call.args, call.kwargs)

        return model

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide with the fitted parameters in place, an ordinary Pyro callable.

        Raises:
            ModelError: if no latent was left for a guide.
        """
        program = self.setup.problem.guide
        if program is None:
            raise ModelError("this fit has no guide: every latent is in map_sites, or there is none")

        def guide(*args: Any, **kwargs: Any) -> Any:
            call = Arguments.of(args, kwargs).cast(torch.float64)
            return program.call(self.guide_params, call.args, call.kwargs)

        return guide

    def draw(self, n: int, seed: int, *keep: str) -> dict[str, dict[str, Tensor]]:
        """Groups of `pyro_vem.bound.objective.Objective.sample` at the fitted parameters."""
        if n < 1:
            raise ValueError(f"n={n}: at least one draw is needed")
        with isolated(torch.float64):
            return self.setup.objective.sample(self.guide_params, self.params, n, seed, keep)

    def sample(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Draws from the fitted posterior.

        Returns:
            Tensors shaped ``(n, *site)`` for each latent site on its constrained scale, MAP sites
            (constant) and deterministic sites included.
        """
        return self.draw(n, seed, "values")["values"]

    def diagnose(self, *, num_draws: int = 20_000, seed: int = 1) -> Any:
        """How far the fit can be believed; see `pyro_vem.posterior.diagnose.diagnose`."""
        from ..posterior.diagnose import diagnose

        return diagnose(self, num_draws=num_draws, seed=seed)

    @functools.cached_property
    def _diagnosis(self) -> Any:
        return self.diagnose()

    def to_arviz(self, **kwargs: Any) -> Any:
        """The fit as ArviZ data; see `pyro_vem.posterior.arviz.to_arviz` for the arguments."""
        from ..posterior.arviz import to_arviz

        return to_arviz(self, **kwargs)

    def compare_nuts(self, **kwargs: Any) -> Any:
        """The fit beside NUTS; see `pyro_vem.posterior.nuts.compare_nuts` for the arguments."""
        from ..posterior.nuts import compare_nuts

        return compare_nuts(self, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write the result to one file: tensors and JSON, no code; atomic on one file system."""
        from .storage import save

        save(self, path)

    @staticmethod
    def load(
        path: str | Path, model: Callable[..., Any], data: Any = None, *, guide: Any = None
    ) -> "VEMResult":
        """Read a saved result.

        Args:
            path: what `save` wrote.
            model: the model that was fitted.
            data: its data; without them only the numbers are there, and methods that run the
                model raise `ModelError`.
            guide: the guide, if the fit was given one.

        Raises:
            ModelError: if the file is not a saved result, or belongs to another model.
        """
        from .storage import load

        return load(path, model, data, guide)

    def __repr__(self) -> str:
        from ..posterior.card import card

        return card(self)


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def measure(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], most: int) -> ElboTerms:
    """The bound on fresh draws; terms that are exact are shown so.

    Draws are added until the standard error is below 0.01 nats or `most` are spent. log p - log q
    is averaged: its variance vanishes as the guide approaches the posterior.
    """
    parts: list[dict[str, dict[str, Tensor]]] = []
    size = 1024 if setup.objective.is_random else 1
    while True:
        keep = ("densities", "terms")
        parts.append(setup.objective.sample(phi, theta, size, 7919 + len(parts), keep))
        ratio = torch.cat([p["densities"]["log_p"] - p["densities"]["log_q"] for p in parts])
        se = float(ratio.std() / len(ratio) ** 0.5) if len(ratio) > 1 else 0.0
        is_enough = se < 0.01 or not setup.objective.is_random
        if is_enough or len(ratio) + size > most:
            break
    gap = disagreement(parts)
    if gap is not None:
        setup.objective.add_note(gap)
        warnings.warn(gap, stacklevel=4)
    exact = _exact_terms(setup, phi, theta)
    rows = []
    for row in setup.objective.shown_plan.rows:
        values = exact.get(row.site, torch.cat([part["terms"][row.site] for part in parts]))
        error = float(values.std() / len(values) ** 0.5) if values.dim() and len(values) > 1 else 0.0
        rows.append(TermRow.of(row, float(values.mean()), error))
    return ElboTerms(tuple(rows), float(ratio.mean()), se)


def exact_table(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> ElboTerms:
    """The bound of a problem in which no term needs draws."""
    values = _exact_terms(setup, phi, theta)
    rows = tuple(TermRow.of(row, float(values[row.site]), 0.0) for row in setup.objective.shown_plan.rows)
    return ElboTerms(rows, float(torch.stack(list(values.values())).sum()), 0.0)


def _exact_terms(setup: Setup, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms that need no draws, by site."""
    objective = setup.objective
    with isolated(torch.float64), torch.no_grad():
        return objective.exact_terms(phi, theta)


def disagreement(parts: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> str | None:
    """What to say if the closed forms do not average to what the draws themselves give.

    The draws' log p - log q comes from the ordinary trace, so this checks formulas and proofs
    together, at 5 standard errors. Where one draw makes most of the variance there is no verdict.
    """
    ratio = torch.cat([p["densities"]["log_p"] - p["densities"]["log_q"] for p in parts])
    exact = torch.cat([torch.stack(list(p["terms"].values())).sum(0) for p in parts])
    gap = ratio - exact
    square = (gap - gap.mean()).square()
    if len(gap) < 2 or float(square.max()) > 0.2 * float(square.sum()):
        return None
    off, se = abs(float(gap.mean())), float(gap.std()) / len(gap) ** 0.5
    if off <= 5 * se + 1e-6 * (1 + abs(float(ratio.mean()))):
        return None
    return (
        f"closed-form KL terms and draws of the same guide differ by {off:.3g} nats ({off / se:.1f} standard "
        'errors): sample them with elbo=AnalyticKL_ELBO(analytic="never"), and please report the model'
    )


def history_table(history: tuple[Step, ...]) -> str:
    """A history as text, one row a step."""
    headers = ["iteration", "block", "before", "after", "gradient", "evaluations", "products", "seconds"]
    return text_table(headers, [[getattr(row, name) for name in headers] for row in history])
