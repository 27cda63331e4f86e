"""Gaussians seen through the bijectors of common supports: the left arguments of the table."""

from typing import Any

import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch import distributions as td


class GaussianForm:
    """An elementwise Normal(loc, scale), seen on another scale; not a distribution to draw from.

    Attributes:
        loc, scale: moments on the unconstrained scale, of one shape.
        batch_shape, event_shape: as the distribution on the constrained scale has them.
    """

    event_dim = 0

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        split = loc.dim() - self.event_dim
        self.batch_shape, self.event_shape = loc.shape[:split], loc.shape[split:]


class LogitNormal(GaussianForm):
    """A Normal through the sigmoid onto the interval (low, low + width)."""

    def __init__(self, loc: Tensor, scale: Tensor, low: Any = 0.0, width: Any = 1.0) -> None:
        super().__init__(loc, scale)
        self.low, self.width = low, width


class StickBreakingNormal(GaussianForm):
    """Independent Normals, shaped batch + (K - 1,), through stick breaking onto the simplex of K."""

    event_dim = 1

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc, scale)
        self.event_shape = torch.Size((loc.shape[-1] + 1,))


class CorrCholeskyNormal(GaussianForm):
    """Independent Normals, shaped batch + (K (K - 1) / 2,), through tanh onto correlation factors."""

    event_dim = 1

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc, scale)
        size = round((1 + (1 + 8 * loc.shape[-1]) ** 0.5) / 2)
        self.event_shape = torch.Size((size, size))


class LogNormalForm(td.LogNormal):
    """A Normal through exp: torch's LogNormal by type, without the cost of building one."""

    loc: Tensor = None  # type: ignore[assignment]
    scale: Tensor = None  # type: ignore[assignment]

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self._batch_shape, self._event_shape = loc.shape, torch.Size()


def _on_interval(loc: Tensor, scale: Tensor, start: Any, width: Any) -> LogitNormal | None:
    """The sigmoid onto an interval; a falling one is a rising one of the mirrored Normal."""
    if isinstance(width, Tensor):
        return LogitNormal(loc, scale, start, width) if bool((width > 0).all()) else None
    if width > 0:
        return LogitNormal(loc, scale, start, width)
    return LogitNormal(-loc, scale, start + width, -width)


def gaussian_form(base: td.Normal, transforms: list[Any]) -> Any | None:
    """The form of a Normal pushed through transforms, or None if there is no name for it.

    Example:
        >>> gaussian_form(td.Normal(torch.zeros(2), 1.0), [td.SigmoidTransform()]).batch_shape
        torch.Size([2])
    """
    loc, scale = base.loc, base.scale
    kinds = [type(part) for part in transforms]
    if not kinds:
        return base
    if kinds == [td.ExpTransform]:
        return LogNormalForm(loc, scale)
    if kinds == [td.SigmoidTransform]:
        return LogitNormal(loc, scale)
    if kinds == [td.SigmoidTransform, td.AffineTransform]:
        return _on_interval(loc, scale, transforms[1].loc, transforms[1].scale)
    if kinds == [td.StickBreakingTransform]:
        return StickBreakingNormal(loc, scale)
    if kinds in ([td.CorrCholeskyTransform], [pyro_transforms.CorrCholeskyTransform]):
        return CorrCholeskyNormal(loc, scale)
    return None
