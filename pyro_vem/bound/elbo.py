"""`AnalyticKL_ELBO`: exact KL terms where they are proved valid, samples elsewhere, for any `SVI`."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import Distribution

from ..errors import ModelError
from ..model.device import seed_generators
from ..model.modules import modules_called
from ..model.roles import roles_of
from ..model.runtime import Execution, Site, is_deterministic, is_subsample, repeatable
from .dependence import Pair, leaves_of, sites_behind, tensors_of
from .enumerated import enumerated_elbo, enumerated_terms, enumerating, is_enumerated
from .plans import make_plan
from .score import score_surrogate
from .tables import ElboTerms, Plan, TermRow
from .terms import summed, term_parts
from .weights import is_same

Program = Callable[..., Any]
Analytic: TypeAlias = Literal["auto", "require", "never"]

MOST_PROOFS = 64  # that one object remembers


class Particle(NamedTuple):
    """One draw's part of the average over draws.

    Attributes:
        terms: each row's part (one part for all, where sites are summed out).
        surrogate: counts with its gradient only.
    """

    plan: Plan
    terms: dict[str, Tensor]
    surrogate: Tensor | float


class AnalyticKL_ELBO(ELBO):  # type: ignore[misc]
    """Evidence lower bound with the exact KL at every site where it is proved valid.

    A drop-in for ``pyro.infer.Trace_ELBO`` and ``TraceEnum_ELBO``, with any guide. A latent site
    contributes ``E_q[log q - log p]``. That is the KL of its two distributions if no model parent
    of the site depends on it in the guide; at the first step this is proved for each site, by the
    order of the sites, by following values through both programs, by watching for values that
    leave torch, and by redrawing sites. Where it is not proved, or no formula is known, the site
    is sampled, and the plan says why. Scale and mask of both sites count element by element, no
    Jacobian is dropped, Pyro's AutoNormal is seen as the transformed Normal that it is.

    Sites without reparameterisation get a score-function gradient for what is downstream of them
    and keep their exact KL; sites marked ``infer={"enumerate": "parallel"}``, in guide or model,
    are summed out.

    Args:
        num_particles: draws a step.
        analytic: "auto" uses the closed form where it is valid; "require" makes a site that is
            not exact an error; "never" samples every site.
        bounds: whether an upper bound of a KL (of a mixture prior) may stand for it; the loss is
            then an upper bound of minus the ELBO, and the plan says so.
        kwargs: every other keyword of ``pyro.infer.ELBO``, ``vectorize_particles`` among them.

    Raises:
        ModelError: at the first step, if guide and model do not match, or a factor of the guide
            leaves the support of its prior.

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, for the exact KL within the
        bound; Schulman and others (2015), Gradient estimation using stochastic computation graphs.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vem import MeanFieldNormal
        >>> def model():
        ...     pyro.sample("s", dist.LogNormal(0.0, 1.0))
        >>> guide = MeanFieldNormal(model, init={"s": torch.tensor(1.0)})
        >>> round(AnalyticKL_ELBO().loss(model, guide), 4)  # exact: no draw matters
        1.8076
        >>> print(AnalyticKL_ELBO().plan(model, guide))
        site  plates  kind  method       proof
        s             KL    closed form  independent factors by construction
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        analytic: Analytic = "auto",
        bounds: bool = False,
        **kwargs: Any,
    ) -> None:
        if analytic not in ("auto", "require", "never"):
            raise ValueError(f'analytic={analytic!r}: choose "auto", "require" or "never"')
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: at least one particle is needed")
        super().__init__(num_particles=num_particles, **kwargs)
        self.analytic = analytic
        self.bounds = bounds
        self._proved: dict[tuple[Any, ...], tuple[Plan, Program, Program]] = {}
        self._enumerates = False
        self._tracer = enumerating(num_particles, kwargs)

    def plan(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Plan:
        """The method of each site for this model and guide, with its proof."""
        return next(self._particles(model, guide, args, kwargs)).plan

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> ElboTerms:
        """The bound as a table: mean over the particles of each site's term, in nats.

        Standard errors and shares of the gradient's variance need at least two particles that
        are not vectorised; the errors are nan and the shares missing otherwise.
        """
        plan: Plan | None = None
        draws, gradients = [], []
        share = 1 if self.vectorize_particles else self.num_particles
        for particle in self._particles(model, guide, args, kwargs, by_row=True):
            plan, terms = particle.plan, particle.terms
            draws.append({name: share * value.detach() for name, value in terms.items()})
            if not self.vectorize_particles and self.num_particles > 1:
                gradients.append(_gradients(terms))
        assert plan is not None
        return _table(plan, draws, _shares(gradients), is_mean=self.vectorize_particles)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, an unbiased estimate with unbiased gradients."""
        elbo: Tensor | float = 0.0
        for _, terms, surrogate in self._particles(model, guide, args, kwargs):
            for value in terms.values():
                elbo = elbo + value
            if isinstance(surrogate, Tensor):
                elbo = elbo + (surrogate - surrogate.detach())
        loss = -torch.as_tensor(elbo)
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
        self, model: Program, guide: Program, args: Any, kwargs: Any, by_row: bool = False
    ) -> Iterator[Particle]:
        """The draws one after another, or all at once if they are vectorised; their sum is the ELBO."""
        if roles_of(model).map_sites:
            raise ModelError(
                f"map_sites={roles_of(model).map_sites} are point-estimated by fit_vem; "
                "under SVI use a Delta guide for them, on an undecorated model"
            )
        if self._enumerates:
            yield from self._enumerated(model, guide, args, kwargs, by_row)
            return
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            guide_sites, model_sites = _sites(guide_trace), _sites(model_trace)
            if is_enumerated(guide_sites, model_sites):  # from here on; it is right for any other site too
                self._enumerates = True
                yield from self._enumerated(model, guide, args, kwargs, by_row)
                return
            plan = self._plan(model, guide, args, kwargs, guide_sites, model_sites)
            if is_validation_enabled():
                self._validate(model_trace, guide_trace)
            parts = term_parts(plan, guide_sites, model_sites)
            surrogate = score_surrogate(plan, guide_sites, parts) if plan.downstream else 0.0
            terms = {name: value / self.num_particles for name, value in summed(parts).items()}
            yield Particle(plan, terms, surrogate / self.num_particles)

    def _enumerated(
        self, model: Program, guide: Program, args: Any, kwargs: Any, by_row: bool
    ) -> Iterator[Particle]:
        for model_trace, guide_trace in self._tracer._get_traces(model, guide, args, kwargs):
            plan = self._plan(model, guide, args, kwargs, _sites(guide_trace), _sites(model_trace))
            terms = (
                enumerated_terms(plan, guide_trace, model_trace)
                if by_row
                else {"": enumerated_elbo(plan, guide_trace, model_trace)}
            )
            yield Particle(plan, {name: value / self.num_particles for name, value in terms.items()}, 0.0)

    def _plan(
        self, model: Program, guide: Program, args: Any, kwargs: Any, guide_sites: Any, model_sites: Any
    ) -> Plan:
        """The plan for the structure at hand: proved once, looked up afterwards."""
        key = (
            _identity(model), _identity(guide), _flags(args, kwargs),
            _structure(guide_sites, model_sites), _structure(model_sites, guide_sites),
            _parents(guide_sites, model_sites),
        )  # fmt: skip
        known = self._proved.get(key)
        if known is None or not _views_hold(known[0], guide_sites, model_sites):
            with repeatable(), modules_called():
                plan = make_plan(
                    guide, guide_sites, model_sites, _pair(model, guide, args, kwargs),
                    analytic=self.analytic, bounds=self.bounds,
                    is_replayed=not (self.vectorize_particles or self._enumerates),
                )  # fmt: skip
            if len(self._proved) >= MOST_PROOFS:
                self._proved.pop(next(iter(self._proved)))
            known = self._proved[key] = (plan, model, guide)  # alive, so that no other gets their id
        return known[0]

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Guide and model against it; densities are computed only where a term needs them."""
        guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed, graph_type="flat").get_trace(*args, **kwargs)
        return model_trace, guide_trace

    def _validate(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Pyro's own checks, after ours, which name the remedy."""
        check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        for trace in (prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)):
            trace.compute_log_prob()
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    check_site_shape(site, self.max_plate_nesting)


