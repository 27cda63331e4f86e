"""Blocks of parameters: named constrained tensors as one flat unconstrained vector, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import Transform

from ..errors import ModelError
from .support import plain_parts


def is_identity(transform: Transform) -> bool:
    """True for the bijector of a real support.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> is_identity(biject_to(constraints.real)), is_identity(biject_to(constraints.positive))
        (True, False)
    """
    return not plain_parts([transform])


def is_elementwise(transform: Transform) -> bool:
    """True for a bijector that moves each element by itself.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> is_elementwise(biject_to(constraints.positive)), is_elementwise(biject_to(constraints.simplex))
        (True, False)
    """
    return all(part.domain.event_dim == 0 for part in plain_parts([transform]))


def off_boundary(name: str, transform: Transform, value: Tensor) -> None:
    """Raise `ModelError` for a value at the edge of its constraint, where no step can move it.

    Example:
        >>> off_boundary("sd", transform_to(torch.distributions.constraints.positive), torch.tensor(1e-8))
    """
    inverse = transform.inv(value)
    stuck = ~torch.isfinite(inverse)
    if is_elementwise(transform):
        moved = (transform(inverse + 0.1) - value).abs()
        stuck = stuck | (moved <= 1e-9 * value.abs())  # torch clamps: 1 in (0, 1) has a finite logit
    if bool(stuck.any()):
        raise ModelError(
            f"{name!r} starts at {value.tolist()}, the edge of its constraint, from where no step can "
            "move it: start it inside"
        )


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its constraint, and its initial value on the constrained scale.

    Example:
        >>> import pyro.distributions as dist
        >>> Parameter("tau", dist.constraints.positive, torch.tensor(1.0)).unconstrained
        tensor(0.)
    """

    name: str
    constraint: Any
    init: Tensor

    @property
    def unconstrained(self) -> Tensor:
        """The initial value on the unconstrained scale."""
        return transform_to(self.constraint).inv(self.init).detach()

    def moved(self, by: Tensor | float) -> Tensor:
        """The constrained value at a distance from the start on the unconstrained scale."""
        value: Tensor = transform_to(self.constraint)(self.unconstrained + by)
        return value

    @property
    def is_real(self) -> bool:
        """True if the parameter is its own unconstrained value."""
        return is_identity(transform_to(self.constraint))


class Block:
    """Parameters that one step moves together.

    Example:
        >>> import pyro.distributions as dist
        >>> block = Block([Parameter("tau", dist.constraints.positive, torch.tensor(2.0))])
        >>> block.constrained(torch.zeros(1))
        {'tau': tensor(1.)}
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self._shapes = [p.unconstrained.shape for p in self.parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.parameters)

    def initial(self) -> Float[Tensor, " n"]:
        """The initial values as one flat unconstrained float64 vector."""
        return self.flat({p.name: p.init for p in self.parameters})

    def flat(self, values: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """Constrained values by name as one flat unconstrained float64 vector."""
        parts = [
            transform_to(p.constraint).inv(values[p.name].detach().double()).reshape(-1)
            for p in self.parameters
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def constrained(self, flat: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """The flat vector as constrained values by name; differentiable."""
        pieces = flat.split(self._sizes)
        return {
            p.name: transform_to(p.constraint)(piece.reshape(shape))
            for p, piece, shape in zip(self.parameters, pieces, self._shapes, strict=True)
        }

    def where(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """True at the entries of the flat vector that belong to `names`."""
        wanted = set(names)
        flags = [np.full(n, p.name in wanted) for p, n in zip(self.parameters, self._sizes, strict=True)]
        return np.concatenate(flags) if flags else np.zeros(0, dtype=bool)

    def positions(self, names: Iterable[str]) -> Tensor:
        """Indices of `names`, in the order given, into the flat vector."""
        ends = np.cumsum(self._sizes)
        spans = {
            p.name: torch.arange(int(end) - n, int(end))
            for p, n, end in zip(self.parameters, self._sizes, ends, strict=True)
        }
        parts = [spans[name] for name in names]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


class PartlyHeld(Block):
    """Parameters of which some stand still at given values.

    Example:
        >>> import pyro.distributions as dist
        >>> both = [Parameter(name, dist.constraints.real, torch.tensor(0.0)) for name in ("a", "b")]
        >>> PartlyHeld(both, {"b": torch.tensor(2.0)}).constrained(torch.ones(1))
        {'a': tensor(1.), 'b': tensor(2.)}
    """

    def __init__(self, parameters: Iterable[Parameter], held: Mapping[str, Tensor]) -> None:
        super().__init__(p for p in parameters if p.name not in held)
        self.held = dict(held)

    def constrained(self, flat: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """All values by name."""
        return {**super().constrained(flat), **self.held}
