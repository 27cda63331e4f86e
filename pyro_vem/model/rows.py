"""Rows of the data: which arguments hold them, which plates run over them, and batches of them.

A batch stands for all rows if every plate over them is scaled by rows / batch, in model and guide
alike, and if rows are independent given the rest. Both are tested before a fit starts.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from ..errors import ModelError
from .batches import FEWEST, Source
from .data import Arguments
from .density import lean_log_prob
from .parameters import Parameter, off_boundary
from .prototype import discover_modules, generic_moves, parameters_of
from .runtime import Execution, Program, Site

UNBIASED = 1e-8  # of a site's log density, that halves of a batch may be off its whole


class RowScale(Messenger):  # type: ignore[misc]
    """Scales sites in plates over rows, as if a batch were all of them, and the sites outside of them.

    Args:
        plates: over rows.
        inside: factor of sites in them.
        outside: factor of all others, but for those in `scaled`.
        scaled: plates over rows that scale themselves.
    """

    def __init__(
        self,
        plates: frozenset[str],
        inside: float = 1.0,
        outside: float = 1.0,
        scaled: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.plates, self.inside, self.outside, self.scaled = plates, inside, outside, scaled

    def factor(self, plates: Iterable[str]) -> float:
        """What a site in these plates is scaled by."""
        names = frozenset(plates)
        if not self.plates.isdisjoint(names):
            return self.inside
        return self.outside if self.scaled.isdisjoint(names) else 1.0

    def _pyro_sample(self, msg: Site) -> None:
        msg["scale"] = msg["scale"] * self.factor(frame.name for frame in msg["cond_indep_stack"])


@dataclass(frozen=True)
class Share:
    """The rows of one of several processes, whose bounds add up to that of all rows.

    Attributes:
        plates: that run over the rows; a site outside of them is counted by every process.
        count: of processes.
    """

    plates: frozenset[str]
    count: int

    def around(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RowScale:
        """The handler under which sites outside the plates count once in all."""
        return RowScale(self.plates, outside=1.0 / self.count)


@dataclass(frozen=True)
class Rows:
    """Where the rows of the data are.

    Attributes:
        names: arguments whose first dimension runs over rows.
        total: rows of all data (of this process, where there are several).
        plates: that run over the rows of a batch, and are scaled here.
        scaled: that know how many rows there are, and scale themselves.
        count: of processes, each of which counts what is outside of the plates.
    """

    names: tuple[str, ...]
    total: int
    plates: frozenset[str]
    scaled: frozenset[str] = frozenset()
    count: int = 1

    @property
    def all_plates(self) -> frozenset[str]:
        """Every plate over rows."""
        return self.plates | self.scaled

    @property
    def all_unscaled(self) -> "Rows":
        """The same for a guide of ours, whose plates never scale themselves."""
        return replace(self, plates=self.all_plates, scaled=frozenset())

    def taken(self, call: Arguments, index: Tensor | slice) -> Arguments:
        """The call with some of the rows."""
        return Arguments((), {n: v[index] if n in self.names else v for n, v in call.kwargs.items()})

    def size(self, call: Arguments) -> int:
        """Rows of a call."""
        return len(call.kwargs[self.names[0]])

    def around(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RowScale:
        """The same, as a program's handler of each run."""
        return self.scaling(Arguments(args, dict(kwargs)))

    def scaling(self, call: Arguments) -> RowScale:
        """The handler under which the rows of a call stand for all."""
        return RowScale(self.plates, self.total / self.size(call), 1.0 / self.count, self.scaled)


def rows_of(source: Source) -> Rows:
    """Find the rows that a model's plates follow.

    Args:
        source: the model and its data.

    Raises:
        ModelError: if no plate follows the rows of the data; if a site or a parameter follows them
            outside such a plate; if a plate has another number of rows; or if halves of a batch do
            not average to the whole.
    """
    problems, lengths = [], source.lengths
    program = discover_modules(
        Program(source.model), source.head(next(iter(lengths.values()), []), source.size)
    )
    program.own_weights({}, torch.float64 if program.modules else None)
    for length in sorted(lengths, key=lambda n: (source.repeated.issuperset(lengths[n]), -n)):
        if length < FEWEST:
            continue
        rows = Rows(tuple(lengths[length]), length, frozenset())
        size = min(source.size, length) // 4 * 4
        call = source.head(rows.names, size)
        try:
            whole, less = (_run(program, rows.taken(call, slice(0, n))) for n in (size, size - 2))
        except Exception as error:
            problems.append(f"with {size} of {length} rows of {', '.join(rows.names)}: {error}")
            continue
        follow = _following(whole, less, size)
        if follow:
            found = _plates(whole, replace(rows, total=source.total(rows.names)), follow)
            _check_alignment(whole, less, found)
            _check_unbiased(program, call, found, whole)
            return found
    if 0 < max(lengths, default=0) < FEWEST:
        raise ModelError(
            f"{max(lengths)} rows are too few to see which plates of the model follow them: it takes {FEWEST}"
        )
    tried = f" ({problems[0]})" if problems else ""
    raise ModelError(
        f"no plate of the model follows the rows of the data{tried}: size it by them, "
        "pyro.plate('rows', len(y)), not by a number of its own"
    )


