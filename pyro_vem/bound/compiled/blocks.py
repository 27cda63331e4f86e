"""Many small terms of one family as one block of rows: a loop over sites costs what a plate does.

The variables of a term become columns: column c holds, row by row, an index into the vector of all
variables and a coefficient, zero where a term has fewer. Latents and parameters have columns of
their own, so that a column is either random or not.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from .affine import AffineSlot, Local
from .expect import CompiledTerm
from .forms import KINKED
from .moments import LATENTS, PARAMETERS, Where
from .slots import RATIO, RESIDUAL

MOST_COLUMNS = 8
MOST_ROWS = 100_000  # of one term beyond which it gains nothing from company


def merge(
    terms: Mapping[str, CompiledTerm], where: Where
) -> tuple[list[CompiledTerm], dict[str, CompiledTerm]]:
    """Blocks of rows, and the terms that stay alone.

    Args:
        terms: compiled terms by site.
        where: slices of the variables in the vector of all of them.
    """
    groups: dict[object, list[str]] = {}
    alone = dict(terms)
    for name, term in terms.items():
        if _is_mergeable(term):
            spec = term.spec
            key = (spec.family, spec.slots, spec.is_log and spec.latent is None, *_layout(term))
            groups.setdefault(key, []).append(name)
    blocks = []
    for names in groups.values():
        if len(names) > 1:
            blocks.append(_block([alone.pop(name) for name in names], where))
    return blocks, alone


def _is_mergeable(term: CompiledTerm) -> bool:
    spec = term.spec
    is_plain = spec.latent is None or spec.slots[0] in (RESIDUAL, RATIO)
    slots = term.slots.values()
    return (
        is_plain
        and not any(slot.conditions or slot.denses or slot.products is not None for slot in slots)
        and len(spec.weight) <= MOST_ROWS
        and max(map(len, _columns(term))) <= MOST_COLUMNS
    )


def _layout(term: CompiledTerm) -> tuple[object, ...]:
    """What must agree beside the family: in quadratures the random slots, and the nodes."""
    spec = term.spec
    if term.form.dims == 0 and spec.slots[0] in (RESIDUAL, RATIO) and spec.family not in KINKED:
        return ()
    return spec.latent is None, term.random_slots, term.is_alike, term.condition_nodes, term.slot_nodes


def _columns(term: CompiledTerm) -> tuple[list[str], list[str]]:
    """Latents and parameters of a term, in order."""
    names = list(dict.fromkeys(name for slot in term.slots.values() for name in slot.locals))
    return [n for n in names if n in term.latents], [n for n in names if n not in term.latents]


def _block(terms: list[CompiledTerm], where: Where) -> CompiledTerm:
    first = terms[0]
    columns: dict[str, list[str | None]] = {}  # the variable of each term in each column
    for kind, prefix in enumerate((LATENTS, PARAMETERS)):
        found = [_columns(term)[kind] for term in terms]
        for c in range(max(map(len, found))):
            columns[f"{prefix}{c}"] = [names[c] if c < len(names) else None for names in found]
    slots = {}
    for slot in first.slots:
        locals_ = {column: _column(terms, slot, names, where) for column, names in columns.items()}
        kept = {column: local for column, local in locals_.items() if bool(local.coefficient.any())}
        slots[slot] = AffineSlot(torch.cat([term.slots[slot].offset for term in terms]), {}, kept, {})
    specs = [term.spec for term in terms]
    values = [spec.value for spec in specs if spec.value is not None]
    spec = replace(
        specs[0],
        name=f"{len(terms)} terms",
        shape=(sum(len(s.weight) for s in specs),),
        weight=torch.cat([s.weight for s in specs]),
        value=torch.cat(values) if len(values) == len(specs) else None,
    )
    latents = frozenset(column for column in columns if column.startswith(LATENTS))
    return replace(first, spec=spec, slots=slots, latents=latents)


def _column(terms: list[CompiledTerm], slot: str, names: list[str | None], where: Where) -> Local:
    index, coefficient = [], []
    for term, name in zip(terms, names, strict=True):
        rows = len(term.spec.weight)
        local = None if name is None else term.slots[slot].locals.get(name)
        if name is None or local is None:
            start = 0 if name is None else where[name].start
            index.append(torch.full((rows,), start))
            coefficient.append(torch.zeros(rows, dtype=torch.float64))
        else:
            index.append(local.index + where[name].start)
            coefficient.append(local.coefficient)
    return Local(torch.cat(index), torch.cat(coefficient))
