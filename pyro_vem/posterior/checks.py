"""Looks at a fit that need no weights: one more step, other starts, the shape of the model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bound.lifted.variables import MOST_MEMBERS
from ..fit.driver import restart
from ..fit.result import VEMResult
from ..fit.scales import Scales
from ..fit.smooth import Smooth, newton_step
from ..fit.starts import merit
from ..fit.state import joint_loss, loss_of, state_at
from ..fit.stopping import scaled_gradient
from ..guides.amortized import AmortizedNormal
from ..guides.factorised import Factorised, FactorisedNormal
from ..guides.mean_field import MeanFieldNormal
from ..model.parameters import PartlyHeld
from ..model.runtime import Execution, isolated
from ..model.support import unwrapped

PRODUCTS = 50  # Hessian products of the extra E-step
COLLAPSED = 1e-3  # nats of KL per scalar below which data say nothing of a latent
START_GAP = 0.1  # nats by which another start may be better
LOC_SCALE = ("Normal", "StudentT", "Laplace", "Cauchy", "Gumbel")
SCALES = ("scale", "_unbroadcasted_scale_tril", "_unbroadcasted_cov_factor", "_unbroadcasted_cov_diag")
FEW_LATENTS = 30  # numbers up to which a full covariance, fitted on draws of all of them, takes seconds
AGREEMENT = 0.5  # sds by which means of equally good starts may differ


def one_more_step(fit: VEMResult) -> tuple[float, float]:
    """Scaled gradient norm per square root of dimension, and the nats that a Newton E-step would gain.

    References:
        An ELBO that moves by thousands of nats in one more E-step after "convergence" was seen in
        other software (PLNmodels issue 91).
    """
    setup = fit.setup
    if not setup.phi.size:
        return 0.0, 0.0
    with isolated(torch.float64):
        state = state_at(setup, fit.guide_params, fit.params, fit.elbo)
        joint = Smooth(joint_loss(setup), state.joint, Scales(setup).of(state, "joint", 0))
        gradient = scaled_gradient(joint)
        loss, x = loss_of(setup, state, "E")
        lengths = Scales(setup).of(state, "E", 0)
        smooth, zero = Smooth(loss, x, lengths), np.zeros_like(x)
        move = newton_step(loss, x, lengths, smooth.gradient(zero), PRODUCTS)
        gain = smooth.value(zero) - smooth.value(move)
    return gradient, max(0.0, float(gain))


def other_starts(fit: VEMResult, restarts: int, seed: int) -> tuple[str | None, str]:
    """A reason if another start does better or ends elsewhere, and the spread of the bounds."""
    if isinstance(fit.setup.phi, PartlyHeld):
        return None, "no other starts were looked at: infer() holds what they would move"
    again = [restart(fit, seed + i) for i in range(restarts)]
    ended = {seed + i: other for i, other in enumerate(again) if other is not None}
    merits = {number: merit(other) for number, other in ended.items()}
    bounds = [bound for is_bounded, bound in merits.values() if is_bounded and np.isfinite(bound)]
    lost = f"; {restarts - len(ended)} more have no bound" if len(ended) < restarts else ""
    if not bounds:
        return None, f"{len(ended)} other starts have all run away{lost}"
    spread = f"ELBO over {len(bounds)} other starts: {min(bounds):.3f} to {max(bounds):.3f}"
    if len(bounds) < len(ended):
        spread += f"; {len(ended) - len(bounds)} more have run away"
    spread += lost
    if max(bounds) > fit.elbo + START_GAP:
        number = max(merits, key=merits.__getitem__)
        return f"another start (seed {number}) reaches an ELBO of {max(bounds):.3f}", spread
    for other in ended.values():
        if abs(other.elbo - fit.elbo) < START_GAP and other.converged:
            name = _differs(fit.sample(1000), other.sample(1000))
            if name is not None:
                return f"an equally good optimum has another mean of site {name!r}: several modes", spread
    return None, spread


def _differs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    for name, x in a.items():
        y, sd = b[name], torch.maximum(x.std(0), b[name].std(0))
        moving = sd > 1e-9
        if bool((((x.mean(0) - y.mean(0)).abs() / sd)[moving] > AGREEMENT).any()):
            return name
    return None


def latent_scales(fit: VEMResult) -> dict[str, bool]:
    """Latent sites whose scale moves with other latents, and whether `LocScaleReparam` takes them."""
    found, runs = {}, [run_at(fit, shift) for shift in (0.0, 0.5)]
    latents = {site.name for site in fit.setup.latents}
    for name in runs[0].sites:
        first, second = (_base(run.sites[name]["fn"]) for run in runs)
        if name in latents and any(_moves(first, second, scale) for scale in SCALES):
            found[name] = type(unwrapped(runs[0].sites[name]["fn"])).__name__ in LOC_SCALE
    return found


def reparameterise(fit: VEMResult) -> list[str]:
    """LocScaleReparam for the sites whose own scale is latent, else the general advice."""
    if isinstance(fit.setup.guide, AmortizedNormal):
        return [
            "fit.amortization_gap() tells what the encoder loses, row by row: where that is much, fit for "
            "more epochs (init=fit) or widen the encoder; fit.infer(data, refine=True) gives rows factors "
            "of their own"
        ]
    wider = [f"follow correlations: {guide}" for guide in wider_guides(fit)]
    scales = latent_scales(fit)
    sites = [name for name, is_taken in scales.items() if is_taken]
    if sites:
        config = ", ".join(f"{name!r}: LocScaleReparam(0.0)" for name in sites)
        return [
            f"the scale of {', '.join(map(repr, sites))} is itself latent: "
            f"pyro.poutine.reparam(model, config={{{config}}}), from pyro.infer.reparam"
        ]
    if scales:
        return [
            f"the scale of {', '.join(map(repr, scales))} is itself latent: write it as a latent of fixed "
            "scale, scaled in the model (pyro.deterministic)"
        ]
    if fit.setup.lifted is not None:
        return [
            "fit with guide=MeanFieldNormal(model): linear response corrects it, and discrete sites are then "
            "not taken for independent of the rest",
            *wider,
        ]
    return [
        *wider,
        "reparameterise the model (pyro.infer.reparam), or hold the fit against fit.compare_nuts()",
    ]


def wider_guides(fit: VEMResult) -> list[str]:
    """Guides that follow correlations, for a fit whose own guide has independent factors."""
    guide, found = fit.setup.guide, []
    lengths = [n for site in fit.setup.prototype.latents for n in site.init.shape]
    if isinstance(guide, MeanFieldNormal) and any(1 < n <= MOST_MEMBERS for n in lengths):
        found.append(f'guide="auto" (full covariances of up to {MOST_MEMBERS} elements in conjugate models)')
    has_others = fit.setup.prototype.summed_out or fit.setup.problem.map_sites  # not for that guide
    size = sum(spec.size for spec in fit.setup.objective.specs)
    if isinstance(guide, Factorised) and size <= FEW_LATENTS and not has_others:
        found.append("guide=pyro.infer.autoguide.AutoMultivariateNormal(model)")
    return found


def run_at(fit: VEMResult, shift: float = 0.0) -> Execution:
    """The model's run with every factor at its median, or where all of its noise is `shift`."""
    noise = {spec.name: torch.full(spec.shape, shift).double() for spec in fit.setup.objective.specs}
    with isolated(torch.float64), torch.no_grad():
        return fit.setup.problem.run(fit.guide_params, fit.params, noise)[1]


def _moves(first: Any, second: Any, attribute: str) -> bool:
    """Whether an attribute of two distributions is a tensor and differs."""
    one, other = getattr(first, attribute, None), getattr(second, attribute, None)
    return isinstance(one, Tensor) and not torch.equal(one, torch.as_tensor(other))


def _base(fn: Any) -> Any:
    """The distribution inside others."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def unmoved(fit: VEMResult) -> list[str]:
    """Sites whose factor is their prior: the data say nothing of them, or an encoder has collapsed."""
    guide, notes = fit.setup.guide, []
    encoded = guide.encoded if isinstance(guide, FactorisedNormal) else ()
    sizes = {site.name: site.init.numel() for site in fit.setup.prototype.latents}
    for row in fit.terms.rows:
        is_exact = row.kind == "KL" and row.method in ("closed form", "quadrature")
        if is_exact and row.site in sizes and abs(row.value) < COLLAPSED * sizes[row.site]:
            why = "its encoder has collapsed" if row.site in encoded else "the data say nothing of it"
            notes.append(f"site {row.site!r}: KL to its prior {abs(row.value):.1g} nats: {why}")
    return notes
