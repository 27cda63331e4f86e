"""Which values a program's distributions depend on: provenance of tensors, checked by perturbation.

Provenance is not a proof: a value that leaves torch (`float(z)`, `if z > 0`, `z.numpy()`) takes
nothing along. Such exits are watched for and taint everything after them; what even the watch
cannot see shows when a site is redrawn and something changes that should not.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model.runtime import Choose, Execution, Site

Run = Callable[[Execution], Execution]
"""Runs a program under a given recorder and returns it."""

MOST_GROUPS = 8  # of sites that are redrawn together

# Methods whose plain result tells of a tensor's shape and kind, not of its values.
_METADATA = frozenset(
    [
        "__get__", "__len__", "__hash__", "dim", "ndimension", "size", "stride", "numel", "nelement",
        "element_size", "get_device", "type", "is_floating_point", "is_complex", "is_signed", "is_contiguous",
        "is_same_size", "storage_offset", "result_type", "is_tensor", "is_storage",
    ]
)  # fmt: skip


class _Watch(TorchFunctionMode):
    """Notes the provenance of every value that leaves torch, or is written into another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.escaped: frozenset[str] = frozenset()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        is_in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if is_in_place or "out" in kwargs or (name not in _METADATA and not _holds_tensors(result)):
            self.escaped |= get_provenance([args, kwargs])
        return result


