"""The dtype that programs run in: as the default, of what they draw, and what to say where it clashes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Widened(Messenger):  # type: ignore[misc]
    """Draws and parameters in the default dtype, if theirs is narrower.

    A prior or an initial value that was made outside of the model has the dtype of that time.

    Example:
        >>> import pyro
        >>> prior = pyro.distributions.Normal(torch.zeros(2), 1.0)
        >>> with default_dtype(torch.float64), Widened():
        ...     pyro.sample("z", prior).dtype
        torch.float64
    """

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        msg["value"] = _widened(msg["value"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            msg["value"] = _widened(msg["value"])


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.get_default_dtype()))


def dtype_advice(error: Exception) -> str:
    """What to do about an error of mixed dtypes, in brackets; nothing for others.

    Example:
        >>> dtype_advice(RuntimeError("mat1 and mat2 must have the same dtype"))
        ' (fits run in float64: pass float32 tensors that the model closes over in `data`, or make ...)'
        >>> dtype_advice(ValueError("no"))
        ''
    """
    if "dtype" not in str(error) and "scalar type" not in str(error):
        return ""
    return (
        " (fits run in float64: pass float32 tensors that the model closes over in `data`, "
        "or make them with torch.get_default_dtype())"
    )
