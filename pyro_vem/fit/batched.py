"""A problem seen through batches of its rows, and what it is worth on all of them."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..bound.tables import ElboTerms, TermRow
from ..errors import ModelError, UnsupportedModelError
from ..guides.factorised import FactorisedNormal
from ..model.batches import Batch, Source
from ..model.data import Arguments
from ..model.dtypes import default_dtype
from ..model.parameters import Block
from ..model.rows import Rows
from .locals import Locals
from .options import FitOptions
from .processes import Processes
from .result import VEMResult
from .setup import Setup, encoded_moments
from .starts import initial_values
from .status import Status, Step

ENCODER_EPOCHS = 1_000_000  # from here on are the orders of rows for steps of the encoder alone
INFORMED = 512  # rows on which mutual information is estimated
MEASURED = 64  # draws of the reported bound, a batch


@dataclass
class BatchFit:
    """A problem seen through batches of its rows.

    Attributes:
        source: of the batches.
        rows: arguments and plates that follow them.
        make: sets the problem up on a batch; alone, without what processes agree upon.
        first: the problem on a first batch; others of other sizes are made when they come.
        warm: an earlier result to go on from.
    """

    source: Source
    rows: Rows
    make: Callable[[Arguments, bool], Setup]
    first: Setup
    warm: VEMResult | None = None
    setups: dict[int, Setup] = field(default_factory=dict)
    passes: dict[str, "Passes"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.rows.size(self.first.problem.call)
        self.setups[size] = self.first
        self.locals = Locals.of(self.first, self.rows)
        inside = self.locals.names
        self.block = Block(
            p for p in (*self.first.phi.parameters, *self.first.theta.parameters) if p.name not in inside
        )
        self.has_network = any("$$$" in name for name in self.block.names)
        self.processes = self.first.processes
        self.total = round(self.processes.sum_of(self.rows.total))  # rows of all processes
        guide = self.first.guide
        encoded = set(guide.encoded) if isinstance(guide, FactorisedNormal) else set()
        self.is_amortized = bool(encoded) and encoded == {s.name for s in self.first.prototype.latents}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, those of all rows among them, constrained."""
        found = {p.name: tuple(p.init.shape) for p in self.block.parameters}
        found |= {name: tuple(value.shape) for name, value in self.first.held.items()}
        inside = self.locals.shapes(self.first.phi)
        return found | {name: self.processes.whole_shape(name, shape) for name, shape in inside.items()}

    @property
    def start(self) -> Tensor:
        """Where what rows share starts, flat."""
        return torch.as_tensor(initial_values(self.first, self.block, self.warm))

    def at(self, call: Arguments) -> Setup:
        """The problem on a batch, set up for its number of rows."""
        size = self.rows.size(call)
        if size not in self.setups:
            self.setups[size] = self.make(call, True)
        return self.setups[size]

    def weight(self, call: Arguments) -> float:
        """What a step on a batch counts for.

        A stream may give the same rows in a small batch each time, so that they would count for more than
        the rows of a large one. Rows of arrays change places, and a short last batch is as good as another.
        """
        return self.rows.size(call) / self.source.size if self.source.stream is not None else 1.0

    def value(
        self, x: Tensor, rows: Mapping[str, Tensor], call: Arguments, noise: Mapping[str, Tensor]
    ) -> Tensor:
        """The bound that a batch stands for, in nats, on some draws; differentiable in x and rows."""
        return self.bound({**self.block.constrained(x), **rows}, call, noise)

    def summed(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """A bound and its gradient over all processes."""
        if self.processes.count == 1:
            return value, gradient
        both = self.processes.total(torch.cat([value.reshape(1), gradient]))
        return both[0], both[1:]

    def bound(self, values: Mapping[str, Tensor], call: Arguments, noise: Mapping[str, Tensor]) -> Tensor:
        """The same at constrained parameters by name."""
        return torch.stack(list(self.terms(values, call, noise).values())).sum()

    def annealed(self, x: Tensor, call: Arguments, noise: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The bound with its KL terms times a weight: what a network climbs in its first epochs."""
        terms = self.terms(self.block.constrained(x), call, noise)
        kinds = {row.site: row.kind for row in self.at(call).objective.plan.rows}
        parts = [value if kinds[name] == "likelihood" else weight * value for name, value in terms.items()]
        return torch.stack(parts).sum()

    def terms(
        self, values: Mapping[str, Tensor], call: Arguments, noise: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each term of the bound."""
        setup = self.at(call)
        return setup.objective.on(call, noise).terms(*_apart(setup, values))

    def found(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's parameters and the guide's, those of all rows among them."""
        values = {name: value.detach() for name, value in self.block.constrained(x).items()}
        theta = {name: values[name] for name in self.first.theta.names}
        phi = {name: values[name] for name in self.first.phi.names if name in values}
        return {**theta, **self.first.held}, self.processes.joined({**phi, **self.locals.taken(None)})

    def snapshot(self, x: Tensor, history: tuple[Step, ...], epochs: int) -> VEMResult:
        """A fit on its way; its bound is the average of the last epoch."""
        bound, seconds = history[-1].after, sum(step.seconds for step in history)
        objective = self.first.objective
        return VEMResult(
            *self.found(x), bound, 0.0, Status.interrupted, epochs, history, seconds, objective.shown_plan,
            ElboTerms((), bound, 0.0), objective.seed,
        )  # fmt: skip

    def noise(self, call: Arguments, pairs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Standard normal draws: one, or antithetic pairs with unit variance where there are enough."""
        made = {}
        for spec in self.at(call).objective.specs:
            draws = torch.randn(max(1, pairs), *spec.shape, generator=generator, dtype=torch.float64)
            if pairs > 1:
                draws = draws / draws.square().mean(0).sqrt()
            made[spec.name] = torch.cat([draws, -draws]) if pairs else draws
        return made

    def epoch(self, number: int, is_shuffled: bool = True) -> Iterator[tuple[Tensor | None, Arguments]]:
        """Batches of all rows; each is held against the rows that it should have.

        Shuffled ones are for steps, which several processes take together.
        """
        if is_shuffled and self.processes.count > 1:
            kind = "encoder" if number >= ENCODER_EPOCHS else "all"
            if kind not in self.passes:
                make = partial(self.source.epoch, self.rows.names, self.rows.total)
                self.passes[kind] = Passes(self.processes, make, number)
            batches = self.passes[kind].epoch()
        else:
            batches = self.source.epoch(self.rows.names, self.rows.total, number, is_shuffled)
        for index, call in batches:
            lengths = {len(v) for n, v in call.kwargs.items() if n in self.rows.names}
            if len(lengths) != 1 or (index is not None and lengths != {len(index)}):
                raise ModelError(
                    f"a batch has {sorted(lengths)} rows in {', '.join(self.rows.names)}: they must agree"
                )
            yield index, call


def check_batches(fit: BatchFit, is_validated: bool, options: FitOptions) -> None:
    """Refuse what batches cannot be fitted with.

    Raises:
        UnsupportedModelError: for closed forms, and for factors of rows beside a network.
        ModelError: for values of single rows that no batch would keep, and settings that do not fit.
    """
    if fit.first.lifted is not None:
        raise UnsupportedModelError(
            "closed forms and discrete sites are fitted on all rows at once: leave batch_size= out"
        )
    for name in fit.first.map_sites_in(fit.rows.all_plates):
        raise ModelError(
            f"map site {name!r} has a value for each row, which batches do not keep: give it "
            "a factor (leave it out of map_sites=), or fit all rows at once (leave batch_size= out)"
        )
    apart = set(fit.processes.axes) - fit.locals.names
    if apart:
        raise ModelError(
            f"{', '.join(sorted(apart))} belong to a plate of FitOptions(sharded=) that is not over the "
            "rows of batches: leave batch_size= out"
        )
    if options.encoder_steps > 1 and not (fit.has_network and fit.is_amortized):
        raise ModelError("FitOptions(encoder_steps=) needs an encoder for every latent (AmortizedNormal)")
    names = ", ".join(site.name for site in fit.locals.sites)
    if names and is_validated:
        raise ModelError(f"validation= needs an encoder for {names}: held-out rows have no factors")
    if names and fit.source.stream is not None:
        raise ModelError(
            f"latent {names} has a factor for each row, and a stream of batches does not say which rows they "
            "are: give the data as a mapping, or an encoder (AmortizedNormal)"
        )
    if names and fit.has_network:
        raise UnsupportedModelError(f"latent {names} needs an encoder where a network is trained on batches")


@dataclass
class Passes:
    """Batches of a process's own rows, for steps that all processes take together.

    An epoch ends when every process has been through its rows. One with fewer batches begins again,
    and goes on from there in the next epoch, so that its rows take part alike.

    Attributes:
        processes: of the fit.
        make: the batches of a pass, by its number.
        number: of the next pass.
        length: batches of a pass, once one has ended.
    """

    processes: Processes
    make: Callable[[int], Iterator[Batch]]
    number: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        self.seen = 0  # in the first pass
        self._begin()

    def epoch(self) -> Iterator[Batch]:
        """Batches until every process has had a pass."""
        for step in itertools.count():
            item = next(self.rest, None) if self.length is None else None
            if self.length is None:
                self.seen += item is not None
                self.length = self.seen if item is None else None
            is_done = self.length is not None and step >= self.length
            if self.processes.sum_of(is_done) == self.processes.count:
                return
            yield self._next() if item is None else item

    def _next(self) -> Batch:
        item = next(self.rest, None)
        if item is None:
            self._begin()
            item = next(self.rest)
        return item

    def _begin(self) -> None:
        self.rest, self.number = self.make(self.number), self.number + 1


def _apart(setup: Setup, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the guide, and those of the model with what is held."""
    phi = {name: values[name] for name in setup.phi.names}
    return phi, {**{name: values[name] for name in setup.theta.names}, **setup.held}


def held_out_bound(fit: BatchFit, x: Tensor, source: Source, dtype: torch.dtype = torch.float64) -> float:
    """The bound of other rows, scaled to the number of rows of the fit, in nats; computed in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    total, seen = 0.0, 0
    length = next(n for n, names in source.lengths.items() if set(names) & set(fit.rows.names))
    with torch.no_grad():
        for _, call in source.epoch(fit.rows.names, length, 0, is_shuffled=False):
            size = fit.rows.size(call)
            noise = {name: value.to(dtype) for name, value in fit.noise(call, 1, generator).items()}
            with default_dtype(dtype):
                total += size * float(fit.value(x.to(dtype), {}, call.cast(dtype), noise))
            seen += size
    return fit.processes.sum_of(total / seen)


def mutual_information(fit: BatchFit, x: Tensor) -> float:
    """Of rows and latents under the encoders, in nats, on some rows with a draw for each.

    References:
        Hoffman and Johnson (2016), ELBO surgery, NIPS workshop on advances in approximate inference.
    """
    values, parts = fit.block.constrained(x.detach()), list[tuple[Tensor, Tensor]]()
    for _, call in fit.epoch(0, is_shuffled=False):
        found = encoded_moments(fit.at(call), values, call).values()
        loc, scale = (torch.cat([m.flatten(1) for m in moments], 1) for moments in zip(*found, strict=True))
        parts.append((loc, scale))
        if sum(len(loc) for loc, _ in parts) >= INFORMED:
            break
    loc, scale = (torch.cat(part)[:INFORMED] for part in zip(*parts, strict=True))
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = torch.distributions.Normal(loc, scale).log_prob((loc + scale * noise).unsqueeze(1)).sum(-1)
    own = float((density.diagonal() - density.logsumexp(1)).mean()) + math.log(len(loc))
    return fit.processes.sum_of(own) / fit.processes.count


def measured(fit: BatchFit, x: Tensor) -> ElboTerms:
    """The bound of all rows, batch by batch, on fresh draws."""
    total, square, seen = 0.0, 0.0, 0
    parts: dict[str, float] = {}
    plan = fit.first.objective.shown_plan
    for number, (index, call) in enumerate(fit.epoch(0, is_shuffled=False)):
        setup, size = fit.at(call), fit.rows.size(call)
        with torch.no_grad():
            values = {**fit.block.constrained(x), **fit.locals.taken(index)}
            found = setup.objective.on(call, None).sample(
                *_apart(setup, values), MEASURED, 7919 + number + fit.processes.seed, ("densities", "terms")
            )
        ratio = found["densities"]["log_p"] - found["densities"]["log_q"]
        total += size * float(ratio.mean())
        square += (size * float(ratio.std())) ** 2 / MEASURED
        seen += size
        for name, term in found["terms"].items():
            parts[name] = parts.get(name, 0.0) + size * float(term.mean())
    rows = tuple(TermRow.of(row, parts[row.site] / seen, 0.0) for row in plan.rows)
    return fit.processes.table(ElboTerms(rows, total / seen, square**0.5 / seen))
