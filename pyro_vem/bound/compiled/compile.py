"""Compiling a problem: which terms have slots, what they are, and the bound as their sum."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import AffineTransform, Transform, transform_to

from ...errors import ModelError, UnsupportedModelError
from ...model.parameters import Parameter
from ...model.runtime import Execution, Site
from ...model.sites import Latent
from ...model.support import plain_parts
from ...model.together import Together, one_by_one
from ..dependence import differ, fingerprint
from .affine import AffineSlot, Probe
from .blocks import merge
from .expect import CHEAPER, CompiledTerm
from .fit_slots import SlotFitter, worst_gap
from .links import MOST_LINKS, is_linked, relinked
from .moments import Moments, slices
from .slots import CHANGES, RESIDUAL, UNLIKE, Spec, changes_of, read, spec_of
from .stack import Stack

FINAL_DRAWS = 256  # of the fitted guide, at which compiled slots are held against the model again
MOST_FINAL = 500_000  # slots read for that
MOST_PARTS, FEW_PARTS = 150, 4  # of all terms together, and of one term that is kept regardless
FINAL_GAP = 1e-6
APART = 10.0  # of neighbours in an ordered vector, while probes move each by less than 3

Reader: TypeAlias = Callable[[Mapping[str, Site], Mapping[str, Tensor]], dict[str, Tensor]]
"""Numbers in a run, from its sites and the flat point that it is at, by name."""


@dataclass(frozen=True)
class Variables:
    """Latents and parameters as flat vectors, unconstrained or `straight`; parameters have a ``$``."""

    latents: Mapping[str, Latent]
    parameters: Mapping[str, Parameter]
    map_sites: Mapping[str, Latent]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each."""
        sizes = {name: latent.unconstrained.numel() for name, latent in self.latents.items()}
        sizes |= {f"${name}": p.unconstrained.numel() for name, p in self.parameters.items()}
        return sizes | {f"${name}": s.unconstrained.numel() for name, s in self.map_sites.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each, before it is flattened."""
        shapes = {name: latent.unconstrained.shape for name, latent in self.latents.items()}
        return shapes | {f"${name}": shape for name, (shape, _) in self._unconstrained.items()}

    @functools.cached_property
    def _unconstrained(self) -> dict[str, tuple[torch.Size, Transform]]:
        """Of each parameter and MAP site: its unconstrained shape, and the way from there to its values."""
        found = {n: (p.unconstrained.shape, transform_to(p.constraint)) for n, p in self.parameters.items()}
        return found | {n: (s.unconstrained.shape, s.transform) for n, s in self.map_sites.items()}

    @functools.cached_property
    def _points(self) -> dict[str, tuple[torch.Size, Transform]]:
        """The same from what is flat here."""
        return {n: (shape, straight(way, shape)) for n, (shape, way) in self._unconstrained.items()}

    @property
    def is_unconstrained(self) -> bool:
        """False if some parameter is flat in other coordinates."""
        return all(way is self._points[n][1] for n, (_, way) in self._unconstrained.items())

    def constrained(self, flat: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the latents, and of parameters and MAP sites, from one flat point."""
        values = {n: s.transform(flat[n].reshape(s.unconstrained.shape)) for n, s in self.latents.items()}
        return values, {n: way(flat[f"${n}"].reshape(shape)) for n, (shape, way) in self._points.items()}

    def flat_theta(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constrained parameters and MAP sites as flat vectors, differentiable."""
        return {f"${n}": way.inv(theta[n]).reshape(-1) for n, (_, way) in self._points.items()}


def straight(transform: Transform, shape: Sequence[int]) -> Transform:
    """A shift instead of the bijector onto ordered vectors; any other transform as it is.

    Predictors are affine in cutpoints, while these are sums of exponentials of unconstrained values. A
    parameter needs no Gaussian coordinates; round values that are far apart, probes keep its order.

    Example:
        >>> straight(dist.transforms.OrderedTransform(), (3,))(torch.zeros(3, dtype=torch.float64))
        tensor([ 0., 10., 20.], dtype=torch.float64)
    """
    if [type(part) for part in plain_parts([transform])] != [dist.transforms.OrderedTransform]:
        return transform
    return AffineTransform(APART * torch.arange(shape[-1], dtype=torch.float64).expand(*shape), 1.0)


def _first(fitters: Iterable[SlotFitter], key: str) -> AffineSlot | str:
    """The slot from the first fitter that finds one; or why the last does not."""
    for fitter in fitters:
        found = fitter.fit(key)
        if not isinstance(found, str):
            break
    return found


class Compiled:
    """The terms of a model that are known in closed form, as a function of moments.

    Args:
        run: the model, from its parameters and the values of its latents.
        variables: that terms depend on.
        held: parameters that no step moves.
        seed: of the probes.
        weights: of each latent's factor, by element.

    Attributes:
        terms: compiled terms by site.
        refused: why the others are not.
        rough: those whose expectation may be infinite, or that draws contradict.
        constant: records of latents whose prior is the same wherever latents and parameters are.
    """

    def __init__(
        self,
        run: Any,
        variables: Variables,
        held: Mapping[str, Tensor],
        seed: int,
        weights: Mapping[str, Tensor],
    ) -> None:
        self.variables, self._run, self._held, self._weights = variables, run, held, weights
        self.where = slices(variables.sizes)
        self._merged: Stack | None = None
        self._apart: Stack | None = None
        self._together = Together()
        self.specs: dict[str, Spec] = {}
        self.refused: dict[str, str] = {}
        self.terms: dict[str, CompiledTerm] = {}
        self.constant: dict[str, Site] = {}
        self.rough: set[str] = set()
        self._unlike: set[str] = set()  # of another family or shape somewhere
        self._costly: dict[str, CompiledTerm] = {}  # refused for their nodes at some point
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self._read_specs()
            if self.specs:
                self._compile(generator)
                self._drop_long()
            self._find_constant(generator)

    def _model(self, flat: Mapping[str, Tensor]) -> Execution:
        values, theta = self.variables.constrained(flat)
        execution: Execution = self._run({**theta, **self._held}, {**values, **theta})
        return execution

    def _read_specs(self) -> None:
        zero = {name: torch.zeros(n, dtype=torch.float64) for name, n in self.variables.sizes.items()}
        for name, site in self._model(zero).sites.items():
            if name in self.variables.map_sites:
                self.refused[name] = "the density of a point"
                continue
            latent = None if site["is_observed"] else self.variables.latents[name]
            spec = spec_of(site, latent)
            if isinstance(spec, str):
                self.refused[name] = spec
            elif spec.is_bounded and not torch.equal(spec.weight, self._weights[name]):
                # A term has one Jacobian, which belongs to prior and factor alike.
                self.refused[name] = "its scale or mask is not that of its factor"
            else:
                self.specs[name] = spec

    def _evaluate(self, batch: dict[str, Tensor], *readers: Reader) -> dict[str, Tensor]:
        """What readers find in runs at a batch of points."""

        def one(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
            sites = self._model(flat).sites
            return {key: value for reader in readers for key, value in reader(sites, flat).items()}

        try:
            return self._together(one, batch)
        except (ModelError, UnsupportedModelError):
            raise
        except Exception:  # the model refuses vmap: probing runs it point by point
            return one_by_one(one, batch, len(next(iter(batch.values()))))

    def _slots(
        self, specs: Mapping[str, Spec], sites: Mapping[str, Site], flat: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A reader of the slots of some terms, by term and slot; nan where family or shape are others."""
        found: dict[str, Tensor] = {}
        for name, spec in specs.items():
            if spec.is_like(sites[name]):
                u = flat[name].reshape(spec.shape) if spec.latent is not None else None
                slots = read(spec, sites[name], u)
            else:
                self._unlike.add(name)
                slots = dict.fromkeys(spec.slots, torch.full_like(spec.weight, torch.nan))
            found |= {f"{name}\0{slot}": value for slot, value in slots.items()}
        return found

    def _refuse_changing(self, changes: Mapping[str, Tensor]) -> list[str]:
        """Refuse terms whose weights, family or data have changed; their names."""
        reasons = {n: CHANGES[c.any(0).tolist().index(True)] for n, c in changes.items() if bool(c.any())}
        reasons |= dict.fromkeys(self._unlike & self.specs.keys(), UNLIKE)
        for name, reason in reasons.items():
            self.refuse(name, reason)
            del self.specs[name]
        return list(reasons)

    def _compile(self, generator: torch.Generator) -> None:
        usual = dict(self.specs)
        bad = self._compiled(usual, generator)
        for number in range(MOST_LINKS):
            specs = {}
            for name, slots in bad.items():
                linked = relinked(self.specs[name].slots, slots, number, self.specs[name].cutpoints)
                if linked is not None:
                    specs[name] = replace(self.specs[name], slots=linked)
            if specs:
                self.specs |= specs
                bad |= self._compiled(specs, generator)
                bad = {name: slots for name, slots in bad.items() if name in self.specs}
        self.specs |= {name: usual[name] for name, slots in bad.items() if slots}

    def _compiled(self, specs: Mapping[str, Spec], generator: torch.Generator) -> dict[str, list[str]]:
        """Compile terms; the slots of others that are not affine, by term."""
        fitters = self._fitters(specs, generator)
        self._refuse_changing({})  # what the other points have shown
        latents, bad = frozenset(self.variables.latents), {}
        for name, spec in specs.items():
            if name not in self.specs:  # it changes from point to point
                continue
            slots = {slot: _first(fitters, f"{name}\0{slot}") for slot in spec.slots}
            bad[name] = [slot for slot, found in slots.items() if isinstance(found, str)]
            if bad[name]:
                reason = f"{bad[name][0]}: {slots[bad[name][0]]}"
                self.refused.setdefault(name, reason)  # that of the usual slots is the one to tell
                continue
            self.refused.pop(name, None)
            term = CompiledTerm.of(spec, slots, latents)  # type: ignore[arg-type]
            problem = term.problem()
            if problem is None:
                self.terms[name] = term.begun()
            else:
                self.refuse(name, problem, is_rough=term.grown is not None)
        return bad

    def _fitters(self, specs: Mapping[str, Spec], generator: torch.Generator) -> list[SlotFitter]:
        """By precision: with longer steps first, where offsets hide what ones of unit length change.

        Shorter ones come last, where slots overflow within a unit.
        """
        readers: list[Reader] = [functools.partial(of, specs) for of in (self._slots, changes_of)]

        def evaluate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            found = self._evaluate(batch, *readers)
            if readers[1:]:  # at the first points
                self._refuse_changing({name: found.pop(name) for name in specs})
                del readers[1:]
            return {key: values for key, values in found.items() if key.split("\0")[0] in self.specs}

        def fitter(lengths: Mapping[str, float] | None = None) -> SlotFitter:
            probe = Probe(evaluate, self.variables.sizes, generator, lengths)
            left = specs.keys() & self.specs.keys()
            squared = [f"{n}\0{RESIDUAL}" for n in specs if n in left and specs[n].family is td.Normal]
            return SlotFitter(probe, list(probe.here), generator, squared, self.variables.shapes)

        fitters = [fitter()]
        lengths, shorter = fitters[0].lengths(), fitters[0].shorter()
        if lengths:
            with suppress(Exception):  # far away the model may raise whatever it likes
                fitters.insert(0, fitter(lengths))
        if shorter:
            fitters.append(fitter(shorter))
        return fitters

    @property
    def merged(self) -> Stack:
        """All terms, with those of one family as blocks of rows."""
        if self._merged is None:
            blocks, alone = merge(self.terms, self.where)
            self._merged = self._stack((*blocks, *alone.values()))
        return self._merged

    @property
    def apart(self) -> Stack:
        """All terms, each by itself."""
        if self._apart is None:
            self._apart = self._stack(self.terms.values())
        return self._apart

    def _stack(self, terms: Iterable[CompiledTerm]) -> Stack:
        return Stack(terms, self.where, sum(self.variables.sizes[name] for name in self.variables.latents))

    def values(self, moments: Moments) -> dict[str, Tensor]:
        """Weighted sum over rows of E[log p] of each term by itself, in nats."""
        return dict(zip(self.terms, self.apart.values(moments), strict=True))

    def _drop_long(self) -> None:
        """Many unmerged terms of many parts each cost more than the model on draws."""
        parts = {
            n: sum(len(slot.variables) for slot in term.slots.values())
            for n, term in merge(self.terms, self.where)[1].items()
        }
        if sum(parts.values()) <= MOST_PARTS:
            return
        for name, count in parts.items():
            if count > FEW_PARTS:
                self.refuse(name, f"{count} latents in one of many terms: cheaper on draws")

    def refuse(self, name: str, reason: str, *, is_rough: bool = False) -> None:
        """A term is not compiled, or no longer; a rough one has no quadrature of any kind."""
        self.refused[name], self._merged, self._apart = reason, None, None
        self.terms.pop(name, None)
        if is_rough:
            self.rough.add(name)

    def _find_constant(self, generator: torch.Generator) -> None:
        """Latents without slots whose prior never changes: its exact KL needs no model run."""
        missing = [name for name in self.variables.latents if name not in self.terms]
        if not missing:
            return
        runs = [
            self._model({k: 0.5 * Probe._normal(generator, n) for k, n in self.variables.sizes.items()}).sites
            for _ in range(3)
        ]
        for name in missing:
            prints = [fingerprint(run[name]) for run in runs]
            if not differ(prints[0], prints[1]) and not differ(prints[0], prints[2]):
                self.constant[name] = runs[0][name]

    @property
    def rows(self) -> int:
        """Scalar densities in all compiled terms."""
        return sum(len(term.spec.weight) for term in self.terms.values())

    def refine(self, moments: Moments, settled: float) -> bool:
        """Double nodes where that changes a term by more than this part; True if one grew or was refused."""
        grew = False
        inputs = self.apart.inputs(moments)
        for (name, term), x in zip(list(self.terms.items()), inputs, strict=True):
            finer = term.refined(x, settled)
            if isinstance(finer, str):
                self.refuse(name, finer, is_rough=True)
                if finer.endswith(CHEAPER):
                    self._costly[name] = term
                grew = True
            elif finer is not term:
                has_grown = finer.nodes != term.nodes
                self.terms[name], self._merged, self._apart = finer, None, None
                grew |= has_grown
        return grew

    @property
    def work(self) -> int:
        """Values of densities that one evaluation at nodes takes, those that it was too much for included."""
        terms = (*self.terms.values(), *self._costly.values())
        return sum(term.work for term in terms if term.method == "quadrature")

    def begin_again(self) -> None:
        """As few nodes as at first, also for terms that took too many: factors are narrower now."""
        for name in self._costly:
            del self.refused[name]
            self.rough.discard(name)
        terms = {**self.terms, **self._costly}
        self.terms = {name: terms[name].begun() for name in self.specs if name in terms}
        self._costly, self._merged, self._apart = {}, None, None

    def recheck(self, moments: Moments, seed: int) -> list[str]:
        """Terms whose slots differ from the model's at draws of the guide; they are refused."""
        if not self.terms:
            return []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            num = max(8, min(FINAL_DRAWS, MOST_FINAL // max(1, self.rows)))
            batch = {k: v.detach().expand(num, -1) for k, v in moments.centre.items()}
            for name, sd in moments.scale.items():
                noise = torch.randn(num, len(sd), generator=generator, dtype=torch.float64)
                batch[name] = batch[name] + sd * noise
            specs = dict(self.specs)
            readers = (functools.partial(of, specs) for of in (self._slots, changes_of))
            truth = self._evaluate(batch, *readers)
        wrong = self._refuse_changing({name: truth[name] for name in specs})
        for name, term in list(self.terms.items()):
            for slot, affine in term.slots.items():
                there = truth[f"{name}\0{slot}"]
                if is_linked([slot]):  # where rounding does not hide it
                    there = torch.where(there.isnan(), affine.at(batch), there)
                gap = worst_gap(affine, batch, there)
                if gap > FINAL_GAP:
                    self.refuse(name, f"{slot} differs from the model by {gap:.1g} at a draw of the guide")
                    wrong.append(name)
                    break
        return wrong
