"""KL between discrete distributions of one family."""

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .table import register_kl


@register_kl(td.Bernoulli, td.Bernoulli)
def _bernoulli(q: Any, p: Any) -> Tensor:
    log = torch.nn.functional.logsigmoid
    probs = q.probs
    return probs * (log(q.logits) - log(p.logits)) + (1 - probs) * (log(-q.logits) - log(-p.logits))


@register_kl(td.Categorical, td.Categorical)
@register_kl(td.OneHotCategorical, td.OneHotCategorical)
def _categorical(q: Any, p: Any) -> Tensor:
    ours, theirs = torch.broadcast_tensors(q.logits.log_softmax(-1), p.logits.log_softmax(-1))
    # A class without mass in q adds nothing, whatever p says of it.
    gap = torch.where(ours == -torch.inf, torch.zeros_like(ours), ours - theirs)
    return (ours.exp() * gap).sum(-1)


@register_kl(td.Binomial, td.Binomial)
def _binomial(q: Any, p: Any) -> Tensor:
    return q.total_count * _bernoulli(q, p)


@register_kl(td.Poisson, td.Poisson)
def _poisson(q: Any, p: Any) -> Tensor:
    return torch.xlogy(q.rate, q.rate / p.rate) - q.rate + p.rate


@register_kl(td.Geometric, td.Geometric)
def _geometric(q: Any, p: Any) -> Tensor:
    """Failures before the first success: (1 - q)/q of them on average."""
    log = torch.nn.functional.logsigmoid
    failures = (1 - q.probs) / q.probs
    return log(q.logits) - log(p.logits) + failures * (log(-q.logits) - log(-p.logits))
