"""Batches of a user's data: rows of arrays in memory or on disk, or what a DataLoader yields."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from .data import Arguments, arguments, by_column, shape_of, signature_of
from .device import as_outside

FEWEST = 4  # rows of a batch, whose halves must still be plates
Batch = tuple[Tensor | None, Arguments]
"""Numbers of the rows (None if they are not known), and the call that holds them."""


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Attributes:
        model: whose arguments are named.
        arrays: whole data by argument name; tensors, arrays, memory maps, pandas columns. Of a
            stream, its first batch.
        stream: an iterable of mappings instead, one pass an epoch.
        size: rows of a batch; of a stream's first one.
        seed: of the order of rows.
        repeated: arguments that are the same in the first two batches of a stream.
    """

    model: Callable[..., Any]
    arrays: Mapping[str, Any]
    stream: Iterable[Mapping[str, Any]] | None
    size: int
    seed: int
    repeated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Callable[..., Any], data: Any, batch_size: int | None, seed: int) -> "Source":
        """The source of what a user gave as data.

        Raises:
            ModelError: if a stream can be read only once, or there is no batch size.
        """
        data = by_column(data)
        if isinstance(data, tuple | list) and not are_batches(data):
            data = dict(zip(signature_of(model).parameters, data, strict=False))
        if isinstance(data, Mapping):
            if batch_size is None or batch_size < FEWEST:
                raise ModelError(f"batch_size={batch_size}: give at least {FEWEST} rows a batch")
            arrays = {str(n): v.to_numpy() if hasattr(v, "to_numpy") else v for n, v in data.items()}
            arguments(model, {n: _taken(v, slice(0, 4)) if _has_rows(v) else v for n, v in arrays.items()})
            return cls(model, arrays, None, batch_size, seed)
        if not isinstance(data, Iterable) or isinstance(data, Tensor | np.ndarray):
            raise ModelError(f"data is a {type(data).__name__}: give a mapping, or a DataLoader of mappings")
        if isinstance(data, Iterator):
            raise ModelError(
                "data is an iterator, which ends after one epoch: give a DataLoader, a list of mappings, or "
                "an object whose __iter__ starts anew"
            )
        batches = [*itertools.islice(as_outside(data), 2)]
        if not batches:
            raise ModelError("data has no batch: give a DataLoader or a list with rows in it")
        return cls(model, batches[0], data, max(_lengths(batches[0])), seed, _repeated(*batches))

    @property
    def lengths(self) -> dict[int, list[str]]:
        """Names of the arguments by their number of rows (of a first batch, for a stream)."""
        found: dict[int, list[str]] = {}
        for name, value in self.arrays.items():
            if _has_rows(value):
                found.setdefault(int(value.shape[0]), []).append(name)
        return found

    def by(self, names: tuple[str, ...]) -> "Source":
        """The same, once it is known which arguments hold the rows: others of a stream may be longer."""
        return self if self.stream is None else replace(self, size=int(self.arrays[names[0]].shape[0]))

    def total(self, names: tuple[str, ...]) -> int:
        """Rows of all data, which these arguments hold; a stream that does not know is read once."""
        if self.stream is None:
            return int(self.arrays[names[0]].shape[0])
        if hasattr(self.stream, "batch_sampler"):  # the sampler may leave rows to others
            batches: Any = self.stream.batch_sampler
            known = batches.sampler if type(batches) is torch.utils.data.BatchSampler else None
        else:
            known = getattr(self.stream, "dataset", None)
        counts = (_lengths(batch, names)[0] for batch in as_outside(self.stream))
        return len(known) if isinstance(known, Sized) else sum(counts)

    def head(self, names: Iterable[str], num: int) -> Arguments:
        """The call with the first rows."""
        return self._call(self.arrays, tuple(names), slice(0, num))

    def epoch(
        self, names: tuple[str, ...], total: int, number: int, is_shuffled: bool = True
    ) -> Iterator[Batch]:
        """Batches of all rows, in a new order each epoch; the last one may be of another size."""
        if self.stream is not None:
            for batch in as_outside(self.stream):
                yield None, self._call(batch, names, slice(None))
            return
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(total, generator=generator) if is_shuffled else torch.arange(total)
        ends = [*range(self.size, total, self.size), total]
        if len(ends) > 1 and ends[-1] - ends[-2] < FEWEST:
            del ends[-2]  # the rest is too small for a batch of its own
        for start, end in zip([0, *ends], ends, strict=False):
            index = order[start:end]
            yield index, self._call(self.arrays, names, index)

    def _call(self, arrays: Mapping[str, Any], names: tuple[str, ...], where: Tensor | slice) -> Arguments:
        taken = {n: _taken(v, where) if n in names else v for n, v in arrays.items()}
        return Arguments.of((), taken).to(torch.get_default_device()).cast(torch.float64)


def are_batches(data: Any) -> bool:
    """True for a list of mappings: of batches that are all there."""
    return isinstance(data, list) and bool(data) and all(isinstance(batch, Mapping) for batch in data)


def _taken(value: Any, where: Tensor | slice) -> Any:
    """Some rows; of a memory map no more is read."""
    if isinstance(where, slice):
        return value[where]
    if isinstance(value, Tensor):
        return value[where.to(value.device)]
    if isinstance(value, np.memmap):
        return np.array(value[where.numpy()])
    return np.asarray(value)[where.numpy()]


def _has_rows(value: Any) -> bool:
    return bool(shape_of(value))


def _lengths(batch: Any, names: tuple[str, ...] | None = None) -> list[int]:
    """Rows of the arguments of a batch, or of some of them."""
    if not isinstance(batch, Mapping):
        raise ModelError(
            f"a batch is a {type(batch).__name__}: let the DataLoader yield mappings of the model's argument "
            "names to tensors (collate_fn=)"
        )
    sizes = [int(v.shape[0]) for n, v in batch.items() if _has_rows(v) and (names is None or n in names)]
    if not sizes:
        raise ModelError(f"a batch holds no tensor with rows{f' in {names}' if names else ''}")
    return sizes


def _repeated(first: Mapping[str, Any], second: Any = None) -> frozenset[str]:
    """Arguments that are the same in two batches, and so hold no rows."""
    others = second if isinstance(second, Mapping) else {}
    return frozenset(n for n, v in first.items() if n in others and _has_rows(v) and _equal(v, others[n]))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other)
