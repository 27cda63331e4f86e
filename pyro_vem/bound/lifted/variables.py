"""The variables of a log joint, latents and parameters alike, and how their elements are placed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import constraints

from ...model.parameters import Parameter
from ...model.prototype import Prototype
from ...model.runtime import Execution, Site
from ...model.sites import Latent
from ...model.support import element_of
from ..kl import leaf_of
from .families import FACTORS, PARAMETERS, Family, block_normal, dirichlet

MOST_MEMBERS = 12  # of a block: 91 runs of the model for its statistics
LEVELS = {
    "real": (0.37, -1.13, 1.71, -0.59),
    "positive": (0.83, 1.91, 0.47, 1.37),
    "unit": (0.41, 0.73, 0.17, 0.58),
}


@dataclass(frozen=True)
class Variable:
    """A latent or a parameter, with its elements x = centre + unit * u.

    Attributes:
        support: "real", "positive", "unit" or "simplex".
        families: candidates for single elements, best first.
        centre, unit: shaped like the value.
        event_dim: trailing dimensions that one factor of a guide may tie together.
        is_vector: whether its prior is one of vectors.
    """

    name: str
    is_latent: bool
    support: str
    families: tuple[Family, ...]
    centre: Tensor
    unit: Tensor
    event_dim: int
    is_vector: bool = False

    @property
    def is_tied(self) -> bool:
        """True if elements depend on each other a priori."""
        return self.is_vector and self.shape[-1] > 1

    @property
    def shape(self) -> torch.Size:
        """Of the value."""
        return self.centre.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.centre.numel()

    def placed(self, u: Tensor) -> Tensor:
        """The value at flat u."""
        return self.centre + self.unit * u.reshape(self.shape)

    def internal(self, value: Tensor) -> Tensor:
        """Flat u at a value."""
        return ((value - self.centre) / self.unit).reshape(-1)

    def within(self, u: Tensor) -> Tensor:
        """The nearest values whose densities are exact: torch takes probabilities below eps for eps."""
        eps = torch.finfo(torch.float64).eps
        return u.clamp(eps, 1 - eps) if self.support in ("unit", "simplex") else u

    def without_unit(self) -> "Variable":
        """The same variable with u in its own unit."""
        return replace(self, unit=torch.ones_like(self.unit))

    def with_one_unit(self) -> "Variable":
        """The same variable with one unit for all elements, their average."""
        return replace(self, unit=torch.full_like(self.unit, float(self.unit.mean())))

    def random(self, generator: torch.Generator) -> Tensor:
        """Flat generic values of u."""
        noise = torch.randn(self.size, generator=generator, dtype=torch.float64)
        if self.support == "real":
            return noise
        if self.support == "positive":
            return (0.5 * noise).exp()
        if self.support == "unit":
            return 0.2 + 0.6 * noise.sigmoid()
        return (0.5 * noise.reshape(-1, self.shape[-1])).softmax(-1).reshape(-1)

    def layouts(self) -> list[Tensor]:
        """Ways to see the elements as groups, (groups, members): one by one first, then blocks."""
        numbers = torch.arange(self.size).reshape(self.shape)
        found = [] if self.is_tied else [numbers.reshape(-1, 1)]
        if self.support != "real" or self.size == 1:
            return found
        if self.is_latent:
            blocks = [numbers.reshape(-1, self.shape[-1])] if self.event_dim == 1 else []  # no matrices
        else:
            last = self.shape[-1]
            blocks = [numbers.reshape(-1, last), numbers.reshape(-1, last).T, numbers.reshape(1, -1)]
        return found + [b for b in blocks if 1 < b.shape[1] <= MOST_MEMBERS]


def latent_variable(latent: Latent, site: Site) -> Variable | str:
    """A latent as a variable, or why it is none."""
    fn, kind, shape = leaf_of(site["fn"]).dist, latent.prior, latent.init.shape
    if latent.idle is not None:
        return "some of its elements are masked out (instead of obs_mask, use pyro.poutine.mask)"
    if kind == "Dirichlet":
        size = shape[-1]
        return Variable(latent.name, True, "simplex", (dirichlet(size),), *_plain(shape), latent.event_dim)
    if kind == "MultivariateNormal":
        return Variable(
            latent.name, True, "real", FACTORS["Normal"],
            _first(fn.loc.detach(), shape).expand(shape).clone(),
            _first(fn.variance.detach().sqrt(), shape).expand(shape).clone(), latent.event_dim, True,
        )  # fmt: skip
    if kind not in FACTORS:
        return f"no conjugate family for {kind}"
    families = FACTORS[kind]
    support = families[0].support
    if support == "unit":
        return Variable(latent.name, True, support, families, *_plain(shape), latent.event_dim)
    if support == "real":
        centre, unit = fn.loc, fn.scale
    else:
        centre, unit = torch.zeros(()), fn.mean
        unit = torch.where(torch.isfinite(unit) & (unit > 0), unit, latent.init)
    centre, unit = (_first(v.detach(), shape).expand(shape).clone() for v in (centre.double(), unit))
    return Variable(latent.name, True, support, families, centre, unit, latent.event_dim)


def parameter_variable(parameter: Parameter) -> Variable | str:
    """A parameter as a variable, or why it is none."""
    value, constraint = parameter.init.double(), element_of(parameter.constraint)
    if "$$$" in parameter.name:
        return "a weight of a module"
    if parameter.is_real:
        spread = float(value.std()) if value.numel() > 1 else 0.0
        unit = torch.full_like(value, max(1.0, spread))
        return Variable(parameter.name, False, "real", PARAMETERS["real"], value.clone(), unit, value.dim())
    if constraint is constraints.simplex:
        family = (dirichlet(value.shape[-1]),)
        return Variable(parameter.name, False, "simplex", family, *_plain(value.shape), 1)
    if constraint is constraints.unit_interval:
        return Variable(parameter.name, False, "unit", PARAMETERS["unit"], *_plain(value.shape), 0)
    if constraint in (constraints.positive, constraints.nonnegative):
        centre = torch.zeros_like(value)
        return Variable(parameter.name, False, "positive", PARAMETERS["positive"], centre, value.clone(), 0)
    return f"no statistics for the constraint {constraint}"


def variables_of(
    prototype: Prototype, run: Execution, parameters: Sequence[Parameter], map_sites: Collection[str]
) -> tuple[dict[str, Variable], dict[str, str]]:
    """Latents and parameters as variables, and why others are none."""
    made = {
        site.name: parameter_variable(Parameter(site.name, site.support, site.init))
        if site.name in map_sites
        else latent_variable(site, run.sites[site.name])
        for site in prototype.latents
    } | {p.name: parameter_variable(p) for p in parameters}
    variables = {name: variable for name, variable in made.items() if not isinstance(variable, str)}
    return variables, {name: reason for name, reason in made.items() if isinstance(reason, str)}


def generic(transform: Callable[[Tensor], Tensor], start: Tensor, generator: torch.Generator) -> Tensor:
    """A value of a variable without statistics; at its start what it scales may vanish."""
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    return transform(start.double() + 0.5 * noise)


def _first(value: Tensor, shape: Sequence[int]) -> Tensor:
    """One of the values that an enumerated site gives a prior's parameter."""
    if value.dim() <= len(shape):
        return value
    return value.reshape(-1, *value.shape[value.dim() - len(shape) :])[0]