def _pair(model: Program, guide: Program, args: Any, kwargs: Any) -> Pair:
    """Repeatable runs: the same generator state at the start of each."""

    def runs(program: Program) -> Callable[[Execution], Execution]:
        def run(execution: Execution) -> Execution:
            seed_generators(0)
            with execution:
                program(*args, **kwargs)
            return execution

        return run

    return Pair(runs(guide), runs(model))


def _identity(program: Program) -> tuple[int, ...]:
    """The same for a method each time that it is looked up."""
    owner = getattr(program, "__self__", None)
    return (id(program),) if owner is None else (id(owner), id(program.__func__))  # type: ignore[attr-defined]


def _flags(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Arguments that switch rather than measure; integers too, where no graph shows what they do."""
    kinds = bool | str | None if torch.is_grad_enabled() else int | str | None
    return tuple(value for value in (*args, *kwargs.values()) if isinstance(value, kinds))


def _structure(sites: dict[str, Site], others: dict[str, Site]) -> tuple[Any, ...]:
    """What a proof rests on, as far as a run shows it: sites in order, and what they are made of."""
    rows = []
    for name, site in sites.items():
        other = others.get(name, site)
        rows.append((
            name, site["is_observed"], len(site["cond_indep_stack"]), (site["infer"] or {}).get("enumerate"),
            is_same(site["scale"], other["scale"]), site["mask"] is other["mask"], *_kinds(site["fn"]),
        ))  # fmt: skip
    return tuple(rows)


def _kinds(fn: Any) -> list[type]:
    """Classes of a distribution and its wrappers, and of the operations that made its arguments."""
    found = [type(fn)]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        found.append(type(fn))
    found += [type(value.grad_fn) for value in vars(fn).values() if isinstance(value, Tensor)]
    return found


def _parents(guide_sites: dict[str, Site], model_sites: dict[str, Site]) -> tuple[int, ...]:
    """What sites' distributions were made from, as far as gradients show it: a flag may couple others."""
    if not torch.is_grad_enabled():
        return ()
    values = {name: site["value"] for name, site in guide_sites.items()}
    sites = (*guide_sites.values(), *model_sites.values())
    return tuple(sites_behind(values, (_held(site["fn"]) for site in sites)))


def _held(fn: Any) -> list[Tensor]:
    """Tensors of a distribution that take part in gradients."""
    found: list[Tensor] = []
    while fn is not None:
        for part in vars(fn).values():
            if isinstance(part, Tensor):
                if part.requires_grad:
                    found.append(part)
            elif isinstance(part, list | Distribution) and part is not vars(fn).get("base_dist"):
                found += [v for v in tensors_of(part).values() if v.requires_grad]
        fn = vars(fn).get("base_dist")
    return found


def _views_hold(plan: Plan, guide_sites: dict[str, Site], model_sites: dict[str, Site]) -> bool:
    return all(view.holds(guide_sites, model_sites[name]) for name, view in plan.views.items())


def _gradients(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pathwise gradient of each term in all leaves of its graph, as one vector."""
    leaves = {id(leaf): leaf for leaf in leaves_of(terms.values())}
    rows = {}
    for name, value in terms.items():
        parts = (
            torch.autograd.grad(
                value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if value.requires_grad
            else [torch.zeros_like(leaf) for leaf in leaves.values()]
        )
        rows[name] = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(1)
    return rows


def _shares(draws: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each term's part of the summed variances of the terms' gradients."""
    if not draws:
        return {}
    variances = {name: float(torch.stack([d[name] for d in draws]).var(0).sum()) for name in draws[0]}
    total = sum(variances.values())
    return {name: value / total if total > 0 else 0.0 for name, value in variances.items()}


def _table(plan: Plan, draws: list[dict[str, Tensor]], shares: dict[str, float], is_mean: bool) -> ElboTerms:
    values = torch.stack([torch.stack([draw[row.site] for row in plan.rows]) for draw in draws])
    if is_mean or len(draws) < 2:
        se, total_se = torch.full_like(values[0], torch.nan), float("nan")
    else:
        se = values.std(0) / len(draws) ** 0.5
        total_se = float(values.sum(1).std() / len(draws) ** 0.5)
    rows = [
        TermRow.of(row, float(value), float(error), shares.get(row.site))
        for row, value, error in zip(plan.rows, values.mean(0), se, strict=True)
    ]
    return ElboTerms(tuple(rows), sum((row.value for row in rows), 0.0), total_se)


def _sites(trace: Trace) -> dict[str, Site]:
    """Sample sites of a trace, without subsampling and deterministic bookkeeping."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not is_subsample(site) and not is_deterministic(site)
    }
