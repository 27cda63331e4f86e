"""Sums over discrete sites: log of the sum over their values of exp(sum of factors).

At expected log factors this is what exact responsibilities make of the bound: its gradient in a
factor is the posterior marginal of that factor's discrete sites.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from opt_einsum import contract_path, get_symbol
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from ...errors import UnsupportedModelError
from ...model.density import log_sum_exp

Scale = float | Tensor


@dataclass(frozen=True)
class Factor:
    """A log factor over discrete sites: (K, ..., plates)."""

    name: str
    value: Tensor
    discrete: tuple[int, ...]
    scale: Scale


def components(factors: Iterable[Factor]) -> list[list[Factor]]:
    """Factors that share discrete sites, directly or not, together."""
    groups: list[tuple[set[int], list[Factor]]] = []
    for factor in factors:
        touched = [group for group in groups if group[0] & set(factor.discrete)]
        merged: tuple[set[int], list[Factor]] = (set(factor.discrete), [])
        for group in touched:
            merged[0].update(group[0])
            merged[1].extend(group[1])
            groups.remove(group)
        merged[1].append(factor)
        groups.append(merged)
    return [members for _, members in groups]


def seat(factors: list[Factor], observed: Collection[str]) -> str:
    """The site at which what is summed out together stands: its first observed one, else its first."""
    return next((factor.name for factor in factors if factor.name in observed), factors[0].name)


def log_sum(factors: list[Factor], plates: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The scaled log sum of one component, in nats; see `log_rows` for the arguments."""
    return log_rows(factors, plates).sum()


def log_rows(factors: list[Factor], plates: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The scaled log sum of one component, by row of the plates of its discrete site.

    Plates that discrete sites are outside of are not told apart.

    Args:
        factors: of the component.
        plates: dimensions (from the right) of the plates that each discrete site is in.

    Raises:
        UnsupportedModelError: where scales differ within what is summed together.
    """
    sites = {identity for factor in factors for identity in factor.discrete}
    scale = _common_scale(factors)
    if len(sites) == 1:
        (identity,) = sites
        total = None
        for factor in factors:
            value = _outside(factor.value, 1, plates[identity])
            total = value if total is None else total + value
        assert total is not None
        return scale * total.logsumexp(0)
    if isinstance(scale, Tensor) and scale.numel() > 1:
        raise UnsupportedModelError("discrete sites that depend on each other need one scale, not one a row")
    return scale * _contract(factors)


def _outside(value: Tensor, leading: int, kept: tuple[int, ...]) -> Tensor:
    """Summed over the plates that the discrete site is not in."""
    depth = value.dim() - leading
    others = [d for d in range(-depth, 0) if d not in kept and value.shape[d] > 1]
    return value.sum(others, keepdim=True) if others else value


def _common_scale(factors: list[Factor]) -> Scale:
    scale = factors[0].scale
    for factor in factors[1:]:
        other = factor.scale
        same = scale is other or (
            torch.equal(*torch.broadcast_tensors(torch.as_tensor(scale), torch.as_tensor(other)))
        )
        if not same:
            raise UnsupportedModelError(
                f"sites {factors[0].name!r} and {factor.name!r} share a discrete site, but their scales "
                "differ: put both into one poutine.scale"
            )
    return scale


def _contract(factors: list[Factor]) -> Tensor:
    """Sum out what depends on each other, by Pyro's message passing over plates and log sums of our own."""
    identities = sorted({identity for factor in factors for identity in factor.discrete})
    names = {identity: get_symbol(i) for i, identity in enumerate(identities)}
    depth = max(f.value.dim() - len(f.discrete) for f in factors)
    plates = [get_symbol(len(names) + d) for d in range(depth)]
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    for factor in factors:
        depth = factor.value.dim() - len(factor.discrete)
        labels = [names[identity] for identity in factor.discrete] + [
            plates[-d - 1] for d in range(-depth, 0)
        ]
        kept = [i for i, size in enumerate(factor.value.shape) if size > 1]
        tensor = factor.value.reshape([factor.value.shape[i] for i in kept])
        symbols = "".join(labels[i] for i in kept)
        tensor._pyro_dims = symbols  # type: ignore[attr-defined]
        sizes.update(zip(symbols, tensor.shape, strict=True))
        tree.setdefault(frozenset(symbols) & frozenset(plates), []).append(tensor)
    contracted = contract_tensor_tree(tree, set(names.values()), ring=LogSums(dim_to_size=sizes))
    terms = [term for members in contracted.values() for term in members]
    if len(terms) > 1:
        return torch.stack([term.sum() for term in terms]).sum()
    (term,) = terms
    labels = list(term._pyro_dims)
    kept = [label for label in reversed(plates) if label in labels]
    rows = term.permute([labels.index(label) for label in kept]) if kept else term
    return rows.reshape([sizes[label] if label in labels else 1 for label in reversed(plates)])


class LogSums(LogRing):  # type: ignore[misc]
    """Log sums whose values and slopes are right however far factors pull apart.

    Pyro's sum exponentials that are scaled factor by factor: where two factors have their largest values at
    other states, those vanish, and their slopes are clamped below 1e-16. (Its logarithm is also one that
    `torch.func.vmap` refuses.) Here exponentials are scaled by the largest of their products.
    """

    def sumproduct(self, terms: Sequence[Tensor], dims: Collection[str]) -> Tensor:
        """The log of the sum over `dims` of the product of exponentials of `terms`."""
        left = [(term._pyro_dims, term) for term in terms]  # type: ignore[attr-defined]
        output = "".join(sorted(set().union(*(names for names, _ in left)) - set(dims)))
        equation = ",".join(names for names, _ in left) + "->" + output
        order, _ = contract_path(equation, *(term.shape for _, term in left), shapes=True, optimize="auto")
        for places in order:
            pair = [left.pop(place) for place in sorted(places, reverse=True)]
            wanted = set(output).union(*(names for names, _ in left))
            left.append(_log_sum_of(pair, wanted))
        ((names, term),) = left
        result = term.permute([names.index(name) for name in output])
        result._pyro_dims = output  # type: ignore[attr-defined]
        return result


def _log_sum_of(terms: Sequence[tuple[str, Tensor]], wanted: Collection[str]) -> tuple[str, Tensor]:
    """The log of the sum over all names but the wanted ones of the product of exponentials of terms."""
    every = "".join(sorted(set().union(*(names for names, _ in terms))))
    total: Tensor | float = 0.0
    for names, term in terms:
        axes = [names.index(name) for name in every if name in names]
        total = total + term.permute(axes).reshape(
            [term.shape[names.index(name)] if name in names else 1 for name in every]
        )
    assert isinstance(total, Tensor)
    summed = [place for place, name in enumerate(every) if name not in wanted]
    kept = "".join(name for name in every if name in wanted)
    return kept, log_sum_exp(total, summed) if summed else total
