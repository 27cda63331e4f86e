"""One fit by several processes, each with its own rows: sums over them, and vectors seen whole.

Every process runs the same steps in the same order. Its bound is of its own rows, with what all
share (sites outside the sharded plates) counted in equal parts, so that the bounds add up. What the
optimisers see is the whole: values and derivatives of shared entries summed, other entries side by
side in order of rank. Decisions are made on sums, or agreed upon, so that no process waits for a
step that another one does not take.
"""

import contextlib
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bound.tables import ElboTerms
from ..errors import ModelError, check_names
from ..guides.factorised import Factorised
from ..model.parameters import Block, Parameter
from ..model.prototype import Prototype
from ..model.rows import Share
from ..model.runtime import Site
from ..model.sites import Latent, Plate, near_median, plates_of

T = TypeVar("T")
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How a flat vector lies over the processes; by default there is one.

    The whole vector has the shared entries first, then each process's own in order of rank.

    Attributes:
        is_shared: entries that all processes have; None where there is one process.
        sizes: numbers of other entries, by rank.
        rank: of this process.

    Example:
        >>> Spread().whole(np.ones(2))
        array([1., 1.])
    """

    is_shared: NDArray[np.bool_] | None = None
    sizes: tuple[int, ...] = ()
    rank: int = 0

    def size(self, own: int) -> int:
        """Entries of the whole vector, where this process has so many."""
        return own if self.is_shared is None else int(self.is_shared.sum()) + sum(self.sizes)

    def whole(self, x: Vector) -> Vector:
        """A vector of this process with the entries of the others."""
        if self.is_shared is None:
            return x
        return np.concatenate([x[self.is_shared], *self._parts(x[~self.is_shared], 0)])

    def summed(self, gradient: Vector) -> Vector:
        """Derivatives of this process's bound as those of all bounds together."""
        if self.is_shared is None:
            return gradient
        count = int(self.is_shared.sum())
        parts = self._parts(np.concatenate([gradient[self.is_shared], gradient[~self.is_shared]]), count)
        # In order of rank: the same bits everywhere.
        return np.concatenate(
            [np.sum([part[:count] for part in parts], 0), *(part[count:] for part in parts)]
        )

    def own(self, x: Vector) -> Vector:
        """What this process has of a whole vector."""
        if self.is_shared is None:
            return x
        shared = int(self.is_shared.sum())
        start = shared + sum(self.sizes[: self.rank])
        found = np.empty(len(self.is_shared))
        found[self.is_shared], found[~self.is_shared] = x[:shared], x[start : start + self.sizes[self.rank]]
        return found

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.is_shared is None else float(all_reduced(torch.tensor(value).double()))

    def _parts(self, x: Vector, before: int) -> list[Vector]:
        """A vector of every process: so many entries, and then its own."""
        padded = torch.zeros(before + max(self.sizes), dtype=torch.float64)
        padded[: len(x)] = torch.as_tensor(x)
        return [part[: before + n].numpy() for part, n in zip(_gathered(padded), self.sizes, strict=True)]


