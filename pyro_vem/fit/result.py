"""`VEMResult`: what a fit found, frozen, with everything one does next as a method."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor

from ..bound.tables import ElboTerms, Plan
from ..errors import ModelError
from ..model.data import Arguments
from ..model.device import all_on_its_device, on_device
from ..model.runtime import Program, isolated
from .copies import Copied
from .edges import Edge, sentences
from .exactness import values_of
from .measure import terms_of
from .options import FitOptions
from .setup import Setup
from .state import State
from .status import Status, Step

if TYPE_CHECKING:
    from .starts import Start


@all_on_its_device
@dataclass(frozen=True, repr=False)
class VEMResult(Copied):
    """The result of `fit_vem`.

    Attributes:
        params: point estimates by name on the constrained scale, float64: the model's parameters (held
            ones included) and the values of ``map_sites``.
        guide_params: the guide's parameters by name, constrained.
        elbo: evidence lower bound in nats; from fresh draws where a term needs them.
        elbo_se: its Monte Carlo standard error, zero for an exact one.
        status: how the fit ended.
        n_iter: E/M rounds.
        history: one `Step` a step.
        seconds: wall time of the fit.
        plan: the method of each term of the bound.
        terms: the bound as a table.
        starts: where each start ended, if there were several.
        boundary: numbers of parameters whose maximum is at the edge of their constraint.

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
    _points: tuple[State, ...] = field(default=(), repr=False)
    starts: tuple["Start", ...] = ()
    boundary: tuple[Edge, ...] = ()
    _whole: Callable[[], Setup] | None = field(default=None, repr=False)  # of a fit on batches

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
        points: tuple[State, ...] = (),
        boundary: tuple[Edge, ...] = (),
    ) -> "VEMResult":
        """Freeze a state, and measure its bound."""
        phi, theta = (
            {name: value.detach().clone() for name, value in values.items()}
            for values in values_of(setup, state.phi, state.theta)
        )
        terms = terms_of(setup, phi, theta, status, options.elbo_draws)
        terms, phi = setup.processes.table(terms), setup.processes.joined(phi)
        if not torch.isfinite(torch.tensor(terms.elbo)) and status is Status.converged:
            status = Status.nonfinite
        return cls(
            theta, phi, terms.elbo, terms.elbo_se, status, n_iter, history, seconds,
            setup.objective.shown_plan, terms, setup.objective.seed, setup, points, boundary=boundary,
        )  # fmt: skip

    @property
    def converged(self) -> bool:
        """True if the stopping rule held."""
        return self.status is Status.converged

    @property
    def stop_reason(self) -> str:
        """What happened, and what to do, in a sentence."""
        return " ".join([self.status.value, *sentences(self.boundary)])

    @property
    def device(self) -> torch.device:
        """Where the fit ran, and where its tensors are."""
        return next(iter([*self.guide_params.values(), *self.params.values()]), torch.empty(0)).device

    @property
    def setup(self) -> Setup:
        """Model, guide and data of the fit.

        Raises:
            ModelError: on a result that was loaded without data, or whose rows are of several processes.
        """
        if self._setup is None and self._whole is not None:
            with isolated(torch.float64, self.seed, device=self.device):
                object.__setattr__(self, "_setup", self._whole())
        if self._setup is None:
            raise ModelError("this result was loaded without data: VEMResult.load(path, model, data)")
        if self._setup.processes.count > 1:
            raise ModelError(
                "the rows of this fit are shared out over processes: save it, and load it with all rows in "
                "one process, VEMResult.load(path, model, data)"
            )
        return self._setup

    @property
    def model(self) -> Callable[..., Any]:
        """The model with the fitted parameters in place, an ordinary Pyro callable.

        Works in Predictive and NUTS with an empty parameter store, in float64 as the fit did, on data of any
        floating dtype. Weights of modules are swapped in while it runs; the modules themselves never change.
        """
        problem = self.setup.problem
        points = {name: self.params[name] for name in problem.map_sites}
        params = {name: value for name, value in self.params.items() if name not in points}
        return pyro.condition(self._fitted(problem.model, params), data=points)

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide with the fitted parameters in place, an ordinary Pyro callable.

        Raises:
            ModelError: if no latent was left for a guide.
        """
        program = self.setup.problem.guide
        if program is None:
            raise ModelError("this fit has no guide: every latent is in map_sites, or there is none")
        return self._fitted(program, self.guide_params)

    def _fitted(self, program: Program, params: Mapping[str, Tensor]) -> Callable[..., Any]:
        def fitted(*args: Any, **kwargs: Any) -> Any:
            call = Arguments.of(args, kwargs).to(self.device).cast(torch.float64)
            with on_device(self.device):
                return program.call(params, call.args, call.kwargs)

        return fitted

    def draw(
        self, n: int, seed: int, *keep: str, correction: str | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Groups of `pyro_vem.bound.objective.Objective.sample` at the fitted parameters."""
        if n < 1:
            raise ValueError(f"n={n}: at least one draw is needed")
        if correction is not None:
            from ..posterior.importance import corrected

            return corrected(self, n, seed, keep, correction)
        with isolated(torch.float64):
            return self.setup.objective.sample(self.guide_params, self.params, n, seed, keep)

    def sample(
        self, n: int, seed: int = 0, correction: Literal["linear_response", "psis"] | None = None
    ) -> dict[str, Tensor]:
        """Draws from the fitted posterior, given the parameters at their estimates.

        Args:
            n: number of draws.
            seed: of the draws.
            correction: None for the guide's own draws; "linear_response" for a Normal with the covariance
                that the bound's curvature implies (mean field ignores correlations, its sds are mostly too
                small); "psis" for draws resampled by Pareto-smoothed importance weights, the most exact
                where their k-hat allows them.

        Returns:
            Tensors shaped ``(n, *site)`` for each latent site on its constrained scale, MAP sites
            (constant) and deterministic sites included.

        Raises:
            ModelError: if a correction cannot be had for this fit; the message says why.

        References:
            Giordano, Broderick and Jordan (2018), Covariances, robustness, and variational
            Bayes, JMLR 19(51). Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed
            importance sampling, JMLR 25(72).
        """
        return self.draw(n, seed, "values", correction=correction)["values"]

    def responsibilities(self) -> dict[str, Tensor]:
        """Marginal probabilities of each discrete site that is summed out.

        Returns:
            Tensors shaped ``(*plates, values)`` by site name, given parameters and factors of other latents.

        Raises:
            ModelError: if the model has no such site.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> import pyro_vem as vem
            >>> def model(y):
            ...     mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
            ...     with pyro.plate("rows", len(y)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            ...         pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y)
            >>> fit = vem.fit_vem(model, {"y": torch.tensor([-1.5, 0.4, 1.6])}, progress=False)
            >>> fit.responsibilities()["z"].round(decimals=2)
            tensor([[0.9500, 0.0500],
                    [0.3400, 0.6600],
                    [0.0500, 0.9500]], dtype=torch.float64)
        """
        terms = self.setup.lifted
        if terms is None or not terms.lifted.discrete:
            raise ModelError('the model has no discrete site with infer={"enumerate": "parallel"}')
        with isolated(torch.float64):
            return terms.responsibilities(self.guide_params, self.params)

    def covariance(self, of: Literal["latents", "params"] = "latents", **kwargs: Any) -> Any:
        """Of latents or estimates, as a labelled frame; see `pyro_vem.posterior.covariance.covariance`."""
        from ..posterior.covariance import covariance

        return covariance(self, of, **kwargs)

    def standard_errors(self, plate: str | None = None) -> dict[str, Tensor]:
        """Of the parameters on their constrained scale; with a plate, by the sandwich; see `covariance`."""
        from ..posterior.covariance import standard_errors

        return standard_errors(self, plate)

    def criteria(self, plate: str | None = None) -> Any:
        """AIC and BIC, or bounds on them; see `pyro_vem.posterior.criteria.criteria`."""
        from ..posterior.criteria import criteria

        return criteria(self, plate)

    def diagnose(self, **kwargs: Any) -> Any:
        """How far the fit can be believed; see `pyro_vem.posterior.diagnose.diagnose`."""
        from ..posterior.diagnose import diagnose

        return diagnose(self, **kwargs)

    @functools.cached_property
    def _diagnosis(self) -> Any:
        return self.diagnose()

    @functools.cached_property
    def _linear_response(self) -> Any:
        from ..posterior.linear_response import LinearResponse

        return LinearResponse.of(self)

    @functools.cached_property
    def _pools(self) -> Any:
        from ..posterior.importance import pools

        return pools(self)

    def predict(
        self,
        data: Any = None,
        *,
        num_draws: int = 1000,
        kind: Literal["posterior", "prior"] = "posterior",
        correction: str | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Predictive draws of every site, observed ones included.

        Args:
            data: new data, as `fit_vem` takes them, with None (or a default) for what is to be
                predicted; None for the data of the fit.
            num_draws: draws.
            kind: "posterior" or "prior" draws of the latents, at the fitted parameters.
            correction: as in `sample`.
            seed: of the draws.

        Returns:
            Tensors shaped ``(num_draws, *site)``. Where a plate of the new data has another size, the latents
            inside it are new: they come from their prior given the other latents.

        Raises:
            ModelError: if the model does not run on the new data.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> import pyro_vem as vem
            >>> def model(x, y=None):
            ...     b = pyro.sample("b", dist.Normal(0.0, 10.0))
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("y", dist.Normal(b * x, 0.1), obs=y)
            >>> x = torch.tensor([1.0, 2.0, 3.0])
            >>> fit = vem.fit_vem(model, {"x": x, "y": 2 * x}, progress=False)
            >>> fit.predict({"x": torch.tensor([10.0])})["y"].mean(0).round()
            tensor([20.], dtype=torch.float64)
        """
        from ..posterior.predict import predict

        groups = predict(self, num_draws, data=data, kind=kind, correction=correction, seed=seed)
        return {**groups["latents"], **groups["observed"]}

    def log_likelihood(self, data: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Pointwise log likelihood; see `pyro_vem.posterior.predict.log_likelihood`."""
        from ..posterior.predict import log_likelihood

        return log_likelihood(self, data=data, **kwargs)

    def infer(self, data: Any, **kwargs: Any) -> "VEMResult":
        """The posterior of new rows, all that was learnt held; see `pyro_vem.posterior.infer.infer`."""
        from ..posterior.infer import infer

        return infer(self, data, **kwargs)

    def amortization_gap(self, data: Any = None, **kwargs: Any) -> Any:
        """What an encoder loses, row by row; see `pyro_vem.posterior.infer.amortization_gap`."""
        from ..posterior.infer import amortization_gap

        return amortization_gap(self, data, **kwargs)

    def to_arviz(self, **kwargs: Any) -> Any:
        """The fit as ArviZ data; see `pyro_vem.posterior.arviz.to_arviz` for the arguments."""
        from ..posterior.arviz import to_arviz

        return to_arviz(self, **kwargs)

    def loo(self, **kwargs: Any) -> Any:
        """Leave-one-out cross-validation; see `pyro_vem.posterior.arviz.loo` for the arguments."""
        from ..posterior.arviz import loo

        return loo(self, **kwargs)

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
        path: str | Path,
        model: Callable[..., Any],
        data: Any = None,
        *,
        guide: Any = None,
        device: torch.device | str | None = None,
    ) -> "VEMResult":
        """Read a saved result.

        Args:
            path: what `save` wrote.
            model: the model that was fitted.
            data: its data; without them methods that run the model raise `ModelError`.
            guide: the guide, if the fit was given one.
            device: where to; as `FitOptions` has it, by default that of the data.

        Raises:
            ModelError: if the file is not a saved result, or belongs to another model.
        """
        from .storage import load

        return load(path, model, data, guide, device)

    def __repr__(self) -> str:
        from ..posterior.card import card

        return card(self)

    def _repr_html_(self) -> str:
        from ..posterior.card import html_card

        return html_card(self)
