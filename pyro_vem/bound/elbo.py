"""`AnalyticKL_ELBO`: exact KL terms where they are valid, samples elsewhere, for any `SVI`."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from ..errors import ModelError
from ..model.roles import roles_of
from ..model.runtime import Site, is_deterministic, is_subsample
from .tables import ElboTerms, Plan, TermRow
from .terms import make_plan, site_terms

Program = Callable[..., Any]


class AnalyticKL_ELBO(ELBO):  # type: ignore[misc]
    """Evidence lower bound with the exact KL at every site where it is proven valid.

    A drop-in for ``pyro.infer.Trace_ELBO`` with reparameterised guides. Each latent site
    contributes ``E_q[log q - log p]``; where pyro_vem can show that this is the KL of two
    distributions in its table it uses the closed form, elsewhere one sample a particle. Scale
    and mask of both sites count, and no Jacobian is dropped.

    Args:
        num_particles: draws a step.
        analytic: "auto" uses the closed form where it is valid; "require" makes a site that is
            not exact an error; "never" samples every site.
        kwargs: every other keyword of ``pyro.infer.ELBO``, ``vectorize_particles`` among them.

    Raises:
        ModelError: at the first step, if guide and model do not match.
        UnsupportedModelError: at the first step, for guide sites that are not reparameterised.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vem import MeanFieldNormal
        >>> def model():
        ...     pyro.sample("s", dist.LogNormal(0.0, 1.0))
        >>> guide = MeanFieldNormal(model, init={"s": torch.tensor(1.0)})
        >>> round(AnalyticKL_ELBO().loss(model, guide), 4)  # exact: no draw matters
        1.8076
        >>> print(AnalyticKL_ELBO().plan(model, guide))
        site  plates  kind  method       reason
        s             KL    closed form  independent factors by construction
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        analytic: Literal["auto", "require", "never"] = "auto",
        **kwargs: Any,
    ) -> None:
        if analytic not in ("auto", "require", "never"):
            raise ValueError(f'analytic={analytic!r}: choose "auto", "require" or "never"')
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: at least one particle is needed")
        super().__init__(num_particles=num_particles, **kwargs)
        self.analytic = analytic

    def plan(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Plan:
        """The method of each site for this model and guide, with proof or reason."""
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        return self._plan(guide, model_trace, guide_trace)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> ElboTerms:
        """The bound as a table: mean over the particles of each site's term, in nats.

        Standard errors need at least two particles that are not vectorised; they are nan otherwise.
        """
        with torch.no_grad():
            plan, draws = None, []
            for plan, terms in self._particles(model, guide, args, kwargs):
                draws.append(torch.stack([terms[row.site] for row in plan.rows]))
        assert plan is not None
        values = torch.stack(draws)
        if self.vectorize_particles or len(draws) < 2:
            se = torch.full_like(values[0], torch.nan)
            total_se = float("nan")
        else:
            se = values.std(0) / len(draws) ** 0.5
            total_se = float(values.sum(1).std() / len(draws) ** 0.5)
        rows = [
            TermRow(row.site, row.kind, row.method, float(value), float(error))
            for row, value, error in zip(plan.rows, values.mean(0), se, strict=True)
        ]
        return ElboTerms(tuple(rows), sum((row.value for row in rows), 0.0), total_se)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, an unbiased estimate with pathwise gradients."""
        losses = [-sum(terms.values()) for _, terms in self._particles(model, guide, args, kwargs)]
        loss: Tensor = torch.stack([torch.as_tensor(value) for value in losses]).mean()
        warn_if_nan(loss, "loss")
        return loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO, as a number."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO as a number; gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(torch_item(loss))

    def _particles(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
        """One pair a particle; a single pair of means if they are vectorised."""
        plan = None
        share = self.num_particles if self.vectorize_particles else 1
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            plan = plan or self._plan(guide, model_trace, guide_trace)
            terms = site_terms(plan, _sites(guide_trace), _sites(model_trace))
            yield plan, {name: value / share for name, value in terms.items()}

    def _plan(self, guide: Program, model_trace: Trace, guide_trace: Trace) -> Plan:
        return make_plan(guide, _sites(guide_trace), _sites(model_trace), analytic=self.analytic)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        if roles_of(model).map_sites:
            raise ModelError(
                f"map_sites={roles_of(model).map_sites} are point-estimated by fit_vem; "
                "under SVI use a Delta guide for them, on an undecorated model"
            )
        traces: tuple[Trace, Trace] = get_importance_trace(
            "flat", self.max_plate_nesting, model, guide, args, kwargs, detach=False
        )
        return traces


def _sites(trace: Trace) -> dict[str, Site]:
    """Sample sites of a trace, without subsampling and deterministic bookkeeping."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not is_subsample(site) and not is_deterministic(site)
    }
