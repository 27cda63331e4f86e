"""Variational EM for Pyro.

Decorate a Pyro model with `vem_model`, fit it with `fit_vem`, read the `VEMResult` in ArviZ and
hold it against NUTS. The pieces work alone: `AnalyticKL_ELBO` and both guides drop into
``pyro.infer.SVI``.
"""

from .bound.elbo import AnalyticKL_ELBO
from .bound.kl import register_kl
from .bound.tables import ElboTerms, Plan
from .errors import ModelError, NonMonotoneError, UnsupportedModelError, VEMError
from .fit.driver import fit_vem
from .fit.result import VEMResult
from .fit.setup import FitOptions
from .fit.status import Status
from .guides.amortized import AmortizedNormal
from .guides.mean_field import MeanFieldNormal
from .model.roles import vem_model

__version__ = "0.1.0"

__all__ = [
    "AmortizedNormal",
    "AnalyticKL_ELBO",
    "ElboTerms",
    "FitOptions",
    "MeanFieldNormal",
    "ModelError",
    "NonMonotoneError",
    "Plan",
    "Status",
    "UnsupportedModelError",
    "VEMError",
    "VEMResult",
    "fit_vem",
    "register_kl",
    "vem_model",
]
