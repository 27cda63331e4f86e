"""The last passes over all rows of a fit on batches, on many draws."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..guides.factorised import FactorisedNormal
from .batched import BatchFit
from .locals import natural_step
from .scales import free_sites

FINAL_PAIRS = 2048  # for a pass over all rows: shared among its batches, 16 to 256 each
LAST_ROUNDS = 4  # natural-gradient steps of the rows of a batch
LONGEST, NEAR = 2.0, 0.1  # steps along a direction; off one step, where rows need no pass of their own


def settled(fit: BatchFit, x: Tensor) -> Tensor:
    """All rows twice more, on many draws: E-steps of their factors, and of those that they share.

    The natural-gradient step of a shared factor takes the gradient of all rows, so that its sd does
    not carry the noise of the last batches. Each takes it by itself, which goes too far where they are
    correlated: the slopes at both ends of the step say where along it the bound is highest.
    """
    guide = fit.first.guide
    shared = [s for s in free_sites(guide) if s not in {site.name for site in fit.locals.sites}]
    if not isinstance(guide, FactorisedNormal) or not (shared or fit.locals.sites):
        return x
    generator = torch.Generator().manual_seed(1)
    before = {n: v.detach() for n, v in fit.block.constrained(x).items()}
    names = [(guide.loc_name(s), guide.scale_name(s)) for s in shared]
    slopes = _slopes(fit, before, names, generator)
    first = _stepped(before, slopes, names)
    later = _slopes(fit, first, names, generator)
    steps = {loc: first[loc] - before[loc] for loc, _ in names}
    share = _best_share(*(sum(float((s[n] * d).sum()) for n, d in steps.items()) for s in (slopes, later)))
    second, found = _stepped(first, later, names), dict(before)
    for loc, scale in names:
        here, there = (values[scale].square().reciprocal() for values in (first, second))
        found[loc] = before[loc] + share * steps[loc]
        found[scale] = torch.lerp(here, there, min(share, 1.0)).rsqrt()
    if names and fit.locals.sites and abs(share - 1) > NEAR:
        _slopes(fit, found, [], generator)
    return fit.block.flat(found)


def _best_share(start: float, end: float) -> float:
    """Where the bound is highest along a step, from its slopes at both ends; 0 where the end has none."""
    if not math.isfinite(end):
        return 0.0
    return min(LONGEST, start / (start - end)) if start > end else LONGEST


def _slopes(
    fit: BatchFit, values: Mapping[str, Tensor], names: list[tuple[str, str]], generator: torch.Generator
) -> dict[str, Tensor]:
    """The gradient of all rows in shared factors, once the factors of rows have taken their E-steps."""
    total = {n: torch.zeros_like(values[n]) for pair in names for n in pair}
    pairs = min(256, max(16, FINAL_PAIRS * fit.source.size // fit.rows.total))
    for index, call in fit.epoch(0, is_shuffled=False):
        noise = fit.noise(call, pairs, generator)
        rows: dict[str, Tensor] = {}
        if fit.locals.sites:
            assert index is not None
            rows = fit.locals.e_step(fit, fit.block.flat(values), index, call, noise, LAST_ROUNDS)
        if not total:
            continue
        leaves = {n: values[n].clone().requires_grad_() for n in total}
        bound = fit.bound({**values, **rows, **leaves}, call, noise)
        found = torch.autograd.grad(bound, list(leaves.values()))
        for name, gradient in zip(total, found, strict=True):
            total[name] += gradient * fit.rows.size(call) / fit.rows.total
    return {name: fit.processes.total(value) for name, value in total.items()}


def _stepped(
    values: Mapping[str, Tensor], slopes: Mapping[str, Tensor], names: list[tuple[str, str]]
) -> dict[str, Tensor]:
    """A natural-gradient step of each factor by itself."""
    found = dict(values)
    for loc, scale in names:
        found[loc], found[scale] = natural_step(values[loc], values[scale], slopes[loc], slopes[scale])
    return found
