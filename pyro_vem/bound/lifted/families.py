"""Sufficient statistics: what a factor of each family is updated from, and a parameter's best value.

An element u of a variable is centred and scaled, x = centre + unit * u: at raw values near 70 the
statistics (x, x^2) lose seven digits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .exponentials import HALVINGS, Curve

Values = Mapping[str, Tensor]
Statistics = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """The statistics of one kind of element; elements are shaped (elements, size).

    Attributes:
        name: how the plan calls it.
        support: "real", "positive", "unit" or "simplex".
        statistics: u -> t(u), shaped (statistics, elements).
        points: values of u, shaped (statistics + 1, size), at which t and 1 are independent.
        expected: the factor's parameters (of u) -> E t(u).
        updated: natural parameters and the factor's present ones -> the factor that is best;
            None where there is no factor.
        best: natural parameters -> the u that maximises their sum with t(u); None where unknown.
        has_unit: whether u may be scaled (not where exp(u) is a statistic).
        entropy: of the factor, in nats, by element.
        rate_power: of the unit, by which a factor's rate is multiplied when x becomes u.
    """

    name: str
    support: str
    statistics: Statistics
    points: Tensor
    expected: Callable[[Values], Tensor] | None = None
    updated: Callable[[Tensor, Values], dict[str, Tensor]] | None = None
    best: Callable[[Tensor], Tensor] | None = None
    has_unit: bool = True
    entropy: Callable[[Values], Tensor] | None = None
    rate_power: int = 0

    @property
    def num(self) -> int:
        """Number of statistics, without the constant."""
        return len(self.points) - 1

    @property
    def probes(self) -> Tensor:
        """The points, on the device of the fit."""
        return torch.as_tensor(self.points)

    def design(self, points: Tensor) -> Tensor:
        """(1, t_1, ...) at some points, a row each."""
        statistics = self.statistics(points)
        return torch.cat([torch.ones_like(statistics[:1]), statistics]).T


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


HALF_LOG_2PI_E = 0.5 * float(torch.log(torch.tensor(2 * torch.pi * torch.e, dtype=torch.float64)))
REAL = _column(0.0, 1.0, -1.0, 0.5, -0.5)
POSITIVE = _column(1.0, 2.0, 0.5)


def _normal_moments(q: Values) -> Tensor:
    mean, variance = q["loc"], q["scale"].square()
    return torch.stack([mean, mean.square() + variance])


def _normal(eta: Tensor, _: Values) -> dict[str, Tensor]:
    precision = -2 * eta[1]
    return {"loc": eta[0] / precision, "scale": precision.rsqrt()}


def _normal_entropy(q: Values) -> Tensor:
    return HALF_LOG_2PI_E + q["scale"].log()


def _square(u: Tensor) -> Tensor:
    u = u.squeeze(-1)
    return torch.stack([u, u.square()])


NORMAL = Family(
    "Normal", "real", _square, REAL[:3], _normal_moments, _normal, lambda eta: -eta[0] / (2 * eta[1]),
    entropy=_normal_entropy,
)  # fmt: skip


def _with_exp(u: Tensor) -> Tensor:
    return torch.cat([_square(u), u.T.exp()])


def _with_exps(u: Tensor) -> Tensor:
    return torch.cat([_with_exp(u), (-u).T.exp()])


def _exp_moments(q: Values) -> Tensor:
    return torch.cat([_normal_moments(q), (q["loc"] + q["scale"].square() / 2).exp().unsqueeze(0)])


def _exps_moments(q: Values) -> Tensor:
    return torch.cat([_exp_moments(q), (-q["loc"] + q["scale"].square() / 2).exp().unsqueeze(0)])


def _newton_normal(eta: Tensor, q: Values) -> dict[str, Tensor]:
    """A damped Newton step on eta . E t + log s in (mean, log variance), every element by itself.

    One step a sweep: the natural parameters move with the next sweep anyway.
    """
    curve, mean, log = Curve(eta), q["loc"], 2 * q["scale"].log()
    at = curve.slopes(mean, log)
    determinant = at.mean_mean * at.log_log - at.mean_log.square()
    is_concave = (determinant > 0) & (at.mean_mean < 0)
    by_both = -(at.log_log * at.by_mean - at.mean_log * at.by_log) / determinant
    step_mean = torch.where(is_concave, by_both, -at.by_mean / at.mean_mean)
    step_log = -(at.mean_mean * at.by_log - at.mean_log * at.by_mean) / determinant
    step_log = torch.where(is_concave, step_log, torch.zeros_like(step_log))
    before, length = curve.value(mean, log), torch.ones_like(mean)
    for _ in range(HALVINGS):
        new_mean, new_log = mean + length * step_mean, log + length * step_log
        is_worse = ~(curve.value(new_mean, new_log) >= before - 1e-14 * before.abs())
        if not bool(is_worse.any()):
            break
        length = torch.where(is_worse, length / 2, length)
    log = torch.where(is_worse, log, new_log)
    return {"loc": torch.where(is_worse, mean, new_mean), "scale": (log / 2).exp()}


NORMAL_EXP = Family(
    "Normal (exp)", "real", _with_exp, REAL[:4], _exp_moments, _newton_normal,
    has_unit=False, entropy=_normal_entropy,
)  # fmt: skip
NORMAL_EXPS = Family(
    "Normal (exp)", "real", _with_exps, REAL, _exps_moments, _newton_normal,
    has_unit=False, entropy=_normal_entropy,
)  # fmt: skip


def block_normal(size: int) -> Family:
    """Normal vectors: t = (u_i, u_i u_j for i <= j)."""
    rows, columns = torch.triu_indices(size, size)
    table = torch.zeros(size, size, dtype=torch.long)
    table[rows, columns] = table[columns, rows] = torch.arange(len(rows))
    number, twice = table.reshape(-1), 1 + torch.eye(size, dtype=torch.float64).reshape(-1)

    def statistics(u: Tensor) -> Tensor:
        return torch.cat([u.T, (u[:, rows] * u[:, columns]).T])

    def moments(q: Values) -> Tensor:
        second = q["scale_tril"] @ q["scale_tril"].mT + q["loc"].unsqueeze(-1) * q["loc"].unsqueeze(-2)
        return torch.cat([q["loc"].T, second[:, rows, columns].T])

    def quadratic(eta: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the Hessian, and the slope at zero."""
        precision = -twice * eta[size:].T[:, number]
        return precision.reshape(-1, size, size), eta[:size].T

    def updated(eta: Tensor, _: Values) -> dict[str, Tensor]:
        precision, slope = quadratic(eta)
        factor = torch.linalg.cholesky_ex(precision)[0]
        mean = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        # The factor of the inverse: of the precision with its order turned round.
        turned = torch.linalg.cholesky_ex(precision.flip(-2, -1))[0]
        inverse = torch.linalg.solve_triangular(turned, torch.eye(size, dtype=eta.dtype), upper=False)
        return {"loc": mean, "scale_tril": inverse.flip(-2, -1).mT}

    def best(eta: Tensor) -> Tensor:
        precision, slope = quadratic(eta)
        solution, failed = torch.linalg.solve_ex(precision, slope.unsqueeze(-1))
        return torch.where(failed.unsqueeze(-1) > 0, torch.nan, solution.squeeze(-1))

    def entropy(q: Values) -> Tensor:
        return size * HALF_LOG_2PI_E + q["scale_tril"].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    basis = torch.eye(size, dtype=torch.float64)
    both = basis[rows[rows != columns]] + basis[columns[rows != columns]]
    probes = torch.cat([torch.zeros(1, size, dtype=torch.float64), basis, -basis, both])
    return Family("Normal block", "real", statistics, probes, moments, updated, best, entropy=entropy)


