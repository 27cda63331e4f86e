"""A user's data as the positional and keyword arguments of the model."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, check_names


@dataclass(frozen=True)
class Arguments:
    """The call ``model(*args, **kwargs)``, floating tensors in one dtype.

    Example:
        >>> Arguments((1,), {"x": 2}).names
        ('x',)
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the keyword arguments, in order."""
        return tuple(self.kwargs)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Arguments":
        """A call with arrays and pandas objects as tensors."""
        named = {name: _as_tensor(name, value) for name, value in kwargs.items()}
        return cls(tuple(_as_tensor(str(i), value) for i, value in enumerate(args)), named)

    def cast(self, dtype: torch.dtype) -> "Arguments":
        """The same call with every floating tensor in `dtype`."""
        return self._with(lambda value: _cast(value, dtype))

    def to(self, device: torch.device) -> "Arguments":
        """The same call with every tensor on `device`."""
        return self._with(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def _with(self, change: Callable[[Any], Any]) -> "Arguments":
        named = {name: change(value) for name, value in self.kwargs.items()}
        return Arguments(tuple(change(value) for value in self.args), named)

    @property
    def lists(self) -> tuple[str, ...]:
        """Names (or places) of the arguments that are lists, which stay as they are."""
        return tuple(name for name, value in self.named.items() if isinstance(value, list | tuple))

    @property
    def named(self) -> dict[str, Any]:
        """Arguments by name, or by place."""
        return {**{str(i): value for i, value in enumerate(self.args)}, **self.kwargs}


def by_column(data: Any) -> Any:
    """A data frame as a mapping of its columns; everything else unchanged."""
    is_frame = hasattr(data, "columns") and hasattr(data, "to_numpy")  # of pandas or polars
    return {name: data[name] for name in data.columns} if is_frame else data


def named_values(data: Any) -> Iterable[tuple[Any, Any]]:
    """Names (or places) and values of what a user gives as data, a mapping or a tuple."""
    data = by_column(data)
    return (
        data.items()
        if isinstance(data, Mapping)
        else enumerate(data if isinstance(data, tuple | list) else ())
    )


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of an array of any library; () of everything else (a distribution has a method of that name)."""
    shape = getattr(value, "shape", ())
    return () if callable(shape) else tuple(shape)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype)
    return value


def _as_tensor(name: str, value: Any) -> Any:
    """Arrays and pandas objects become tensors; everything else passes unchanged."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value  # what autograd could not keep
    if hasattr(value, "to_numpy"):  # pandas and polars objects, without importing either
        value = value.to_numpy()
    if not isinstance(value, np.ndarray | np.generic):
        return value
    if value.dtype.kind not in "biuf":
        raise ModelError(
            f"data[{name!r}] is an array of dtype {value.dtype}: encode it as numbers first "
            "(for labels, pandas.factorize gives integer codes)"
        )
    # A copy: read-only and non-contiguous arrays are fine, and the caller's memory stays apart.
    return torch.as_tensor(np.array(value))


def arguments(model: Callable[..., Any], data: Any) -> Arguments:
    """Bind `data` to the model's signature.

    Args:
        model: the callable whose arguments are named.
        data: a mapping of argument names to tensors, arrays, pandas objects or plain values, or a
            data frame with columns of these names; a tuple or list is taken as positional arguments;
            None means no arguments.

    Raises:
        ModelError: for unknown or missing names, an array that holds no numbers, or data of another kind.

    Example:
        >>> def model(x, y=None): ...
        >>> arguments(model, {"x": np.ones(2)}).kwargs["x"]
        tensor([1., 1.], dtype=torch.float64)
    """
    data = {} if data is None else by_column(data)
    if isinstance(data, Mapping):
        call = Arguments.of((), {str(k): v for k, v in data.items()})
    elif isinstance(data, tuple | list):
        call = Arguments.of(tuple(data), {})
    elif isinstance(data, Tensor | np.ndarray) or hasattr(data, "to_numpy"):
        raise ModelError(
            "data is one array: give a mapping of the model's argument names to arrays, for example {'y': y}"
        )
    else:
        raise ModelError(
            f"data is a {type(data).__name__}: give a mapping of the model's argument names to arrays, or an "
            "iterable of such mappings for a fit on batches"
        )
    _check_signature(model, call)
    return call


def signature_of(model: Callable[..., Any]) -> inspect.Signature:
    """Of a function, or of what a module computes."""
    return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)


def _check_signature(model: Callable[..., Any], call: Arguments) -> None:
    signature = signature_of(model)
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_names("data", call.names, [p.name for p in parameters])
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ModelError(f"data do not fit the model's arguments {signature}: {error}") from error
