"""Two engines that run NUTS on a `Density`: Pyro's, and nutpie's."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ..errors import ModelError
from ..model.checks import SingularMatrix
from .density import Density, Gradient

# Steps from which Pyro learns its metric: its windows need 150, and one that is right already gains
# nothing in a few hundred.
LEARNS, RELEARNS = 150, 300


@dataclass(frozen=True)
class NUTSOptions:
    """How NUTS is run.

    Attributes:
        num_chains: chains, one after another with Pyro, in threads with nutpie.
        num_samples: draws kept of each.
        warmup_steps: adaptation steps of each. Chains start in the posterior with its covariance as
            their metric; 25 steps did for eight schools and for 89 latents.
        target_accept_prob: higher makes smaller steps. Eight schools diverge somewhere in most runs
            at 0.8 and hardly at 0.95, for 1.7 times the gradients.
        progress: bars; None shows them in a terminal only.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> NUTSOptions(num_samples=200).num_chains
        4
    """

    num_chains: int = 4
    num_samples: int = 1000
    warmup_steps: int = 200
    target_accept_prob: float = 0.95
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.num_chains < 1 or self.num_samples < 4 or self.warmup_steps < 1:
            raise ValueError("NUTS needs a chain, a step of warm-up and four draws at least")
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(f"target_accept_prob={self.target_accept_prob}: give a number between 0 and 1")

    @property
    def is_shown(self) -> bool:
        """Whether there are progress bars."""
        return sys.stderr.isatty() if self.progress is None else self.progress


class Run(NamedTuple):
    """Points of the chains, (chain, draw, dim), and which of them ended a diverging trajectory."""

    points: Tensor
    diverging: Tensor


class Potential(torch.autograd.Function):
    """Minus the log density, its gradient taken along: Pyro asks for both of them by autograd."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gradient: Gradient) -> Tensor:
        """Minus the density at z."""
        value, slope = gradient(z)
        ctx.save_for_backward(slope)
        return -value

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        """Its gradient, as computed on the way forward."""
        (slope,) = ctx.saved_tensors
        return -weight * slope, None


def _pyro(density: Density, options: NUTSOptions, seed: int) -> Run:
    learns = LEARNS if density.root.dim() == 1 else RELEARNS
    shape = options.num_chains, options.num_samples
    points, diverging = torch.empty(*shape, density.dim), torch.zeros(shape, dtype=torch.bool)
    for chain, own in enumerate(np.random.SeedSequence(seed).generate_state(options.num_chains).tolist()):
        pyro.set_rng_seed(own)
        kernel = NUTS(
            potential_fn=lambda at: Potential.apply(at["z"], density.gradient),  # type: ignore[no-untyped-call]
            adapt_mass_matrix=options.warmup_steps >= learns,
            target_accept_prob=options.target_accept_prob,
        )
        mcmc = MCMC(
            kernel,
            options.num_samples,
            warmup_steps=options.warmup_steps,
            initial_params={"z": density.start(own)},
            disable_progbar=not options.is_shown,
        )
        mcmc.run()
        points[chain] = mcmc.get_samples()["z"]
        diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
    return Run(points, diverging)


def _nutpie(density: Density, options: NUTSOptions, seed: int) -> Run:
    try:
        import nutpie
        from nutpie.compiled_pyfunc import from_pyfunc
    except ImportError as error:
        raise ModelError('sampler="nutpie" needs nutpie: pip install "pyro-vem[nutpie]"') from error

    errors: list[Exception] = []

    def log_density(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        try:
            value, slope = density.gradient(torch.tensor(x, device=density.loc.device))  # in its own thread
        except Exception as error:  # one that leaves a thread of nutpie's ends the process
            # As Pyro has it, there is no density where a matrix has no decomposition.
            if not isinstance(error, SingularMatrix):
                errors.append(error)
            return -np.inf, np.zeros_like(x)
        return float(value), slope.cpu().numpy()

    model = from_pyfunc(
        density.dim,
        lambda: log_density,
        lambda *_: lambda x: {"z": np.array(x)},
        [np.dtype(np.float64)],
        [(density.dim,)],
        ["z"],
        make_initial_point_fn=lambda seed: density.start(seed % 2**63).cpu().numpy(),
    )
    # Pyro's handlers are global: chains that run the model itself must not run side by side.
    cores = min(options.num_chains, os.cpu_count() or 1) if density.graph is not None else 1
    trace = nutpie.sample(
        model,
        draws=options.num_samples,
        tune=options.warmup_steps,
        chains=options.num_chains,
        cores=cores,
        seed=seed,
        target_accept=options.target_accept_prob,
        progress_bar=options.is_shown,
        save_warmup=False,
    )
    if errors:
        raise errors[0]
    return Run(
        *(torch.tensor(part.values) for part in (trace.posterior["z"], trace.sample_stats["diverging"]))
    )


ENGINES: Mapping[str, Callable[[Density, NUTSOptions, int], Run]] = {"pyro": _pyro, "nutpie": _nutpie}
