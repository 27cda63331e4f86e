"""Modules that a Pyro program calls: found while it runs, and copied."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a guide module.

    Pyro's autoguides drop their model when they are copied, the original too: both get it back.
    """
    kept: list[dict[str, Any]] = [
        {key: m.__dict__[key] for key in ("_model", "_original_model", "master") if key in m.__dict__}
        for m in module.modules()
    ]
    try:
        twin = copy.deepcopy(module)
    finally:
        for m, values in zip(module.modules(), kept, strict=True):
            m.__dict__.update(values)
    for m, values in zip(twin.modules(), kept, strict=True):
        m.__dict__.update({key: value for key, value in values.items() if key != "master"})
    return twin


@contextmanager
def modules_called() -> Iterator[list[nn.Module]]:
    """Collect the outermost modules whose forward runs inside the block; their buffers are put back.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> with modules_called() as found:
        ...     _ = net(torch.zeros(1))
        >>> found == [net]
        True
    """
    found: list[nn.Module] = []
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def note(module: nn.Module, _: Any) -> None:
        if not any(module is m for known in found for m in known.modules()):
            found.append(module)
            for owner in module.modules():
                buffers = {name: b for name, b in owner._buffers.items() if b is not None}
                before.extend((owner, name, b, b.clone()) for name, b in buffers.items())

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        with torch.no_grad():
            for owner, name, buffer, value in reversed(before):  # the first snapshot is the oldest
                owner._buffers[name] = buffer.copy_(value)