def _run(
    program: Program,
    call: Arguments,
    values: Mapping[str, Tensor] | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> Execution:
    given = values or {}
    with pyro.validation_enabled(True), torch.no_grad(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        return program.run(call.args, call.kwargs, params or {}, lambda site: given.get(site["name"]))


def _parameters(program: Program, call: Arguments) -> tuple[Parameter, ...]:
    """Those of the model; from here on weights of modules are given by name."""
    with torch.no_grad(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        run = program.run(call.args, call.kwargs, {}, lambda site: None)
        parameters = parameters_of(program, run)
    for parameter in parameters:
        off_boundary(parameter.name, transform_to(parameter.constraint), parameter.init)
    return parameters


def _frames(run: Execution) -> dict[str, tuple[int, int]]:
    """Rows and full size of every vectorised plate, by name."""
    return {
        f.name: (f.size, f.full_size if f.full_size is not None else f.size)
        for site in run.sites.values()
        for f in site["cond_indep_stack"]
        if f.vectorized
    }


def _following(whole: Execution, less: Execution, size: int) -> frozenset[str]:
    """Plates that are as long as a batch of `size` rows, and as one with two rows fewer."""
    first, second = _frames(whole), _frames(less)
    return frozenset(n for n, (s, _) in first.items() if s == size and second.get(n, (0, 0))[0] == size - 2)


def _plates(whole: Execution, rows: Rows, follow: frozenset[str]) -> Rows:
    first = _frames(whole)
    scaled = {n for n in follow if first[n][1] != first[n][0]}
    for name in scaled:
        if first[name][1] != rows.total:
            raise ModelError(
                f"plate {name!r} is scaled to {first[name][1]:,} rows, but the data have {rows.total:,}: "
                "leave the scale to fit_vem, pyro.plate(name, len(y))"
            )
    return replace(rows, plates=follow - scaled, scaled=frozenset(scaled))


def _check_alignment(whole: Execution, less: Execution, rows: Rows) -> None:
    names = ", ".join(map(repr, sorted(rows.all_plates)))
    for name, site in whole.sites.items():
        shape, other = site["fn"].shape(), less.sites[name]["fn"].shape()
        inside = any(f.name in rows.all_plates for f in site["cond_indep_stack"])
        if shape != other and not inside:
            raise ModelError(f"site {name!r} has a value for each row, but is outside plate {names}")
    for name, parameter in whole.params.items():
        if parameter["value"].shape != less.params[name]["value"].shape:
            raise ModelError(
                f"parameter {name!r} has a value for each row of a batch: a parameter is one for all rows; "
                f"make it a latent site inside plate {names}, or let a module compute it from the data"
            )


def _check_unbiased(program: Program, call: Arguments, rows: Rows, whole: Execution) -> None:
    """Halves of a batch, each scaled to all rows, must average to the batch, site by site."""
    values = {name: site["value"] for name, site in whole.latents.items()}
    parts = _parts(program, call, rows, whole, values)
    for name, value in parts[0].items():
        error = abs(0.5 * (parts[1][name] + parts[2][name]) - value)
        if not error <= UNBIASED * (1 + abs(value)):
            plates = ", ".join(map(repr, sorted(rows.all_plates)))
            raise ModelError(
                f"site {name!r}: two halves of a batch do not average to the whole (off by {error:.3g} nats "
                f"of {abs(value):.3g}): its rows in plate {plates} depend on each other, or on how many "
                "there are (a scale of the model's own?)"
            )


def _parts(
    program: Program, call: Arguments, rows: Rows, whole: Execution, values: Mapping[str, Tensor]
) -> list[dict[str, float]]:
    """Densities of a batch and of its halves, by site; at starting parameters where no others will do."""
    size = rows.size(call)

    def at(params: Mapping[str, Tensor]) -> list[dict[str, float]]:
        found = []
        for where in (slice(0, size), slice(0, size // 2), slice(size // 2, size)):
            here = {n: rows_of_value(v, whole.sites[n], rows, where) for n, v in values.items()}
            part = rows.taken(call, where)
            with rows.scaling(part):
                found.append({n: _density(s) for n, s in _run(program, part, here, params).sites.items()})
        return found

    parameters = _parameters(program, call)
    moves = generic_moves(parameters)  # where they start, what they multiply may vanish
    with contextlib.suppress(ValueError, ArithmeticError, RuntimeError):  # the model may end near its start
        parts = at({p.name: p.moved(moves[p.name]) for p in parameters})
        if all(math.isfinite(value) for part in parts for value in part.values()):
            return parts
    return at({p.name: p.init for p in parameters})


def _density(site: Site) -> float:
    value = lean_log_prob(site["fn"], site["value"])
    return float(scale_and_mask(value, site["scale"], site["mask"]).sum().detach())


def rows_of_value(value: Tensor, site: Site, rows: Rows, index: Tensor | slice) -> Tensor:
    """Some rows of a site's value."""
    dims = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name in rows.all_plates]
    if not dims:
        return value
    axis = value.dim() - site["fn"].event_dim + dims[0]
    return value.movedim(axis, 0)[index].movedim(0, axis)
