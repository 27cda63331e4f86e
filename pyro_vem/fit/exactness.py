"""Keeping the bound exact along a fit: compiling its terms, enough nodes, and a last look at the model."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bound.deterministic import Deterministic, Flat, factors_of
from ..errors import ModelError
from ..guides.factorised import FactorisedNormal
from ..model.parameters import PartlyHeld
from ..model.sites import Latent
from .costly import on_fewer
from .measure import MOST_NUMBERS, disagreement
from .options import FitOptions
from .scales import free_sites
from .setup import Setup
from .smooth import Smooth, Vector, newton_step
from .state import State, joint_loss, own_elbo

RECHECK_SEED = 104_729
CHECK_DRAWS, CHECK_RUNS = 1024, 128  # the second where each draw is a run of its own
SELF_CHECK = 256  # draws that closed forms of KL terms beside draws are held against at the start
MOST_CHECKED = 500_000  # densities evaluated for that check
CHECK_LIMIT = 5.0  # standard errors, of each term
DRAW_ERROR = 0.1  # posterior sds that fixed draws may move the optimum by
MOST_DRAWS = 4096
FEW_ERROR = 1e-2  # sds that few draws may move a coordinate of the optimum by
FEW_NATS = 1e-3  # nats that they may move it by in all


def compile_terms(setup: Setup, options: FitOptions) -> None:
    """Replace the terms that have a compiled form; what they are is in the plan."""
    map_names, objective = setup.problem.map_sites, setup.objective
    if objective.exact is not None:  # lifted
        return
    if isinstance(setup.guide, FactorisedNormal):  # no factor for idle elements
        latents = {site.name: site for site in setup.guide.latents()}
    else:
        latents = {site.name: replace(site, idle=None) for site in setup.latents}
    if not options.compiled or setup.analytic == "never" or setup.guide is None:
        return
    objective.is_gridded = True
    if setup.problem.model.first_available_dim is not None:  # a log of a sum is no term of its own
        return
    factors = factors_of(setup.problem, setup.guide, objective.plan.views, latents)
    if factors is None:
        return
    objective.exact = Deterministic(
        setup.problem,
        latents,
        factors,
        tuple(p for p in setup.theta.parameters if p.name not in map_names),
        tuple(setup.prototype.latent(name) for name in map_names),
        setup.held,
        objective.seed,
        _flat_moments(setup, latents),
    )


def _flat_moments(setup: Setup, latents: Mapping[str, Latent]) -> Flat | None:
    """Gathers from the flat vectors, for a guide whose factors are parameters of their own."""
    guide, map_names = setup.guide, setup.problem.map_sites
    if not isinstance(guide, FactorisedNormal) or guide.encoded or isinstance(setup.phi, PartlyHeld):
        return None
    plain = [name for name in setup.theta.names if name not in map_names]
    moments = [*map(guide.loc_name, latents), *map(guide.scale_name, latents)]
    here, parameters = setup.phi.positions(moments), setup.theta.positions([*plain, *map_names])

    def flat(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        centre, log_scale = phi.index_select(0, here).chunk(2)
        if len(parameters):
            centre = torch.cat([centre, theta.index_select(0, parameters)])
        return centre, log_scale.exp()

    return flat


def settle_nodes(setup: Setup, phi: Vector, theta: Vector, *, is_last: bool = False) -> str | None:
    """Enough quadrature nodes at a point; what changed, or None.

    Where a fit ends, rows that no grid is enough for are drawn, and drawn ones get a grid if there is one:
    before, factors may be wider than any grid, or the start as narrow as is lucky.
    """
    objective, processes = setup.objective, setup.processes
    values, was_exact = values_of(setup, phi, theta), objective.is_exact
    is_other = processes.any(objective.exact is not None and objective.exact.refine(*values, is_last))
    had = _agreed(setup, objective.nodes)
    is_looked_at = objective.is_gridded and (bool(had) if is_last else any(had.values()))
    now = _agreed(setup, objective.nodes_at(*values)) if is_looked_at else had
    lost = [name for name, nodes in had.items() if nodes and now.get(name) == 0]
    gained = [name for name, nodes in had.items() if not nodes and now.get(name)]
    is_finer = any(now.get(name, 0) > nodes > 0 for name, nodes in had.items())
    if not is_last:
        is_finer, lost, gained = is_finer and not lost, [], []
    if not (is_other or lost or gained or is_finer):
        return None
    for name in lost:  # for good, or rows might come and go
        objective.drawn.add(name)
        objective.add_note(f"{name}: sampled from here on: no grid is enough")
    prepare(setup, phi, theta)
    if lost or (was_exact and not objective.is_exact):
        return "draws where quadrature nodes are too few"
    return f"a grid is enough for {', '.join(gained)}" if gained else "more quadrature nodes"


def _agreed(setup: Setup, nodes: dict[str, int]) -> dict[str, int]:
    """Nodes of each row in all processes: the most, and 0 (draws) where one process has no grid for it."""
    every = setup.processes.gathered(nodes)
    found = {name: [one[name] for one in every if name in one] for one in every for name in one}
    return {name: max(counts) if min(counts) else 0 for name, counts in found.items()}


def prepare(setup: Setup, phi: Vector, theta: Vector) -> None:
    """Choose grids and draws at a point: the same in all processes, so that they take the same steps.

    Raises:
        ModelError: if closed forms differ between processes.
    """
    processes, objective = setup.processes, setup.objective
    exact, values = objective.exact, values_of(setup, phi, theta)
    if processes.count > 1:
        _check_closed_forms(setup)
        refused = {} if exact is None else {n: r for n, r in exact.refused.items() if n not in exact.names}
        for name, reason in processes.union(refused).items():
            if exact is not None and name in exact.names:
                exact.refuse(name, f"not compiled by another process: {reason}")
    objective.prepare(*values)
    if processes.count > 1:
        sampled = [name for name, nodes in _agreed(setup, objective.nodes).items() if not nodes]
        objective.prepare(*values, sampled)


def _check_closed_forms(setup: Setup) -> None:
    forms = _closed_forms(setup)
    for other in setup.processes.gathered(forms):
        for name in {*forms, *other}:
            if forms.get(name) != other.get(name):
                raise ModelError(
                    f"the closed form of {name!r} differs between processes ({forms.get(name)} in process "
                    f"{setup.processes.rank}): give each process rows of every kind, or "
                    "guide=MeanFieldNormal(model)"
                )


def _closed_forms(setup: Setup) -> dict[str, str]:
    """What steps in closed form are made of: families of variables, and which ones share a table."""
    if setup.lifted is None:
        return {}
    found = setup.lifted.lifted.found
    forms = {n: f"{c.family.name} {tuple(c.layout.shape[1:])}" for n, c in found.codings.items()}
    forms |= {n: own.note for n, own in setup.lifted.lifted.matching.found.items()}
    return forms | {n: f"a table of {', '.join(sorted(table.index))}" for n, table in found.tables.items()}


def check_kl(setup: Setup, phi: Vector, theta: Vector) -> None:
    """Sample the closed forms of KL terms beside draws if draws disagree, and say so in the plan."""
    objective = setup.objective
    if not objective.is_random or objective.is_exact or not objective.plan.exact:
        return
    values = values_of(setup, phi, theta)
    gap = disagreement([objective.sample(*values, SELF_CHECK, 1, ("densities", "terms"))])
    reason = setup.processes.first(gap)
    if reason is not None:
        _sample_kl(setup, reason)
        prepare(setup, phi, theta)


def _sample_kl(setup: Setup, reason: str) -> None:
    """No closed form of a KL from here on, those of constant priors among the compiled terms included."""
    objective = setup.objective
    objective.plan = objective.plan.demoted(reason)
    if isinstance(objective.exact, Deterministic):
        objective.exact.priors.clear()


def settle(setup: Setup, state: State) -> str | None:
    """What had to change in the bound at the point that a fit has reached, or None.

    Quadrature nodes are doubled where they have become too few, compiled slots are held against the model at
    draws of the fitted guide (a kink or a branch may lie where no probe went), and the whole bound is held
    against draws of log p - log q through the ordinary model.
    """
    change = settle_nodes(setup, state.phi, state.theta, is_last=True)
    if change is not None:
        return change
    objective = setup.objective
    values = values_of(setup, state.phi, state.theta)
    exact = objective.exact
    here = exact.recheck(*values, RECHECK_SEED) if exact is not None else []
    wrong = setup.processes.union({name: exact.refused[name] for name in here} if exact is not None else {})
    if wrong:
        for name, reason in wrong.items():
            objective.add_note(f"{name}: sampled from here on: {reason}")
            if exact is not None and name not in here:
                exact.refuse(name, reason)
        prepare(setup, state.phi, state.theta)
        return f"sampled from here on: {', '.join(wrong)}"
    gaps = setup.processes.union(_gaps_to_draws(setup, state))
    if not gaps:
        return None
    for name, gap in gaps.items():
        objective.add_note(f"{name}: sampled from here on: {gap}")
        if objective.exact is not None and objective.exact.refuse(name, gap):
            pass
        elif any(name in batch.names for batch in objective.batches):
            objective.drawn.add(name)
        else:  # it is no one term: nothing is left to believe
            objective.exact, objective.is_gridded = None, False
            _sample_kl(setup, gap)
    prepare(setup, state.phi, state.theta)
    return f"sampled from here on: {', '.join(gaps)}"


def _gaps_to_draws(setup: Setup, state: State) -> dict[str, str]:
    """Exact terms that draws disagree with, and by how much.

    Each exact term is compared with its own average over draws through the ordinary model,
    and where every term is exact the whole bound with the average of log p - log q.
    """
    objective, values = setup.objective, values_of(setup, state.phi, state.theta)
    exact_terms = objective.exact_terms(*values)
    not_averages = objective.exact.not_averages if objective.exact is not None else frozenset()
    exact_terms = {name: term for name, term in exact_terms.items() if name not in not_averages}
    if not exact_terms:
        return {}
    rows = objective.exact.num_elements if objective.exact is not None else 0
    draws = min(CHECK_DRAWS, max(64, MOST_CHECKED // max(1, rows)), objective.draws_for(MOST_NUMBERS))
    found = objective.sample(*values, draws, RECHECK_SEED, ("densities", "terms"), most_runs=CHECK_RUNS)
    draws = len(found["densities"]["log_p"])
    pairs = {name: (exact, found["terms"][name]) for name, exact in exact_terms.items()}
    if objective.is_exact and not not_averages:
        ratio = found["densities"]["log_p"] - found["densities"]["log_q"]
        pairs["the bound"] = torch.tensor(own_elbo(setup, state)), ratio
    gaps = {}
    for name, (exact, sampled) in pairs.items():
        off, se = abs(float(sampled.mean() - exact)), float(sampled.std()) / draws**0.5
        if off > CHECK_LIMIT * se + 1e-6 * (1 + abs(float(exact))):
            is_noise = se > 1e-9 * off  # else rounding, and their ratio says nothing
            by = f"{off / se:.0f} standard errors of" if is_noise else "at each of"
            gaps[name] = f"its exact value is {off:.3g} nats ({by} {draws} draws) off"
    if len(gaps) > 1:
        gaps.pop("the bound", None)  # the terms say why
    return gaps


def more_draws(setup: Setup, state: State, scale: Vector) -> str | None:
    """Four times as many draws where other draws would have moved the optimum; what to say, or None."""
    objective, processes = setup.objective, setup.processes
    if not processes.any(objective.is_random and not objective.is_exact and state.joint.size > 0):
        return None
    step = step_on_other_draws(setup, state, scale)
    if step is None:
        objective.add_note(f"{objective.num_draws:,} fixed draws: at others the bound is not finite")
        return None
    error = processes.most(float(np.abs(step[_means(setup)]).max(initial=0)))
    if objective.num_draws < objective.full_draws and excess(step) > 1:
        objective.take_draws(objective.full_draws)
        return f"{objective.num_draws:,} draws: fewer were not the same here"
    if error > DRAW_ERROR and 4 * objective.num_draws <= MOST_DRAWS:
        objective.take_draws(4 * objective.num_draws)
        return f"{objective.num_draws:,} draws: other ones moved the optimum by {error:.2g} posterior sd"
    objective.add_note(draws_note(objective.num_draws, error))
    return None


def excess(step: Vector) -> float:
    """How many times as far as few draws may they move the optimum, if others move it by this step."""
    nats = 0.5 * float(step @ step)
    return max(float(np.abs(step).max(initial=0)) / FEW_ERROR, (nats / FEW_NATS) ** 0.5)


def draws_note(num_draws: int, error: float) -> str:
    """What the plan says of fixed draws."""
    return f"{num_draws:,} fixed draws: they move the optimum by about {error:.1g} sd"


def step_on_other_draws(setup: Setup, state: State, scale: Vector, times: int = 4) -> Vector | None:
    """How far the optimum is on other draws, several times as many, in posterior sds; None if nowhere.

    By the Newton step for the difference of both gradients, which tells the error that the fixed draws leave,
    their bias in skewed terms included.
    """
    objective = setup.objective
    twin = replace(setup, objective=objective.with_other_draws(times * objective.num_draws))
    here, there = (Smooth(joint_loss(one), state.joint, scale, is_bent=False) for one in (setup, twin))
    if not np.isfinite(there.value(there.zero)):
        return None
    gradient = there.gradient(there.zero) - here.gradient(here.zero)
    return newton_step(joint_loss(on_fewer(setup) or setup), state.joint, scale, gradient)


def _means(setup: Setup) -> NDArray[np.bool_]:
    """Coordinates of the joint vector in posterior sds: means of free factors, else all of them."""
    every = np.ones(setup.phi.size + setup.theta.size, dtype=bool)
    guide, free = setup.guide, free_sites(setup.guide)
    if not isinstance(guide, FactorisedNormal) or not free:
        return every
    is_mean = setup.phi.where(guide.loc_name(site) for site in free)
    return np.concatenate([is_mean, np.zeros(setup.theta.size, dtype=bool)])


def values_of(setup: Setup, phi: Vector, theta: Vector) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Flat vectors as parameters by name, constrained."""
    return setup.phi.constrained(torch.as_tensor(phi)), setup.theta_values(torch.as_tensor(theta))
