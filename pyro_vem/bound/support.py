"""Whether a guide's distribution stays inside the support of its prior."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import distributions as td
from torch.distributions import constraints

from ..errors import ModelError
from ..model.support import Interval, element_of, image_of, interval_of, support_of
from .dependence import is_point
from .kl import canonical, kind_of
from .kl.forms import CorrCholeskyNormal, LogitNormal, StickBreakingNormal

# Continuous by name, discrete in their values.
STRAIGHT_THROUGH = (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough)


def check_support(name: str, q: Any, p: Any) -> None:
    """Raise `ModelError` if q puts mass where p has none: the KL is then infinite.

    Example:
        >>> from torch import distributions as td
        >>> check_support("s", td.Gamma(2.0, 1.0), td.Exponential(1.0))
        >>> check_support("s", td.Normal(2.0, 1.0), td.Exponential(1.0))
        Traceback (most recent call last):
            ...
        pyro_vem.errors.ModelError: site 's': the guide's Normal leaves the support ...
    """
    if is_point(q) or isinstance(canonical(q), STRAIGHT_THROUGH) or not _leaves(q, p):
        return
    raise ModelError(
        f"site {name!r}: the guide's {kind_of(q)} leaves the support {support_of(p)} of the prior "
        f"{kind_of(p)}, where its KL is infinite; use MeanFieldNormal, or push a Normal into the support "
        "with dist.TransformedDistribution(dist.Normal(loc, scale), biject_to(prior.support))"
    )


def _leaves(q: Any, p: Any) -> bool:
    inner_q, inner_p = element_of(_support(q)), element_of(_support(p))
    if inner_p is None or inner_q is None:
        return False
    if inner_q.is_discrete != inner_p.is_discrete:
        return True
    try:
        ours, theirs = _image(q, inner_q), _image(p, inner_p)
    except NotImplementedError:  # not known, and a fit refuses such a prior
        return False
    if ours is not None and theirs is not None:
        slack = 1e-6 * (1 + torch.nan_to_num(theirs[1] - theirs[0], posinf=0.0, neginf=0.0))
        return bool(((ours[0] < theirs[0] - slack) | (ours[1] > theirs[1] + slack)).any())
    if theirs is not None:  # a curved set inside an interval, element by element
        unbounded = torch.isinf(theirs[0]) & torch.isinf(theirs[1])
        return not bool(unbounded.all()) and _drawn_outside(q, p)
    if ours is not None:
        return True  # a full interval in every direction is no simplex, sphere or correlation matrix
    return type(inner_q) is not type(inner_p) and _drawn_outside(q, p)


def _support(fn: Any) -> Any:
    form = canonical(fn)
    if isinstance(form, td.LogNormal):
        return constraints.nonnegative
    if isinstance(form, StickBreakingNormal):
        return constraints.simplex
    if isinstance(form, CorrCholeskyNormal):
        return constraints.corr_cholesky
    if isinstance(form, LogitNormal):
        return constraints.interval(form.low, form.low + form.width)
    try:
        return fn.support
    except NotImplementedError:
        return None


def _image(fn: Any, inner: Any) -> Interval | None:
    """The interval that a distribution fills, which torch's `support` does not always show."""
    is_moved = type(canonical(fn)).__name__ == "TransformedDistribution"
    return image_of(fn) if is_moved else interval_of(inner)


def _drawn_outside(q: Any, p: Any) -> bool:
    with torch.no_grad():
        try:
            return not bool(p.support.check(q.sample((64,))).all())
        except (NotImplementedError, RuntimeError, ValueError):
            return False
