"""Frozen tables that print themselves: the plan of a bound, and its terms."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
        method: "closed form", "quadrature" (doubled until it stands still), "upper bound" (of a KL),
            "draws", "score function" (draws of a site that is not reparameterised), "enumeration" or
            "point" (nothing random enters).
        proof: the proof of a closed form, or why the site is sampled.
    """

    site: str
    plates: tuple[str, ...]
    kind: str
    method: str
    proof: str

    @property
    def is_divergence(self) -> bool:
        """True if the term is a formula for the KL, or for a bound of it."""
        return self.kind == "KL" and self.method in ("closed form", "upper bound")


@dataclass(frozen=True)
class Plan:
    """The method of every term of the bound, with its proof.

    Attributes:
        rows: one row a term.
        notes: what else is not as usual.
        views: guide sites that are seen as another distribution, by name.
        downstream: terms that depend on a site without reparameterisation, by its name.

    Example:
        >>> row = PlanRow("z", (), "KL", "closed form", "independent factors by construction")
        >>> print(Plan((row,)))
        site  plates  kind  method       proof
        z             KL    closed form  independent factors by construction
        >>> Plan((row,))["z"].method
        'closed form'
    """

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    views: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    downstream: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False, compare=False)

    def with_notes(self, *notes: str) -> "Plan":
        """The plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def demoted(self, proof: str) -> "Plan":
        """The plan with every closed form sampled instead."""
        rows = [replace(row, method="draws", proof=proof) if row.is_divergence else row for row in self.rows]
        rows += [
            PlanRow(view.auxiliary, self[name].plates, "auxiliary", "draws", "auxiliary site of the guide")
            for name, view in self.views.items()
        ]
        return Plan(tuple(rows), self.notes)

    def __getitem__(self, site: str) -> PlanRow:
        return {row.site: row for row in self.rows}[site]

    @property
    def exact(self) -> tuple[str, ...]:
        """Sites whose term is in closed form; draws enter it through the site's parents only."""
        return tuple(row.site for row in self.rows if row.method == "closed form")

    def __str__(self) -> str:
        return "\n".join([_table(PlanRow, self.rows), *self.notes])


@dataclass(frozen=True)
class TermRow:
    """The value of one term of the bound, in nats.

    Attributes:
        se: Monte Carlo standard error of the value.
        share: part of the variance of a one-draw gradient that is the term's own (the terms'
            gradients are correlated, so the parts are of their sum); None if not measured.
    """

    site: str
    plates: tuple[str, ...]
    kind: str
    method: str
    proof: str
    value: float
    se: float
    share: float | None = None

    @classmethod
    def of(cls, row: PlanRow, value: float, se: float, share: float | None = None) -> "TermRow":
        """A row of the plan with its numbers."""
        return cls(row.site, row.plates, row.kind, row.method, row.proof, value, se, share)


@dataclass(frozen=True)
class ElboTerms:
    """The bound as a table, in nats.

    Attributes:
        rows: contribution of each site.
        elbo: the evidence lower bound: the sum of the rows up to Monte Carlo error. (The rows'
            errors cancel in large part, so its own error is smaller than theirs.)
        elbo_se: its Monte Carlo standard error.

    Example:
        >>> row = TermRow("z", (), "KL", "closed form", "independent factors", -0.5, 0.0)
        >>> print(ElboTerms((row,), elbo=-0.5, elbo_se=0.0))
        site  plates  kind  method       proof                value  se
        z             KL    closed form  independent factors  -0.5   0
        reconstruction 0, regularisation -0.5, ELBO -0.5 +- 0
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
        parts = f"reconstruction {self.reconstruction:.6g}, regularisation {self.regularisation:.6g}"
        total = f"{parts}, ELBO {self.elbo:.6g} +- {self.elbo_se:.2g}"
        return "\n".join([_table(TermRow, self.rows), total])


def _table(row_class: type, rows: Iterable[Any]) -> str:
    rows = list(rows)
    names = [f.name for f in fields(row_class)]
    names = [n for n in names if n != "share" or any(row.share is not None for row in rows)]
    return text_table(names, [[getattr(row, name) for name in names] for row in rows])