@dataclass(frozen=True)
class Processes:
    """The processes of a fit; by default there is one.

    Attributes:
        plates: whose rows are shared out.
        rank: of this process.
        count: of all.
        spreads: of the blocks "E", "M" and "joint".
        axes: where the rows are in those of the guide's parameters that belong to rows.

    Example:
        >>> Processes().any(True), Processes().total(torch.ones(2))
        (True, tensor([1., 1.]))
    """

    plates: frozenset[str] = frozenset()
    rank: int = 0
    count: int = 1
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, plates: Sequence[str]) -> "Processes":
        """Those of torch.distributed, if plates are shared out.

        Raises:
            ModelError: if torch.distributed has not been initialised.
        """
        if not plates:
            return cls()
        import torch.distributed as distributed  # of no use to most fits

        if not (distributed.is_available() and distributed.is_initialized()):
            raise ModelError(
                "FitOptions(sharded=) is for several processes: call "
                'torch.distributed.init_process_group("gloo") first, and start the script with torchrun'
            )
        return cls(frozenset(plates), distributed.get_rank(), distributed.get_world_size())

    @property
    def seed(self) -> int:
        """Added to seeds, so that draws of different processes are independent."""
        return 1_000_003 * self.rank

    @property
    def share(self) -> Share | None:
        """How sites count in this process's bound."""
        return Share(self.plates, self.count) if self.count > 1 else None

    def spread(self, block: str) -> Spread:
        """How the vector of a block lies over the processes."""
        return self.spreads.get(block, Spread())

    def has(self, plates: Iterable[Plate]) -> bool:
        """True if a site in these plates has rows of this process only."""
        return self.count > 1 and not self.plates.isdisjoint(plate.name for plate in plates)

    def start(self, init: Any) -> Any:
        """Initial values that do not depend on how rows are shared out, unless the caller gives them.

        Rows start at the median (or mean) of their prior; what all share, from a seed of its own.
        """
        if not self.plates or init is not None:
            return init

        def choose(site: Site) -> Tensor:
            if not self.plates.isdisjoint(plate.name for plate in plates_of(site)):
                return _centre(site["fn"])
            torch.manual_seed(zlib.crc32(site["name"].encode()))
            return near_median(site)

        return choose

    def agreed(self, proto: Prototype, map_sites: Collection[str]) -> Prototype:
        """The prototype with initial values that all share as the first process has them.

        Raises:
            ModelError: if a plate is unknown, or if what is to be shared differs between processes.
        """
        if not self.plates:
            return proto
        known = {plate.name for plates in proto.plates for plate in plates}
        check_names("FitOptions(sharded=)", sorted(self.plates), sorted(known))
        for name, plates in proto.observed.items():
            if self.plates.isdisjoint(plate.name for plate in plates):
                raise ModelError(
                    f"observed site {name!r} is in none of the plates {', '.join(sorted(self.plates))}: name "
                    "the plates of all data in FitOptions(sharded=), or leave data that all share out"
                )
        for name, plates in proto.summed_out.items():
            if self.plates.isdisjoint(plate.name for plate in plates):
                raise ModelError(
                    f"discrete site {name!r} is outside the plates {', '.join(sorted(self.plates))}: what is "
                    "summed out must belong to rows of one process"
                )
        for site in proto.latents:
            if site.name in map_sites and self.has(site.plates):
                raise ModelError(
                    f"MAP site {site.name!r} has rows of its own in each process, and parameters are of all "
                    "rows: leave it latent"
                )
            if sum(plate.name in self.plates for plate in site.plates) > 1:
                raise ModelError(
                    f"site {site.name!r} is in two plates of FitOptions(sharded=): name the outer"
                )
        shared = [site for site in proto.latents if not self.has(site.plates)]
        firsts = self._first(
            {**{s.name: s.init for s in shared}, **{p.name: p.init for p in proto.parameters}}
        )

        def with_first(site: Latent) -> Latent:
            return replace(site, init=firsts[site.name]) if site.name in firsts else site

        return replace(
            proto,
            latents=tuple(with_first(site) for site in proto.latents),
            parameters=tuple(replace(p, init=firsts[p.name]) for p in proto.parameters),
        )

    def _first(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values as the first process has them.

        Raises:
            ModelError: if names or shapes differ.
        """
        here = torch.get_default_device()
        every = self.gathered({name: value.detach().cpu() for name, value in values.items()})
        shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in every]
        for rank, one in enumerate(shapes):
            for name in set(one) | set(shapes[0]):
                if one.get(name) != shapes[0].get(name):
                    raise ModelError(
                        f"{name!r} has shape {shapes[0].get(name)} in process 0 and {one.get(name)} in "
                        f"process {rank}: if each has rows of its own, name its plate in FitOptions(sharded=)"
                    )
        return {name: value.to(here) for name, value in every[0].items()}

    def laid_out(
        self, guide: Any, latents: Iterable[Latent], parameters: Iterable[Parameter], num_theta: int
    ) -> tuple["Processes", tuple[Parameter, ...]]:
        """With the spreads of both blocks; and the guide's parameters, those of all as the first has them.

        Args:
            guide: with its latents bound.
            latents: that it has factors for.
            parameters: the guide's.
            num_theta: number of the model's parameters.

        Raises:
            ModelError: if it cannot be told which parameters of a guide belong to rows.
        """
        parameters = tuple(parameters)
        if self.count == 1:
            return self, parameters
        if guide is not None and not isinstance(guide, Factorised):
            raise ModelError(
                f"FitOptions(sharded=) takes our guides only, not {type(guide).__name__}: of others it is "
                "not known which parameters belong to rows"
            )
        axes: dict[str, int] = {}
        for site in (site for site in latents if self.has(site.plates)):
            assert guide is not None
            batch = site.init.dim() - site.event_dim
            axis = batch + next(p.dim for p in site.plates if p.name in self.plates)
            axes |= {p.name: axis for p in parameters if guide.is_of(p.name, site.name)}
        firsts = self._first({p.name: p.init for p in parameters if p.name not in axes})
        parameters = tuple(replace(p, init=firsts.get(p.name, p.init)) for p in parameters)
        block = Block(parameters)
        is_shared = ~block.where(axes)
        sizes = tuple(self.gathered(int((~is_shared).sum())))
        every = np.ones(num_theta, dtype=bool)
        spreads = {
            "E": Spread(is_shared, sizes, self.rank),
            "M": Spread(every, (0,) * self.count, self.rank),
            "joint": Spread(np.concatenate([is_shared, every]), sizes, self.rank),
        }
        return replace(self, axes=axes, spreads=spreads), parameters

    def gathered(self, value: T) -> list[T]:
        """A value of every process, in order of rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """True if it is in some process."""
        return flag if self.count == 1 else any(self.gathered(flag))

    def sum_of(self, value: float) -> float:
        """Of a number, over all processes."""
        return value if self.count == 1 else float(self.total(torch.tensor(value).double()))

    def union(self, values: Mapping[str, str]) -> dict[str, str]:
        """Entries of all processes, by name."""
        return {name: text for one in self.gathered(dict(values)) for name, text in one.items()}

    def first(self, text: str | None) -> str | None:
        """The first that there is, in order of rank."""
        return next((one for one in self.gathered(text) if one is not None), None)

    def most(self, value: float) -> float:
        """The largest of all processes."""
        return max(self.gathered(value))

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value if self.count == 1 else all_reduced(value)

    def table(self, terms: ElboTerms) -> ElboTerms:
        """The bound of all rows, from each process's."""
        if self.count == 1:
            return terms
        every = self.gathered(terms)
        rows = tuple(
            replace(row, value=sum(t.rows[i].value for t in every), se=_pooled([t.rows[i].se for t in every]))
            for i, row in enumerate(terms.rows)
        )
        return ElboTerms(rows, sum(t.elbo for t in every), _pooled([t.elbo_se for t in every]))

    def joined(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The guide's parameters with the rows of all processes."""
        every = self.gathered({name: phi[name].cpu() for name in self.axes})
        whole = {n: torch.cat([one[n] for one in every], axis) for n, axis in self.axes.items()}
        return {**phi, **{name: value.to(phi[name].device) for name, value in whole.items()}}

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one of the guide's parameters with the rows of all processes."""
        if name not in self.axes:
            return shape
        axis = self.axes[name]
        return (*shape[:axis], sum(self.gathered(shape[axis])), *shape[axis + 1 :])

    def taken(self, values: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Of the guide's parameters with all rows, those of this process, if there are as many.

        Args:
            values: by name.
            shapes: that they have here.
        """
        found = dict(values)
        for name, axis in self.axes.items():
            sizes = [shape[axis] for shape in self.gathered(tuple(shapes[name]))]
            if name in found and found[name].dim() > axis and found[name].shape[axis] == sum(sizes):
                found[name] = found[name].narrow(axis, sum(sizes[: self.rank]), sizes[self.rank])
        return found


def _centre(fn: Any) -> Tensor:
    """The median of each element of a distribution, or its mean where that is not known."""
    inner = fn
    while type(inner).__name__ == "Independent":
        inner = inner.base_dist
    for is_median in (True, False):
        with contextlib.suppress(NotImplementedError):
            value: Tensor = inner.icdf(torch.full(fn.shape(), 0.5)) if is_median else fn.mean
            value = value.expand(fn.shape())
            if bool(fn.support.check(value).all()) and bool(torch.isfinite(value).all()):
                return value
    torch.manual_seed(0)
    row = fn.sample((15,)).median(0).values
    return row.reshape(-1, *fn.event_shape)[0].expand(fn.shape())


def _pooled(errors: Iterable[float]) -> float:
    return float(np.sqrt(np.sum(np.square(list(errors)))))


def all_reduced(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return torch.stack(_gathered(value)).sum(0)  # in order of rank: the same bits everywhere


def _gathered(value: Tensor) -> list[Tensor]:
    import torch.distributed as distributed

    if not value.numel():
        return [value] * distributed.get_world_size()
    is_nccl = distributed.get_backend() == "nccl"  # on GPUs; gloo gathers in host memory
    here = value.detach().contiguous().to("cuda" if is_nccl else "cpu")
    parts = [torch.empty_like(here) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, here)
    return [part.to(value.device) for part in parts]
