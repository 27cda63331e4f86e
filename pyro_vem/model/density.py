"""Log densities of categorical sites without the copies that torch makes of their tables."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

KNOWN = (td.Categorical.log_prob, dist.Categorical.log_prob)


def lean_log_prob(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, at a categorical site with no more numbers than the table itself has.

    A plate expands a categorical site's table to all its rows, and torch then takes the log of
    every copy: rows x values x categories numbers, where a mixture over words looks up one each.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = dist.Categorical(torch.tensor([0.25, 0.75])).expand([1_000_000])
        >>> lean_log_prob(fn, torch.ones(1_000_000, dtype=torch.long)).shape
        torch.Size([1000000])
    """
    if getattr(type(fn), "log_prob", None) not in KNOWN:  # a subclass may have a density of its own
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    if fn._validate_args:
        fn._validate_sample(value)
    given = "probs" if "probs" in fn.__dict__ else "logits"
    table = fn.__dict__[given]
    kept = collapsed(table, 1)
    if given == "probs":
        logits = torch.distributions.utils.probs_to_logits(kept / kept.sum(-1, keepdim=True))
    else:
        logits = kept - kept.logsumexp(-1, keepdim=True)
    index = value.long().unsqueeze(-1)
    shape = np.broadcast_shapes(index.shape[:-1], table.shape[:-1])  # torch's own imports sympy
    logits = logits.expand(*shape, logits.shape[-1])
    return logits.gather(-1, index.expand(*shape, 1)).squeeze(-1)


def collapsed(table: Tensor, event_dim: int) -> Tensor:
    """One copy along each batch dimension along which a tensor is an expanded view."""
    for dim in range(table.dim() - event_dim):
        if table.stride(dim) == 0 and table.shape[dim] > 1:
            table = table.narrow(dim, 0, 1)
    return table