def _plain(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    size = tuple(shape)
    return torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)


@dataclass(frozen=True)
class Coding:
    """How a variable enters the log joint.

    Attributes:
        family: of its groups.
        layout: flat positions of the members of each group.
        where: number of the group, for every element of each factor.
        failed: factors that are not affine in the statistics, with the reason.
    """

    variable: Variable
    family: Family
    layout: Tensor
    where: Mapping[str, Tensor]
    failed: Mapping[str, str]

    def at_probe(self, number: int) -> Tensor:
        """Flat u at one of the points that coefficients are solved from.

        All groups are at the same values, except components of simplexes, which must add up to one.
        """
        if self.variable.support == "simplex":
            rows, size = self.variable.size // self.variable.shape[-1], self.variable.shape[-1]
            weights = torch.ones(size, dtype=torch.float64)
            weights[::2] = 1.0 + 3.0 * number
            return (weights / weights.sum()).repeat(rows)
        return self.flat(self.family.probes[number].expand(len(self.layout), -1))

    def solved(self, values: Tensor, where: Tensor) -> Tensor:
        """Values of a factor at all probes (first dimension) to the coefficients of (1, t_1, ...)."""
        if self.variable.support == "simplex":
            first, second = (self.at_probe(i).log()[where] for i in (0, 1))
            slope = (values[1] - values[0]) / (second - first)
            return torch.stack([values[0] - slope * first, slope])
        inverse = torch.linalg.inv(self.family.design(self.family.probes))
        return torch.tensordot(inverse, values, ([1], [0]))

    def grouped(self, u: Tensor) -> Tensor:
        """Flat u as (groups, members)."""
        return u[self.layout]

    def flat(self, groups: Tensor) -> Tensor:
        """The way back."""
        u = torch.empty(self.layout.numel(), dtype=groups.dtype)
        return u.index_put((self.layout,), groups.reshape(self.layout.shape))

    def statistics(self, value: Tensor) -> Tensor:
        """T at a value of the variable, (statistics, groups)."""
        return self.family.statistics(self.grouped(self.variable.internal(value)))

    def factor(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A factor's parameters on the internal scale, by group."""
        variable, layout = self.variable, self.layout
        centre, unit = variable.centre.reshape(-1), variable.unit.reshape(-1)
        if "scale_tril" in values:
            size = layout.shape[1]
            tril = values["scale_tril"].reshape(-1, size, size) / unit[layout].unsqueeze(-1)
            return {"loc": ((values["loc"].reshape(-1) - centre) / unit)[layout], "scale_tril": tril}
        if "loc" in values:
            return {
                "loc": (values["loc"].reshape(-1) - centre) / unit,
                "scale": values["scale"].reshape(-1) / unit,
            }
        if variable.support == "simplex":
            return {"concentration": values["concentration"].reshape(-1, variable.shape[-1])}
        flat = {name: value.reshape(-1) for name, value in values.items()}
        if "rate" in flat:
            flat["rate"] = flat["rate"] * unit**self.family.rate_power
        return flat

    def outside(self, q: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: shaped like the guide's parameters."""
        variable, shape = self.variable, self.variable.shape
        centre, unit = variable.centre.reshape(-1), variable.unit.reshape(-1)
        if "scale_tril" in q:
            size = self.layout.shape[1]
            tril = q["scale_tril"] * unit[self.layout].unsqueeze(-1)
            loc = centre + unit * self.flat(q["loc"])
            return {"loc": loc.reshape(shape), "scale_tril": tril.reshape(*shape, size)}
        if "loc" in q:
            loc, scale = centre + unit * q["loc"], unit * q["scale"]
            return {"loc": loc.reshape(shape), "scale": scale.reshape(shape)}
        made = {name: value.reshape(shape) for name, value in q.items()}
        if "rate" in made:
            made["rate"] = made["rate"] / variable.unit**self.family.rate_power
        return made


def families_of(variable: Variable, layout: Tensor) -> tuple[Family, ...]:
    """The candidates for the groups of a layout."""
    return variable.families if layout.shape[1] == 1 else (block_normal(layout.shape[1]),)
