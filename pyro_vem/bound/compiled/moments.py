"""Means and standard deviations of all variables, flat, with their slices by name."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import Tensor

Where: TypeAlias = Mapping[str, slice]

LATENTS, PARAMETERS = "*latents", "*parameters"  # columns of merged rows, which index the whole vector


def slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Where each variable lies in the flat vector."""
    where, start = {}, 0
    for name, size in sizes.items():
        where[name] = slice(start, start + size)
        start += size
    return where


class Slices(Mapping[str, Tensor]):
    """A flat vector by name; slices are cut when they are asked for."""

    def __init__(self, flat: Tensor, where: Where) -> None:
        self.flat, self._where = flat, where
        self._cut: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._cut:
            self._cut[name] = self.flat[self._where[name]]
        return self._cut[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Moments:
    """Means of all variables, and standard deviations of the latent ones, which come first.

    Args:
        centre: means, latents before parameters.
        scale: standard deviations of the latents.
        where: slices of all variables in the first vector.
        latents: names of those in the second.

    Example:
        >>> import torch
        >>> where = slices({"z": 2, "$b": 1})
        >>> m = Moments(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2]), where, ["z"])
        >>> m.centre["$b"], m.scale["z"]
        (tensor([3.]), tensor([0.1000, 0.2000]))
    """

    def __init__(self, centre: Tensor, scale: Tensor, where: Where, latents: list[str]) -> None:
        self.centre = Slices(centre, where)
        self.scale = Slices(scale, {name: where[name] for name in latents})