def _log_and(function: Callable[[Tensor], Tensor]) -> Statistics:
    def statistics(u: Tensor) -> Tensor:
        return torch.cat([u.T.log(), function(u.T)])

    return statistics


def _gamma_moments(q: Values) -> Tensor:
    a, b = q["concentration"], q["rate"]
    return torch.stack([torch.digamma(a) - b.log(), a / b])


def _gamma_entropy(q: Values) -> Tensor:
    a, b = q["concentration"], q["rate"]
    return a - b.log() + torch.lgamma(a) + (1 - a) * torch.digamma(a)


GAMMA = Family(
    "Gamma", "positive", _log_and(lambda u: u), POSITIVE, _gamma_moments,
    lambda eta, _: {"concentration": eta[0] + 1, "rate": -eta[1]},
    lambda eta: -eta[0] / eta[1], entropy=_gamma_entropy, rate_power=1,
)  # fmt: skip


def _inverse_gamma_moments(q: Values) -> Tensor:
    a, b = q["concentration"], q["rate"]
    return torch.stack([b.log() - torch.digamma(a), a / b])


def _inverse_gamma_entropy(q: Values) -> Tensor:
    a, b = q["concentration"], q["rate"]
    return a + b.log() + torch.lgamma(a) - (1 + a) * torch.digamma(a)


