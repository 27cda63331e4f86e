"""Variational EM for Pyro.

Decorate a Pyro model with `vem_model`, fit it with `fit_vem`, read the `VEMResult` in ArviZ and
hold it against NUTS. The pieces work alone: `AnalyticKL_ELBO` and both guides drop into
``pyro.infer.SVI``.
"""

from importlib import import_module
from typing import Any

from .bound.elbo import AnalyticKL_ELBO
from .bound.kl import register_kl
from .bound.tables import ElboTerms, Plan
from .errors import ModelError, NonMonotoneError, UnsupportedModelError, VEMError
from .fit.driver import fit_vem
from .fit.options import FitOptions
from .fit.result import VEMResult
from .fit.status import Status, Step
from .guides.amortized import AmortizedNormal
from .guides.conjugate import MeanFieldConjugate
from .guides.mean_field import MeanFieldNormal
from .model.roles import vem_model

__version__ = "0.1.0"

__all__ = [
    "AmortizedNormal",
    "AnalyticKL_ELBO",
    "Calibration",
    "CalibrationVerdict",
    "Comparison",
    "Diagnosis",
    "ElboTerms",
    "FitOptions",
    "MeanFieldConjugate",
    "MeanFieldNormal",
    "ModelError",
    "NonMonotoneError",
    "Plan",
    "Status",
    "Step",
    "UnsupportedModelError",
    "VEMError",
    "VEMResult",
    "Verdict",
    "calibrate",
    "fit_vem",
    "plots",
    "register_kl",
    "vem_model",
]

# The posterior room imports ArviZ, pandas and matplotlib: it is loaded when first asked for.
_LAZY = {
    "Calibration": ".posterior.calibration_plot",
    "CalibrationVerdict": ".posterior.calibration_plot",
    "calibrate": ".posterior.calibrate",
    "Comparison": ".posterior.comparison",
    "Diagnosis": ".posterior.diagnose",
    "Verdict": ".posterior.diagnose",
    "plots": ".posterior.plots",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name], __name__)
    return module if name == "plots" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
