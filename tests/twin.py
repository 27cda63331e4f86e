"""A second device without hardware: tensors that say they are on "twin", with numbers in host memory.

As on a GPU, an operation on tensors of both devices raises, tensors do not reach NumPy, and the
processor's generators do not draw there. Registered as torch's own hook for backends in Python
(`torch.utils.backend_registration`), which no public package uses this way: for tests only.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "twin"
COPIES = ("aten::copy_", "aten::_copy_from", "aten::_to_copy")
# Indices may stay on the processor, as on CUDA, where what they index is on the device.
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# These take no number of the processor's either; elementwise operations do.
STRICT = {f"aten::{name}" for name in (
    "cat", "stack", "mm", "bmm", "addmm", "mv", "dot", "gather", "scatter", "index_add", "index_select",
    "scatter_add", "index_add_", "scatter_add_", "linalg_solve_triangular", "baddbmm",
)}  # fmt: skip
# Those whose general kernels would resize a result, which a wrapper does not follow, among them.
FACTORIES = (
    *("empty.memory_format", "empty_strided", "scalar_tensor", "_efficientzerotensor", "eye", "eye.m"),
    *("arange", "arange.start", "arange.start_step", "linspace", "randperm", "tril_indices", "triu_indices"),
)


class Twin(torch.Tensor):
    """A tensor on the twin device; `host` has its numbers."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "Twin":
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.host.tolist()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Twin({self.host})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, *args, **(kwargs or {}))


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the numbers in host memory."""
    name = op._schema.name
    if name in COPIES:
        return _copied(op, name, *args, **kwargs)
    known: dict[int, Twin] = {}
    if name in INDEXED:
        _check_indexed(name, *args)

    def opened(value: Any) -> Any:
        if isinstance(value, Twin):
            known[id(value.host)] = value
            return value.host
        if isinstance(value, torch.Tensor) and (value.dim() or name in STRICT) and name not in INDEXED:
            raise RuntimeError(f"{name}: expected all tensors to be on one device, found twin:0 and cpu")
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{name}: expected a generator of device twin, found one of cpu")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def closed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value._is_zerotensor():  # has no storage, which the kernels of a wrapper need
            value = torch.zeros(value.shape, dtype=value.dtype)
        return known[id(value)] if id(value) in known else Twin(value)

    args, kwargs = tree_map(opened, (args, kwargs))
    if any(argument.name == "device" for argument in op._schema.arguments):
        kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
    return tree_map(closed, op(*args, **kwargs))


def _check_indexed(name: str, owner: Any, indices: Any, values: Any = None, *_: Any) -> None:
    is_apart = isinstance(values, torch.Tensor) and values.dim() and not isinstance(values, Twin)
    if not isinstance(owner, Twin) or is_apart:
        raise RuntimeError(f"{name}: what is indexed and its new values should be on the device of the index")


def _copied(op: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    def host(value: Any) -> Any:
        return value.host if isinstance(value, Twin) else value

    if name == "aten::_to_copy":
        device = torch.device(kwargs.pop("device", None) or args[0].device)
        kwargs.pop("pin_memory", None)
        made = op(host(args[0]), **kwargs)
        return Twin(made) if device.type == NAME else made
    source, target = (args[0], args[1]) if name == "aten::_copy_from" else (args[1], args[0])
    host(target).copy_(host(source))
    return target


def register() -> None:
    """Make the device known to torch, once a process."""
    _setup_privateuseone_for_python_backend(NAME)
    named = torch.library.Library("aten", "IMPL")
    for name in (*FACTORIES, "_copy_from"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        named.impl(name, lambda *args, op=op, **kwargs: run(op, *args, **kwargs), "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(run, "PrivateUse1")
    KEPT.extend([named, others])


KEPT: list[Any] = []  # a library's kernels go with it
