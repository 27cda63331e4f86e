"""Log densities of our own, where those of torch and Pyro copy tables, underflow or refuse vmap."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

FEW = 8  # numbers, of which a sum is a sum of slices


def lean_log_prob(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, without copies of tables, underflow, or what torch takes long for.

    A plate expands a categorical site's table to all its rows, and torch then takes the log of
    every copy: rows x values x categories numbers, where a mixture over words looks up one each. So it
    does with weights of a mixture, and with the scale of a Normal.

    A DiscreteHMM is summed in log space: Pyro's sums exponentials that underflow where states are
    1,500 nats apart, and `torch.func.vmap` refuses their logarithm.

    A Beta goes through the two columns of a Dirichlet, whose sums take twice as long.

    A Weibull's absolute value has second derivatives that torch adds by way of its compiler, which takes
    a second to load.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = dist.Categorical(torch.tensor([0.25, 0.75])).expand([1_000_000])
        >>> lean_log_prob(fn, torch.ones(1_000_000, dtype=torch.long)).shape
        torch.Size([1000000])
    """
    # A subclass may have a density of its own.
    given = getattr(type(fn), "log_prob", None)
    own = _weibull if isinstance(fn, td.Weibull) and given is td.Weibull.log_prob else KNOWN.get(given)
    if own is None:
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    if fn._validate_args:
        fn._validate_sample(value)
    return own(fn, value)


def _categorical(fn: Any, value: Tensor) -> Tensor:
    table, total = _table(fn)
    index = value.long().unsqueeze(-1)
    shape = np.broadcast_shapes(index.shape[:-1], fn.batch_shape)  # torch's own imports sympy
    table = table.expand(*shape, table.shape[-1])
    return table.gather(-1, index.expand(*shape, 1)).squeeze(-1) - total


def _table(fn: Any) -> tuple[Tensor, Tensor]:
    """Logs of what the probabilities of a categorical distribution are proportional to, and of their sum."""
    if "logits" in fn.__dict__:  # probabilities beside them are theirs, and cut at the smallest number
        kept = collapsed(fn.__dict__["logits"], 1)
        return kept, log_sum_exp(kept, [-1])
    kept = collapsed(fn.__dict__["probs"], 1)
    logits = torch.distributions.utils.probs_to_logits(kept / kept.sum(-1, keepdim=True))
    return logits, torch.zeros((), dtype=logits.dtype)


def _mixture(fn: Any, value: Tensor) -> Tensor:
    table, total = _table(fn.mixture_distribution)
    parts = lean_log_prob(fn.component_distribution, value.unsqueeze(-1 - len(fn.event_shape)))
    return log_sum_exp(parts + table, [-1]) - total


def _normal(fn: Any, value: Tensor) -> Tensor:
    scale = collapsed(fn.scale, 0)
    return -0.5 * ((value - fn.loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _weibull(fn: Any, value: Tensor) -> Tensor:
    k, ratio = fn.concentration, value / fn.scale
    return k.log() - fn.scale.log() + (k - 1) * ratio.log() - ratio**k


def _beta(fn: Any, value: Tensor) -> Tensor:
    one, other = fn.concentration1, fn.concentration0
    powers = torch.xlogy(one - 1, value) + torch.xlogy(other - 1, 1 - value)
    return powers + torch.lgamma(one + other) - torch.lgamma(one) - torch.lgamma(other)


def _hidden_markov(fn: Any, value: Tensor) -> Tensor:
    """Forward recursion over time."""
    seen = fn.observation_dist.log_prob(value.unsqueeze(-1 - fn.observation_dist.event_dim))
    steps = (fn.transition_logits + seen.unsqueeze(-2)).unbind(-3)
    state = fn.initial_logits
    for step in steps:
        state = log_sum_exp(state.unsqueeze(-1) + step, [-2])
    return log_sum_exp(state, [-1])


def log_sum_exp(x: Tensor, dims: list[int]) -> Tensor:
    """`torch.logsumexp`, with slopes of zero instead of nan where everything is impossible (-inf)."""
    least = torch.finfo(x.dtype).min
    if len(dims) == 1 and x.shape[dims[0]] <= FEW:  # slices, whose sums and slopes are whole rows of numbers
        parts = x.unbind(dims[0])
        shift = functools.reduce(torch.maximum, [part.detach() for part in parts]).clamp(min=least)
        terms = [(part - shift).exp() for part in parts]
        total = sum(terms[1:], terms[0])
    else:
        whole = x.detach().amax(dims, keepdim=True).clamp(min=least)
        total, shift = (x - whole).exp().sum(dims), whole.squeeze(dims)
    is_possible = total != 0
    log = torch.where(is_possible, total, 1.0).log() + shift
    return torch.where(is_possible, log, -torch.inf)


def sum_last(value: Tensor, number: int) -> Tensor:
    """Summed over so many trailing dimensions; the value as it is for none."""
    return value.sum(list(range(-number, 0))) if number > 0 else value


KNOWN: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    td.Categorical.log_prob: _categorical,
    dist.Categorical.log_prob: _categorical,
    dist.DiscreteHMM.log_prob: _hidden_markov,
    td.Beta.log_prob: _beta,
    td.Normal.log_prob: _normal,
    td.MixtureSameFamily.log_prob: _mixture,
}


def collapsed(table: Tensor, event_dim: int) -> Tensor:
    """One copy along each batch dimension along which a tensor is an expanded view."""
    for dim in range(table.dim() - event_dim):
        if table.stride(dim) == 0 and table.shape[dim] > 1:
            table = table.narrow(dim, 0, 1)
    return table
