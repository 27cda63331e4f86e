"""Many runs of a program at once, under torch.func.vmap."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")
Values = Mapping[str, Tensor]

MADE = frozenset(
    [
        torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor, torch.clone, Tensor.clone,
        torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
        Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
    ]
)  # fmt: skip
REFUSAL = "inplace arithmetic"  # of vmap, where runs would write into what they share


class Together:
    """A function at a batch of points by `torch.func.vmap`, also if it fills tensors that it makes.

    A run that makes a tensor and writes into it, as Pyro's OrderedLogistic and many a loop over time do, is
    refused by vmap: one tensor would serve all runs. After such a refusal each run gets one of its own.

    Example:
        >>> def filled(at):
        ...     result = torch.zeros(2)
        ...     result[0] = at["x"]
        ...     return result
        >>> Together()(filled, {"x": torch.tensor([1.0, 2.0])})
        tensor([[1., 0.],
                [2., 0.]])
    """

    def __init__(self) -> None:
        self._owned = False

    def __call__(self, one: Callable[[Any], Result], batch: Values) -> Result:
        """`one` at each point: the first dimension of what goes in, and of what comes out.

        Raises:
            Exception: what vmap raises where it refuses the function all the same.
        """
        if not self._owned:
            try:
                return torch.func.vmap(one, randomness="same")(dict(batch))
            except RuntimeError as error:
                if REFUSAL not in str(error):
                    raise
        result = torch.func.vmap(lambda at: _with_own(one, at), randomness="same")(dict(batch))
        self._owned = True
        return result


def one_by_one(one: Callable[[Any], dict[str, Tensor]], batch: Values, num: int) -> dict[str, Tensor]:
    """A function at so many points of a batch, one after another."""
    rows = [one({name: value[i] for name, value in batch.items()}) for i in range(num)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _with_own(one: Callable[[Any], Result], at: dict[str, Tensor]) -> Result:
    zero = torch.zeros_like(next(iter(at.values())).detach().sum())  # one for each run
    with _Own(zero):
        return one(at)


class _Own(TorchFunctionMode):
    """Adds the runs' dimension to floating tensors that are made, whatever of."""

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in MADE and made.is_floating_point():
            return made + self.zero.to(made)
        return made
