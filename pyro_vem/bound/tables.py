"""Frozen tables that print themselves: the plan of a bound, and its terms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any


def text_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as aligned text, numbers to six digits.

    Example:
        >>> print(text_table(["site", "value"], [["mu", 1.5], ["tau", None]]))
        site  value
        mu    1.5
        tau
    """
    cells = [list(headers)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)
    return str(value)


@dataclass(frozen=True)
class PlanRow:
    """How one site enters the bound.

    Attributes:
        kind: "likelihood", "KL", "auxiliary" or "prior of a MAP site".
        method: "closed form" or "draws".
        reason: the proof of a closed form, or why the site is sampled.
    """

    site: str
    plates: tuple[str, ...]
    kind: str
    method: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The method of every term of the bound, with its proof or reason.

    Example:
        >>> row = PlanRow("z", (), "KL", "closed form", "independent factors by construction")
        >>> print(Plan((row,)))
        site  plates  kind  method       reason
        z             KL    closed form  independent factors by construction
        >>> Plan((row,))["z"].method
        'closed form'
    """

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> PlanRow:
        return {row.site: row for row in self.rows}[site]

    @property
    def exact(self) -> tuple[str, ...]:
        """Sites whose term is in closed form."""
        return tuple(row.site for row in self.rows if row.method == "closed form")

    def __str__(self) -> str:
        return "\n".join([_table(PlanRow, self.rows), *self.notes])


@dataclass(frozen=True)
class TermRow:
    """The value of one term of the bound, in nats, and its Monte Carlo standard error."""

    site: str
    kind: str
    method: str
    value: float
    se: float


@dataclass(frozen=True)
class ElboTerms:
    """The bound as a table, in nats.

    Attributes:
        rows: contribution of each site.
        elbo: the evidence lower bound: the sum of the rows up to Monte Carlo error. (The rows'
            errors cancel in large part, so its own error is smaller than theirs.)
        elbo_se: its Monte Carlo standard error.

    Example:
        >>> print(ElboTerms((TermRow("z", "KL", "closed form", -0.5, 0.0),), elbo=-0.5, elbo_se=0.0))
        site  kind  method       value  se
        z     KL    closed form  -0.5   0
        ELBO -0.5 +- 0
    """

    rows: tuple[TermRow, ...]
    elbo: float
    elbo_se: float

    def __getitem__(self, site: str) -> TermRow:
        return {row.site: row for row in self.rows}[site]

    @property
    def reconstruction(self) -> float:
        """Expected log likelihood, in nats."""
        return sum((row.value for row in self.rows if row.kind == "likelihood"), 0.0)

    @property
    def regularisation(self) -> float:
        """The rest of the ELBO, which is minus the KL terms, plus log priors of MAP sites, in nats."""
        return sum((row.value for row in self.rows if row.kind != "likelihood"), 0.0)

    def __str__(self) -> str:
        total = f"ELBO {self.elbo:.6g} +- {self.elbo_se:.2g}"
        return "\n".join([_table(TermRow, self.rows), total])


def _table(row_class: type, rows: Iterable[Any]) -> str:
    names = [field.name for field in fields(row_class)]
    return text_table(names, [[getattr(row, name) for name in names] for row in rows])
