"""Vectors whose mean and covariance are parameters, by class: their M-step is a match of moments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor

from ...model.runtime import Site
from .coupled import LOG_2PI
from .covariance import Form

Values = Mapping[str, Tensor]
Total = Callable[[Tensor], Tensor]
SINGULAR = 1e-6  # sd of an element given those before it, relative: rounding leaves 1e-8 of a zero
ZERO = 1e-12  # of an element's size: an sd that is rounding of equal values


@dataclass(frozen=True)
class Vectors:
    """The vectors of one site, as the elements of its log density see them.

    Attributes:
        name: of the site.
        shape: of the elements; discrete sites, plates, dimensions inside the event.
        row: number of the vector that each element sees, flat; likewise the next three.
        loc: class of its mean.
        factor: class of its covariance.
        weight: zero where masked; times the scale, where no discrete site has to see it without.
        values: the vectors, (rows, length); None if they are latent.
        discrete: whether discrete sites are among the dimensions.
    """

    name: str
    shape: tuple[int, ...]
    row: Tensor
    loc: Tensor
    factor: Tensor
    weight: Tensor
    values: Tensor | None
    discrete: bool


@dataclass(frozen=True)
class Moments:
    """MultivariateNormal sites with parameters of their own.

    Attributes:
        vectors: of each site that the parameters enter; they enter nothing else.
        loc: the parameter that is the mean, by class; None if that is none.
        factors: the parameters that are the covariance, by class.
        form: how.
        length: of a vector.

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM
        algorithm, JRSS B 39, section 4.3; where several covariances share a mean: Meng and Rubin
        (1993), Maximum likelihood estimation via the ECM algorithm, Biometrika 80.
    """

    vectors: tuple[Vectors, ...]
    loc: str | None
    factors: tuple[str, ...]
    form: Form
    length: int

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(v.name for v in self.vectors)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return self.factors if self.loc is None else (self.loc, *self.factors)

    @property
    def is_direct(self) -> bool:
        """True if log densities are functions of the parameters alone."""
        return self.loc is not None and all(v.values is not None for v in self.vectors)

    @property
    def note(self) -> str:
        """What the plan says of the parameters."""
        parts = dict(zip(self.factors, self.form.name, strict=True))
        named = {**({} if self.loc is None else {self.loc: "mean"}), **parts}
        return "moments of the vectors give " + ", ".join(f"{n} ({part})" for n, part in named.items())

    @cached_property
    def _pairs(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Pairs of a mean and a covariance, (pairs, 2); the elements of each pair; the way back to all."""
        loc, factor = self._flat("loc"), self._flat("factor")
        size = int(factor.max()) + 1
        codes, number = (loc * size + factor).unique(return_inverse=True)
        order = number.argsort(stable=True)
        counts = torch.bincount(number, minlength=len(codes))
        pairs = torch.stack([codes // size, codes % size], -1)
        return pairs, tuple(order.split(counts.tolist())), order.argsort()

    @cached_property
    def _row(self) -> Tensor:
        """Number of the vector of each element, those of all sites in one list."""
        first, found = 0, []
        for v in self.vectors:
            found.append(v.row + first)
            first += int(v.row.max()) + 1 if v.values is None else len(v.values)
        return torch.cat(found)

    @cached_property
    def _seen(self) -> tuple[Tensor, ...]:
        """Observed vectors by pair, as columns; masked ones are zero: they may be anything."""
        values = torch.cat([v.values for v in self.vectors if v.values is not None]).double()
        return tuple(
            torch.where(self._flat("weight")[at].unsqueeze(-1) > 0, values[self._row[at]], 0.0).T.contiguous()
            for at in self._pairs[1]
        )

    @cached_property
    def _lengths(self) -> Tensor:
        """Root mean squares of observed elements; zeros where they are latent."""
        if any(v.values is None for v in self.vectors):
            return torch.zeros(self.length, dtype=torch.float64)
        return torch.cat(self._seen, 1).square().mean(1).sqrt()

    def _flat(self, what: str) -> Tensor:
        return torch.cat([getattr(v, what) for v in self.vectors])

    def means(self, values: Values) -> Tensor:
        """Means by class, (classes, length)."""
        assert self.loc is not None
        return values[self.loc].reshape(-1, self.length)

    def trils(self, values: Values) -> Tensor:
        """Cholesky factors of the covariances by class."""
        parts = zip(self.factors, self.form.parts, strict=True)
        return self.form.tril([classes(values[name], dim) for name, (dim, _) in parts])

    def densities(self, values: Values) -> dict[str, Tensor]:
        """Log densities of observed vectors by site, masked but not scaled; see `is_direct`."""
        means, trils = self.means(values), self.trils(values)
        # Inverted once: derivatives of products cost a third of those of solving for all rows.
        eye = torch.eye(self.length, dtype=trils.dtype)
        inverse = torch.linalg.solve_triangular(trils, eye, upper=False)
        constant = -trils.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * self.length * LOG_2PI
        pairs, _, back = self._pairs
        found = []
        for (loc, factor), x in zip(pairs.tolist(), self._seen, strict=True):
            z = inverse[factor] @ (x - means[loc].unsqueeze(-1))
            found.append(constant[factor] - 0.5 * z.square().sum(0))
        flat = torch.cat(found)[back].split([len(v.row) for v in self.vectors])
        return {
            v.name: torch.where(v.weight > 0, part, 0.0).reshape(v.shape)
            for v, part in zip(self.vectors, flat, strict=True)
        }

    def prior(self, values: Values, shape: torch.Size, scale: float) -> Site:
        """The site of latent vectors as a run of the model would have it, where the mean is a parameter."""
        (vectors,) = self.vectors
        trils, factor = self.trils(values), vectors.factor
        tril = trils[0] if bool((factor == 0).all()) else trils[factor].reshape(*shape, self.length)
        loc = self.means(values)[vectors.loc].reshape(shape)
        fn = dist.MultivariateNormal(loc, scale_tril=tril)
        return {"name": vectors.name, "fn": fn, "scale": scale, "mask": None}

    def best(
        self, values: Values, q: Mapping[str, Values], weights: Values, known: Values, total: Total
    ) -> tuple[dict[str, Tensor], bool]:
        """The parameters that maximise the expected log density, and whether some stay: singular ones.

        Where vectors with the same mean have several covariances, the mean is the best one given
        the present ones, and these are the best ones given it.

        Args:
            values: present parameters.
            q: the factor of each latent site: "loc", and "scale" or "scale_tril".
            weights: of the elements of each site with discrete ones: scale times probability.
            known: means of the elements of each site, where they are no parameter.
            total: sums over processes that have rows of their own.
        """
        pairs = self._pairs[0]
        count, mean, square = self._statistics(q, self._weights(weights), known, total)
        means = torch.zeros_like(mean)
        made: dict[str, Tensor] = {}
        if self.loc is not None:
            found = self._means(count, mean, values)
            made[self.loc], means = found.reshape(values[self.loc].shape), found[pairs[:, 0]]
        gap = mean - means
        square = square + count[:, None, None] * gap.unsqueeze(-1) * gap.unsqueeze(-2)
        trils = self.trils(values)
        covariance = torch.zeros_like(trils).index_add(0, pairs[:, 1], square)
        weight = torch.zeros_like(trils[:, 0, 0]).index_add(0, pairs[:, 1], count)
        covariance, tril = self.form.factor(covariance / weight[:, None, None])
        is_fine = ~self._are_singular(tril)
        for name, part in zip(self.factors, self.form.made(covariance, tril), strict=True):
            kept = is_fine.reshape(-1, *(1,) * (part.dim() - 1))
            old = values[name].reshape(part.shape)
            made[name] = torch.where(kept, part, old).reshape(values[name].shape)
        return made, bool((~is_fine & (weight > 0)).any())

    def has_collapsed(self, values: Values) -> bool:
        """True if a covariance is as good as singular: densities of vectors have no end there."""
        return bool(self._are_singular(self.trils(values)).any())

    def _are_singular(self, tril: Tensor) -> Tensor:
        """By class; not a number counts as singular."""
        least = torch.maximum(SINGULAR * tril.norm(dim=-1), ZERO * self._lengths)
        return ~(tril.diagonal(dim1=-2, dim2=-1) > least).all(-1)

    def _weights(self, found: Values) -> Tensor:
        """Of all elements."""
        return torch.cat(
            [v.weight * found[v.name].reshape(-1) if v.discrete else v.weight for v in self.vectors]
        )

    def _statistics(
        self, q: Mapping[str, Values], weights: Tensor, known: Values, total: Total
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, mean and sum of squares about it of each pair; the mean is zero about known means."""
        of_pair, x = self._pairs[1], self._vectors(q, known)
        w = [weights[at] for at in of_pair]
        count = total(torch.stack([part.sum() for part in w]))
        first = total(torch.stack([columns @ part for part, columns in zip(w, x, strict=True)]))
        mean = torch.zeros_like(first) if self.loc is None else first / count.clamp(min=1e-300).unsqueeze(-1)
        square = []
        for part, columns, at, centre in zip(w, x, of_pair, mean, strict=True):
            gap = columns - centre.unsqueeze(-1)
            own = (part * gap) @ gap.mT
            square.append(own + self._spread(q, part, at) if q else own)
        return count, mean, total(torch.stack(square))

    def _vectors(self, q: Mapping[str, Values], known: Values) -> list[Tensor]:
        """Means of the vectors, less known means, by pair; as columns."""
        if q:
            means = torch.cat([q[v.name]["loc"].reshape(-1, self.length) for v in self.vectors])
            x = [means[self._row[at]].T for at in self._pairs[1]]
        else:
            x = list(self._seen)
        if self.loc is not None:
            return x
        centre = torch.cat([known[v.name].reshape(-1, self.length) for v in self.vectors])
        return [columns - centre[at].T for columns, at in zip(x, self._pairs[1], strict=True)]

    def _spread(self, q: Mapping[str, Values], weight: Tensor, at: Tensor) -> Tensor:
        """The weighted sum of the covariances of latent vectors."""
        of_row = torch.zeros(int(self._row.max()) + 1, dtype=weight.dtype)
        of_row = of_row.index_add(0, self._row[at], weight)
        factors = [q[v.name] for v in self.vectors]
        if "scale" in factors[0]:
            scale = torch.cat([f["scale"].reshape(-1, self.length) for f in factors])
            return torch.diag_embed(of_row @ scale.square())
        tril = torch.cat([f["scale_tril"].reshape(-1, self.length, self.length) for f in factors])
        return torch.einsum("r,rik,rjk->ij", of_row, tril, tril)

    def _means(self, count: Tensor, mean: Tensor, values: Values) -> Tensor:
        """The best mean of each class; the present one where nothing tells."""
        pairs, old = self._pairs[0], self.means(values)
        if len(pairs[:, 0].unique()) == len(pairs):
            precision = torch.eye(self.length, dtype=mean.dtype).expand(len(pairs), -1, -1)
        else:
            precision = torch.cholesky_inverse(self.trils(values))[pairs[:, 1]]
        weight = count[:, None, None] * precision
        slope = (weight @ mean.unsqueeze(-1)).squeeze(-1)
        whole = torch.zeros_like(old.unsqueeze(-1) * old.unsqueeze(-2)).index_add(0, pairs[:, 0], weight)
        right = torch.zeros_like(old).index_add(0, pairs[:, 0], slope)
        found, failed = torch.linalg.solve_ex(whole, right.unsqueeze(-1))
        found = found.squeeze(-1)
        is_fine = (failed == 0) & torch.isfinite(found).all(-1)
        return torch.where(is_fine.unsqueeze(-1), found, old)


def classes(value: Tensor, event_dim: int) -> Tensor:
    """A parameter by class: (classes, ...)."""
    return value.reshape(-1, *value.shape[value.dim() - event_dim :])
