"""All compiled terms together: their inputs by two linear maps, then their rows one term at a time."""

from collections.abc import Iterable

from torch import Tensor

from .expect import CompiledTerm, Inputs, Key
from .linear import Linear
from .moments import Moments, Where


class Stack:
    """Some terms as a function of the moments.

    Args:
        terms: the terms.
        where: slices of the variables in the vector of means; the latents come first.
        num_latents: length of the vector of variances.
    """

    def __init__(self, terms: Iterable[CompiledTerm], where: Where, num_latents: int) -> None:
        self.terms = list(terms)
        starts = {name: span.start for name, span in where.items()}
        size = max((span.stop for span in where.values()), default=0)
        entries = [(i, key, entry) for i, term in enumerate(self.terms) for key, entry in term.inputs.items()]
        self._parts: list[dict[Key, tuple[int, int]]] = [{} for _ in self.terms]
        self._maps = []
        for kind in (False, True):
            mine = [(i, key, entry) for i, key, entry in entries if entry.of_variance is kind]
            for number, (i, key, _) in enumerate(mine):
                self._parts[i][key] = int(kind), number
            length = num_latents if kind else size
            self._maps.append(Linear(length, [entry for _, _, entry in mine], starts))

    @property
    def is_small(self) -> bool:
        """True if both maps are matrices."""
        return all(linear.is_matrix for linear in self._maps)

    def inputs(self, moments: Moments) -> list[Inputs]:
        """The inputs of each term at some moments."""
        sd = moments.scale.flat
        flats = moments.centre.flat, sd * sd
        rows = [linear(flat) for linear, flat in zip(self._maps, flats, strict=True)]
        cut = [r.split(linear.lengths) for r, linear in zip(rows, self._maps, strict=True)]
        return [{key: cut[kind][i] for key, (kind, i) in parts.items()} for parts in self._parts]

    def values(self, moments: Moments) -> list[Tensor]:
        """Weighted sum over rows of E[log p] of each term, in nats."""
        return [term.expectation(x) for term, x in zip(self.terms, self.inputs(moments), strict=True)]
