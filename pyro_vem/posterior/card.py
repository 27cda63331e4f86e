"""The card that ``print(fit)`` shows."""

import html
import textwrap

from torch import Tensor

from ..fit.edges import sentences
from ..fit.result import VEMResult

LABEL, WIDTH = 9, 100  # columns
MOST_NAMES = 6  # in a line
AGREEMENT = 0.1  # nats within which starts count as one optimum
# Quadratures are doubled until they stand still to 1e-9.
EXACT = ("closed form", "quadrature", "enumeration", "point")


def card(fit: VEMResult) -> str:
    """Status, bound, k-hat, parameters, which terms are exact, and what to do next.

    Args:
        fit: the result. Its diagnosis is computed once and kept.
    """
    return "\n".join(_wrapped(label, text) for label, text in _lines(fit))


def html_card(fit: VEMResult) -> str:
    """The card as an HTML table, for notebooks."""
    rows = [
        f'<tr><th style="text-align:left;vertical-align:top">{html.escape(label)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for label, text in _lines(fit)
    ]
    return f"<table>{''.join(rows)}</table>"


def _lines(fit: VEMResult) -> list[tuple[str, str]]:
    """Labels and texts of the card; a line without a label goes on from the one before."""
    rounds = f"{fit.n_iter} round{'s' if fit.n_iter != 1 else ''}"
    lines = [("VEM fit", f"{fit.status.name} in {rounds}, {fit.seconds:.2f} s")]
    if not fit.converged:
        lines.append(("", fit.status.value))
    error = f"+- {fit.elbo_se:.3f} nats" if fit.elbo_se else "nats, exact"
    lines.append(("ELBO", f"{fit.elbo:.3f} {error}"))
    setup = fit._setup if fit._setup is not None and fit._setup.processes.count == 1 else None
    diagnosis = fit._diagnosis if setup is not None and setup.problem.guide is not None else None
    if diagnosis is not None:
        lines.append(("k-hat", diagnosis.numbers.removeprefix("k-hat ")))
    if fit.params:
        lines.append(("params", ", ".join(_value(name, value) for name, value in fit.params.items())))
    lines += [("boundary" if i == 0 else "", text) for i, text in enumerate(sentences(fit.boundary))]
    if fit.starts:
        agree = sum(fit.elbo - start.elbo < AGREEMENT for start in fit.starts)
        lowest = min(start.elbo for start in fit.starts)
        lines.append(("starts", f"{agree} of {len(fit.starts)} within {AGREEMENT} nats; lowest {lowest:.3f}"))
    exact = [row.site for row in fit.plan.rows if row.method in EXACT]
    drawn = [row.site for row in fit.plan.rows if row.method not in EXACT and row.kind != "auxiliary"]
    lines.append(("exact", _listing(exact)))
    lines.append(("sampled", _listing(drawn)))
    lines += [("note", note) for note in fit.plan.notes]
    if diagnosis is not None:
        lines.append(("verdict", diagnosis.headline))
        lines += [("", f"- {text}") for text in (*diagnosis.reasons, *diagnosis.notes)]
    actions = diagnosis.actions if diagnosis is not None else _actions(fit)
    return lines + [("next" if i == 0 else "", text) for i, text in enumerate(actions)]


def _actions(fit: VEMResult) -> list[str]:
    """What to do next with a fit that has no posterior to judge: maximum likelihood or MAP."""
    setup = fit._setup
    if setup is None or setup.problem.guide is not None or not fit.converged:
        return []
    actions = []
    if setup.prototype.summed_out and not fit.starts:
        actions.append("fit_vem(..., num_starts=8) to look for better optima")
    if setup.theta.size:
        criteria = "" if setup.problem.map_sites else ", fit.criteria() to compare models"
        actions.append(f"fit.standard_errors(){criteria}")
    return actions


def _wrapped(label: str, text: str) -> str:
    indent = " " * LABEL
    if text.startswith("- "):
        indent += "  "
    return textwrap.fill(f"{label:<{LABEL}}{text}", WIDTH, subsequent_indent=indent).rstrip()


def _value(name: str, value: Tensor) -> str:
    if value.numel() <= 4:
        numbers = ", ".join(f"{float(x):.4g}" for x in value.reshape(-1))
        return f"{name} = [{numbers}]" if value.dim() else f"{name} = {numbers}"
    return f"{name} {tuple(value.shape)}"


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest if names else "none"