def _holds_tensors(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return all(_holds_tensors(part) for part in result)
    return result is None or isinstance(result, Tensor)


class _Tracked(Execution):
    """Records the direct parents of each site as the program runs."""

    def __init__(self, choose: Choose, watch: _Watch) -> None:
        super().__init__({}, choose)
        self.watch = watch
        self.parents: dict[str, frozenset[str]] = {}
        self.weights: dict[str, frozenset[str]] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        super()._pyro_post_sample(msg)
        name = msg["name"]
        if name not in self.sites:
            return
        before = self.watch.escaped
        found = get_provenance(list(tensors_of(msg["fn"]).values()))
        with torch.no_grad(), self.watch:  # a distribution may hold values where no attribute shows
            found |= get_provenance(msg["fn"].log_prob(msg["value"]))
        found |= self.watch.escaped
        self.watch.escaped = before
        self.parents[name] = found - {name}
        self.weights[name] = get_provenance([msg["scale"], msg["mask"]])


def tensors_of(obj: Any, path: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Every tensor that a distribution holds, through base distributions and transforms, by path.

    Example:
        >>> sorted(tensors_of(pyro.distributions.Normal(0.0, 1.0).to_event(0)))
        ['.loc', '.scale']
    """
    if isinstance(obj, Tensor):
        return {path: obj}
    if depth > 8 or isinstance(obj, torch.nn.Module):
        return {}
    found: dict[str, Tensor] = {}
    if isinstance(obj, list | tuple):
        for i, part in enumerate(obj):
            found |= tensors_of(part, f"{path}.{i}", depth + 1)
    elif isinstance(obj, torch.distributions.Distribution | torch.distributions.Transform):
        for key, part in vars(obj).items():
            if "cache" not in key:
                found |= tensors_of(part, f"{path}.{key}", depth + 1)
    return found


@dataclass(frozen=True)
class Graph:
    """Direct dependence among the sites of one program.

    Attributes:
        order: sites in program order, observed ones included.
        parents: latent sites whose values a site's distribution was made from.
        weights: latent sites that its scale or mask was made from.
        notes: what could not be followed.
    """

    order: tuple[str, ...]
    parents: Mapping[str, frozenset[str]]
    weights: Mapping[str, frozenset[str]]
    notes: Mapping[str, str] = field(default_factory=dict)

    def descendants(self, name: str) -> frozenset[str]:
        """Sites whose distribution depends on `name`, directly or through others; itself included.

        Example:
            >>> chain = Graph(("a", "b", "c"), {"a": frozenset(), "b": {"a"}, "c": {"b"}}, {})
            >>> sorted(chain.descendants("a"))
            ['a', 'b', 'c']
        """
        found = {name}
        for site in self.order:  # parents come before their children
            if self.parents[site] & found:
                found.add(site)
        return frozenset(found)

    def with_edges(self, edges: Collection[tuple[str, str]]) -> "Graph":
        """The graph with more direct dependences (parent, child), which redrawing has shown."""
        parents, notes = dict(self.parents), dict(self.notes)
        for parent, child in edges:
            parents[child] = parents[child] | {parent}
            notes[child] = "found by redrawing"
        return Graph(self.order, parents, self.weights, notes)


def everything_before(order: tuple[str, ...], note: str) -> Graph:
    """The graph of a program that could not be followed: a site may depend on all before it."""
    parents = {name: frozenset(order[:i]) for i, name in enumerate(order)}
    return Graph(order, parents, parents, dict.fromkeys(order, note))


def provenance(run: Run, values: Mapping[str, Tensor], base: Execution) -> Graph:
    """Follow tagged values through one run at fixed values."""
    watch = _Watch()

    def choose(site: Site) -> Tensor | None:
        name = site["name"]
        value = detach_provenance(point_of(site["fn"]).v) if is_point(site["fn"]) else values[name].detach()
        tagged: Tensor = track_provenance(value, frozenset({name}))
        return tagged

    tracked = _Tracked(choose, watch)
    order = tuple(base.sites)
    try:
        with watch:
            run(tracked)
    except Exception as error:
        return everything_before(
            order, f"values could not be followed ({type(error).__name__}: {error})"[:120]
        )
    if tuple(tracked.sites) != order:
        return everything_before(order, "sites change from run to run")
    return Graph(order, tracked.parents, tracked.weights)


def leaves_of(values: Iterable[Tensor], stop: Any = None) -> list[Tensor]:
    """The tensors with requires_grad that values were computed from, but for those behind a node.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> leaves_of([(2 * x).sum()])[0] is x
        True
    """
    values = list(values)
    found = [value for value in values if value.is_leaf and value.requires_grad]
    queue, seen = [value.grad_fn for value in values], set()
    while queue:
        node = queue.pop()
        if node is None or node is stop or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        queue += [parent for parent, _ in node.next_functions]
    return found


def sites_behind(values: Mapping[str, Tensor], arguments: Iterable[Iterable[Tensor]]) -> list[int]:
    """Which of some values each group of tensors was computed from, by the graph of its gradients: as bits.

    The search ends at a value, so that what is behind it does not count.

    Example:
        >>> z = torch.ones(2, requires_grad=True)
        >>> w = 2 * z
        >>> sites_behind({"z": z, "w": w}, [[z.sum()], [w + 1], [z * w], [torch.ones(2)]])
        [1, 2, 3, 0]
    """
    known: dict[Any, int] = {}  # by node; leaves by their identity
    for place, value in enumerate(values.values()):
        key = value.grad_fn or id(value)
        known[key] = known.get(key, 0) | 1 << place

    def bits(root: Any) -> int:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            missing = [parent for parent in parents if parent not in known]
            if missing:
                stack += missing
                continue
            found = known.get(id(node.variable), 0) if hasattr(node, "variable") else 0
            for parent in parents:
                found |= known[parent]
            known[stack.pop()] = found
        return known[root]

    rows = []
    for tensors in arguments:
        row = 0
        for tensor in tensors:
            row |= bits(tensor.grad_fn) if tensor.grad_fn is not None else known.get(id(tensor), 0)
        rows.append(row)
    return rows


def point_of(fn: Any) -> Any:
    """The distribution under any wrappers."""
    while hasattr(fn, "base_dist") and not isinstance(fn, torch.distributions.TransformedDistribution):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """True for a Delta, under any wrappers."""
    return isinstance(point_of(fn), pyro.distributions.Delta)


@dataclass(frozen=True)
class Pair:
    """Guide and model, each as a function that runs under a recorder.

    Both runs must be repeatable: the same values in, the same distributions out.
    """

    guide: Run
    model: Run

    def run(self, values: Mapping[str, Tensor]) -> tuple[Execution, Execution]:
        """Run the guide at given values and the model at what came out.

        A site without a value draws its own; a point follows its parents.
        """
        guide = self.guide(
            Execution({}, lambda site: None if is_point(site["fn"]) else values.get(site["name"]))
        )
        seen = {**values, **{name: site["value"] for name, site in guide.sites.items()}}
        model = self.model(Execution({}, lambda site: seen.get(site["name"])))
        return guide, model


@dataclass(frozen=True)
class Dependence:
    """The graphs of guide and model."""

    guide: Graph
    model: Graph


def dependence(pair: Pair, values: Mapping[str, Tensor] | None = None) -> Dependence:
    """Provenance of both programs, corrected by what redrawing sites shows.

    The base run is at given values, those of the run that is to be planned where it can be: so
    that all runs see the same sites and take the same from the generators.
    """
    with torch.no_grad():
        base = pair.run(values or _values(pair.run({})))
        values = _values(base)
        graphs = [
            provenance(run, values, execution)
            for run, execution in ((pair.guide, base[0]), (pair.model, base[1]))
        ]
        for group in _groups(tuple(values)):
            graphs = _redraw(pair, base, graphs, values, group)
    return Dependence(*graphs)


def _values(base: tuple[Execution, Execution]) -> dict[str, Tensor]:
    latents = {name: s["value"] for name, s in base[1].sites.items() if not s["is_observed"]}
    return {**latents, **{name: site["value"] for name, site in base[0].sites.items()}}


def _groups(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One site at a time while there are few; else every so-manyth together."""
    number = min(len(names), MOST_GROUPS)
    return [names[i::number] for i in range(number)]


def _redraw(
    pair: Pair,
    base: tuple[Execution, Execution],
    graphs: list[Graph],
    values: Mapping[str, Tensor],
    group: tuple[str, ...],
) -> list[Graph]:
    """Draw the sites of a group anew: whatever is claimed independent of them must not move."""
    moved = dict(values)
    for name in group:
        site = base[0].sites.get(name) or base[1].sites[name]
        moved[name] = site["fn"].sample()
    try:
        now = pair.run(moved)
    except Exception as error:
        note = f"the program fails when sites are redrawn ({type(error).__name__})"
        return [everything_before(graph.order, note) for graph in graphs]
    changed = {n for n, v in _values(now).items() if n in values and differ({"": v}, {"": values[n]})}
    result = []
    for graph, before, after in zip(graphs, base, now, strict=True):
        if tuple(after.sites) != graph.order:
            result.append(everything_before(graph.order, "its sites change with the values of others"))
            continue
        edges = [
            (parent, child)
            for child in graph.order
            if not graph.parents[child] & changed
            and differ(fingerprint(before.sites[child]), fingerprint(after.sites[child]))
            for parent in changed
        ]
        result.append(graph.with_edges(edges) if edges else graph)
    return result


def fingerprint(site: Site) -> dict[str, Tensor]:
    """Everything that makes a site's distribution and its weight, as tensors."""
    found = tensors_of(site["fn"])
    for key in ("scale", "mask"):
        if isinstance(site[key], Tensor | float | int | bool):
            found[key] = torch.as_tensor(site[key])
    return found


def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """True unless two fingerprints agree bit for bit (nan equal to nan)."""
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if a.shape != b.shape or not bool(((a == b) | ((a != a) & (b != b))).all()):
            return True
    return False
