"""Kullback-Leibler divergences: pyro_vem's own table, apart from torch's.

torch's registry is neither read nor written: several of its entries are wrong at the edges, and
an entry added there would change other people's numbers. A torch formula is in this table only
where its value and its gradients in both arguments have been compared with quadrature.
"""

from . import discrete, families, gaussian, multivariate  # noqa: F401  (each fills the table)
from .entropy import negative_entropy
from .table import canonical, divergence, kind_of, leaf_of, lookup, register_kl

__all__ = [
    "canonical",
    "divergence",
    "kind_of",
    "leaf_of",
    "lookup",
    "negative_entropy",
    "register_kl",
]
