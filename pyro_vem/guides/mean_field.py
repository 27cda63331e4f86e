"""`MeanFieldNormal`: a diagonal Gaussian over the unconstrained latents."""

from typing import Any

from torch import Tensor

from ..model.sites import Latent
from .factorised import FactorisedNormal


class MeanFieldNormal(FactorisedNormal):
    """Diagonal Gaussian over all latents on their unconstrained scale.

    Each site is sampled at the site itself: Normal where the support is real, elsewhere Normal
    pushed through the prior's own bijector. There is no auxiliary site and no Delta, so an
    analytic KL sees the whole factor, Jacobian included. Works as a guide in ``SVI``,
    ``Predictive``, ``poutine.trace`` and `fit_vem`. Sites that the model's `vem_model` roles
    list in ``map_sites`` are left out: the M-step owns them.

    Args:
        model: the Pyro model.
        init: start of the means: None for values near prior medians, a dict of values on the
            constrained scale (the rest near prior medians), or a Pyro strategy such as
            ``init_to_median``. Standard deviations start at 0.1 on the unconstrained scale.
        name: prefix of the parameters ``<name>.loc.<site>`` and ``<name>.scale.<site>``, each
            shaped batch + unconstrained event.

    Raises:
        ModelError, UnsupportedModelError: at the first call, if the model cannot be run at its
            initial values or has a latent that no Gaussian can follow.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic differentiation
        variational inference, JMLR 18(14).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("rate", dist.Gamma(3.0, 2.0))
        >>> guide = MeanFieldNormal(model, init={"rate": torch.tensor(1.5)})
        >>> guide()["rate"] > 0
        tensor(True)
        >>> pyro.clear_param_store()
    """

    def moments(self, site: Latent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and sd of the site's own factor."""
        return self.free_moments(site)
