"""Settings of a fit that are rarely needed."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class FitOptions:
    """Settings that are rarely needed.

    Attributes:
        num_draws: fixed draws for terms without a closed form; even. On the way fewer may serve, and of the
            usual 256 also at the end, where others would not move the optimum by 0.01 posterior sds.
        elbo_draws: most fresh draws spent on the reported ELBO.
        step_iterations: most optimiser iterations within one E- or M-step.
        compiled: whether terms are compiled to closed forms and quadratures where they can be.
        annealed_epochs: of a network's training, over which its KL terms rise from nothing to their
            full weight. Bounds that are reported or chosen by are always the full ones.
        encoder_steps: on batches of their own, for each step of encoder and decoder, while the mutual
            information of rows and latents still rises from epoch to epoch: against decoders that learn
            to do without latents.
        device: that the fit runs on; None for the device of the data. Data are moved to it, batch by
            batch where they come in batches; modules are to be on it already, as anywhere in torch.
        sharded: plates whose rows are shared out over the processes of torch.distributed; each gives
            its own rows as data, and all get the fit of all rows.

    Raises:
        ValueError: for numbers that are too small, or an odd number of draws.

    Example:
        >>> FitOptions(num_draws=512).num_draws
        512
    """

    num_draws: int = 256
    elbo_draws: int = 4096
    step_iterations: int = 200
    compiled: bool = True
    annealed_epochs: int = 0
    encoder_steps: int = 1
    sharded: tuple[str, ...] = ()
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.num_draws < 32 or self.num_draws % 2:
            raise ValueError(f"num_draws={self.num_draws}: give an even number of at least 32")
        if self.elbo_draws < 100 or self.step_iterations < 1:
            raise ValueError("elbo_draws must be at least 100 and step_iterations at least 1")
        if self.annealed_epochs < 0 or self.encoder_steps < 1:
            raise ValueError("annealed_epochs must be at least 0 and encoder_steps at least 1")
        plates: Any = self.sharded
        if isinstance(plates, str):  # a sequence of letters
            raise ValueError(f"sharded={plates!r}: give a tuple of names of plates")
