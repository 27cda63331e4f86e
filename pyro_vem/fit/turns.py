"""Steps along which products of latents stay as they are: coordinates of their own."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bound.compiled.turning import Places, turnable
from ..bound.deterministic import Deterministic
from ..guides.factorised import FactorisedNormal
from ..model.parameters import PartlyHeld
from .minimise import Minimum, minimise
from .setup import Setup
from .smooth import Flags, Loss, Vector, curvature_scale

MOST_PROBED = 64  # numbers of all turns whose lengths are curvatures, else estimates of these


@dataclass(frozen=True)
class Turns:
    """Matrices that turn factors against each other, as coordinates beside those of a block.

    The bound of ``z @ w.T`` hardly changes as scores and loadings are turned: its optimum lies at the end
    of a long bent valley, along which Newton steps in the means are short. In a coordinate that follows
    the bend they are not. The block's own coordinates are all still there, so that optima are the same.

    Attributes:
        sides: of each group, places in the block of what turns one way, and of what turns the other,
            (factors, columns).

    References:
        Qi and Jaakkola (2007), Parameter expanded variational Bayesian methods, NeurIPS. Luttinen and
        Ilin (2010), Transformations in variational Bayesian factor analysis to speed up learning,
        Neurocomputing 73.

    Example:
        >>> places = torch.tensor([[0], [1]]), torch.tensor([[2], [3]])
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> y = Turns((places,)).placed(torch.cat([x, torch.tensor([0.1, 0.5, -0.2, 0.3])]))
        >>> bool((y != x).all()), round(float(y[:2] @ y[2:]), 4)  # 1 * 3 + 2 * 4
        (True, 11.0)
    """

    sides: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(setup: Setup, block: str) -> "Turns | None":
        """What can be turned in a block; None if there is nothing, or several processes share it."""
        exact, guide = setup.objective.exact, setup.guide
        if not isinstance(exact, Deterministic) or not isinstance(guide, FactorisedNormal):
            return None
        if isinstance(setup.phi, PartlyHeld) or setup.processes.count > 1 or block == "M":
            return None
        if not exact.variables.is_unconstrained:
            return None
        slots = (slot for term in exact.compiled.terms.values() for slot in term.slots.values())
        groups = turnable(slot.products for slot in slots if slot.products is not None)
        where = [[_where(setup, guide, side, block) for side in group] for group in groups]
        sides = [(first, second) for first, second in where if first is not None and second is not None]
        return Turns(tuple(sides)) if sides else None

    @property
    def size(self) -> int:
        """How many numbers all matrices have."""
        return sum(len(first) ** 2 for first, _ in self.sides)

    def placed(self, x: Tensor) -> Tensor:
        """The block, from its own coordinates followed by the logs of matrices."""
        x, *logs = x.split([len(x) - self.size, *(len(first) ** 2 for first, _ in self.sides)])
        for (first, second), log in zip(self.sides, logs, strict=True):
            turn = log.reshape(len(first), len(first))
            x = x.index_put((first,), torch.matrix_exp(turn) @ x[first])
            x = x.index_put((second,), torch.matrix_exp(-turn.mT) @ x[second])
        return x

    def minimise(
        self, loss: Loss, start: Vector, scale: Vector, *, log_sds: Flags | None, **settings: Any
    ) -> Minimum:
        """`minimise` with turns among the coordinates; arguments as there."""
        none, x = np.zeros(self.size), torch.as_tensor(start)

        def turned(logs: Tensor) -> Tensor:
            return loss.function(self.placed(torch.cat([x, logs])))

        lengths = curvature_scale(replace(loss, function=turned), none, MOST_PROBED)
        flags = None if log_sds is None else np.concatenate([log_sds, none > 0])
        found = minimise(
            replace(loss, function=lambda point: loss.function(self.placed(point))),
            np.concatenate([start, none]), np.concatenate([scale, lengths]), log_sds=flags, **settings,
        )  # fmt: skip
        return replace(found, x=self.placed(torch.as_tensor(found.x)).numpy(), smooth=None)


def _where(setup: Setup, guide: FactorisedNormal, side: Places, block: str) -> Tensor | None:
    """Places of some variables' means in a block; None if one of them is not in it."""
    found = []
    for name, places in side.items():
        if name.startswith("$") and block == "joint":
            start = setup.theta.positions([name[1:]]) + setup.phi.size
        elif not name.startswith("$") and name not in guide.encoded:
            start = setup.phi.positions([guide.loc_name(name)])
        else:
            return None
        found.append(start[places])
    return torch.cat(found, 1)