INVERSE_GAMMA = Family(
    "InverseGamma", "positive", _log_and(torch.reciprocal), POSITIVE, _inverse_gamma_moments,
    lambda eta, _: {"concentration": -eta[0] - 1, "rate": -eta[1]},
    lambda eta: eta[1] / eta[0], entropy=_inverse_gamma_entropy, rate_power=-1,
)  # fmt: skip

SD = Family(
    "standard deviation", "positive", _log_and(lambda u: u**-2), POSITIVE,
    best=lambda eta: (2 * eta[1] / eta[0]).sqrt(),
)  # fmt: skip
SQUARE = Family(
    "root of a rate", "positive", _log_and(torch.square), POSITIVE,
    best=lambda eta: (-eta[0] / (2 * eta[1])).sqrt(),
)  # fmt: skip


def _beta_moments(q: Values) -> Tensor:
    a, b = q["concentration1"], q["concentration0"]
    return torch.stack([torch.digamma(a), torch.digamma(b)]) - torch.digamma(a + b)


def _beta_entropy(q: Values) -> Tensor:
    a, b = q["concentration1"], q["concentration0"]
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    digammas = (a - 1) * torch.digamma(a) + (b - 1) * torch.digamma(b)
    return log_beta - digammas + (a + b - 2) * torch.digamma(a + b)


BETA = Family(
    "Beta", "unit", lambda u: torch.cat([u.T.log(), torch.log1p(-u.T)]), _column(0.5, 0.2, 0.7),
    _beta_moments, lambda eta, _: {"concentration1": eta[0] + 1, "concentration0": eta[1] + 1},
    lambda eta: eta[0] / (eta[0] + eta[1]), entropy=_beta_entropy,
)  # fmt: skip


def dirichlet(size: int) -> Family:
    """Components of simplexes of one size: t = log u, each component an element."""

    def moments(q: Values) -> Tensor:
        alpha = q["concentration"]
        return (torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))).reshape(1, -1)

    def entropy(q: Values) -> Tensor:
        alpha, total = q["concentration"], q["concentration"].sum(-1)
        log_beta = torch.lgamma(alpha).sum(-1) - torch.lgamma(total)
        return log_beta + (total - size) * torch.digamma(total) - ((alpha - 1) * torch.digamma(alpha)).sum(-1)

    def best(eta: Tensor) -> Tensor:
        weight = eta.reshape(-1, size).clamp(min=0)
        return (weight / weight.sum(-1, keepdim=True)).reshape(-1)

    return Family(
        "Dirichlet", "simplex", lambda u: u.T.log(), _column(0.5, 0.2), moments,
        lambda eta, _: {"concentration": (eta[0] + 1).reshape(-1, size)}, best, entropy=entropy,
    )  # fmt: skip


FACTORS = {
    "Normal": (NORMAL, NORMAL_EXP, NORMAL_EXPS),
    "Gamma": (GAMMA,),
    "Exponential": (GAMMA,),
    "Chi2": (GAMMA,),
    "InverseGamma": (INVERSE_GAMMA,),
    "Beta": (BETA,),
}
PARAMETERS = {"real": (NORMAL,), "positive": (SD, GAMMA, INVERSE_GAMMA, SQUARE), "unit": (BETA,)}
