"""Where tensors live: a fit runs on the device of its data.

NumPy and SciPy work in the processor's memory, and draws come from its generators whatever the
device, so that fits on different devices are of the same draws. `on_device` moves what crosses.
"""

import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ModelError, UnsupportedModelError

Method = TypeVar("Method", bound=Callable[..., Any])
Owner = TypeVar("Owner")
Item = TypeVar("Item")

TO_NUMPY: tuple[Any, ...] = (Tensor.numpy, Tensor.__array__)
DRAWS = frozenset([torch.randn, torch.rand, torch.randint, torch.randperm])


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Inside, new tensors are made on `device`, and reach NumPy through the processor's memory.

    Example:
        >>> with on_device(torch.device("meta")):
        ...     torch.zeros(2).device.type
        'meta'
    """
    with ExitStack() as stack:
        if device != torch.get_default_device():
            stack.enter_context(device)
        if device.type != "cpu":
            stack.enter_context(_Crossing(device))
        yield


class _Crossing(TorchFunctionMode):
    """Copies what goes to NumPy, and what the processor's generators draw."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TO_NUMPY:
            return func(args[0].cpu(), *args[1:], **kwargs)
        generator = kwargs.get("generator")
        if func in DRAWS and generator is not None and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": generator.device}).to(self.device)
        return func(*args, **kwargs)


def device_of(values: Iterable[tuple[Any, Any]], wanted: torch.device | str | None = None) -> torch.device:
    """The device of a fit: `wanted`, or that of the tensors in the data, or torch's default.

    Args:
        values: names and values of the data.
        wanted: where data are to be moved to, wherever they are.

    Raises:
        ModelError: if the data are on several devices.
        UnsupportedModelError: for a device without float64.

    Example:
        >>> device_of([("y", torch.zeros(2)), ("n", 3)])
        device(type='cpu')
    """
    tensors = [(name, value) for name, value in values if isinstance(value, Tensor)]
    found = {value.device: name for name, value in tensors if value.dim()}
    if wanted is None and len(found) > 1:
        places = ", ".join(f"data[{name!r}] on {device}" for device, name in found.items())
        raise ModelError(f"{places}: give all of them on one device, or FitOptions(device=)")
    numbers = (value.device for _, value in tensors if value.device.type != "cpu")  # of no dimension
    usual = torch.get_default_device()
    device = torch.device(wanted) if wanted is not None else next(iter(found), next(numbers, usual))
    if device.type in ("mps", "meta"):
        why = "has no float64" if device.type == "mps" else "holds no numbers"
        raise UnsupportedModelError(f"device {device} {why}: give data on the CPU or a CUDA device")
    return device


def on_its_device(method: Method) -> Method:
    """A method that runs on the device of its object."""

    @functools.wraps(method)
    def run(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with on_device(owner.device):
            return method(owner, *args, **kwargs)

    return cast(Method, run)


def all_on_its_device(owner: type[Owner]) -> type[Owner]:
    """A class whose methods, and properties that are kept, run on the device of their object."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, functools.cached_property):
            value.func = on_its_device(value.func)
        elif inspect.isfunction(value) and not name.startswith("__"):
            setattr(owner, name, on_its_device(value))
    return owner


def as_outside(values: Iterable[Item]) -> Iterator[Item]:
    """Items of the caller's, made where theirs are: inside, no mode of a fit moves new tensors.

    Example:
        >>> with on_device(torch.device("meta")):
        ...     [value.device.type for value in as_outside(torch.zeros(n) for n in (1, 2))]
        ['cpu', 'cpu']
    """
    with torch._C.DisableTorchFunction():
        items = iter(values)
    while True:
        with torch._C.DisableTorchFunction():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def wake(device: torch.device | None) -> None:
    """Start a device, so that its generators are among those in use."""
    if device is not None and device.type == "cuda":
        torch.cuda.init()


def seed_generators(seed: int) -> None:
    """Seed torch, numpy and Python; devices only where they are in use already."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (a model may draw from numpy's global generator)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def generators() -> tuple[Any, list[Tensor]]:
    """The states of all generators that are in use."""
    return get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_generators(states: tuple[Any, list[Tensor]]) -> None:
    """Put them back."""
    set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
