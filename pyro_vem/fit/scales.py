"""Lengths of the coordinates, so that a step of one is about a nat or a posterior sd."""

import functools
from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from ..guides.conjugate import MeanFieldConjugate
from ..guides.factorised import FactorisedNormal
from .setup import Setup
from .smooth import Vector, curvature_scale
from .state import State, loss_of


class Scales:
    """The lengths of both blocks along a fit.

    Free Gaussian factors have the Fisher information diag(1/sigma^2, 2) in (mu, log sigma).
    Everything else takes its lengths from the curvature of the bound, which is probed anew in
    rounds 1, 2, 4, 8, ...: lengths only shape the steps, and late rounds change little.

    Args:
        setup: the problem.
        still: parameters of the model that no step moves: their lengths are zero.
    """

    def __init__(self, setup: Setup, still: Collection[str] = ()) -> None:
        self._setup = setup
        self.held = setup.theta.where(still)  # numbers of theta that no step moves
        self._probed: dict[str, tuple[int, Vector]] = {}

    def of(self, state: State, block: str, iteration: int) -> Vector:
        """Lengths of a block ("E" or "M"), or of both ("joint")."""
        phi = self._phi(state, iteration) if block in ("E", "joint") else np.zeros(0)
        theta = self._curvature(state, "M", iteration) if block in ("M", "joint") else np.zeros(0)
        if theta.size and self.held.any():
            theta = np.where(self.held, 0.0, theta)
        return np.concatenate([phi, theta])

    def log_sds(self, size: int) -> NDArray[np.bool_]:
        """Coordinates that are logs of sds of Normal factors, in a block that begins with phi."""
        is_scale = self._normal[1]
        return np.pad(is_scale, (0, size - len(is_scale)))

    def of_factors(self, state: State) -> Vector:
        """Lengths of Normal factors, vectors too; one for what else there is, whose coordinates are logs."""
        scale = np.ones_like(state.phi)
        self._set_normal(scale, state)
        guide, phi = self._setup.guide, self._setup.phi
        if isinstance(guide, MeanFieldConjugate) and guide.blocks:
            values = phi.constrained(torch.as_tensor(state.phi))
            for site in guide.blocks:
                loc, tril = (guide.parameter_name(key, site) for key in ("loc", "scale_tril"))
                sd = values[tril].square().sum(-1).sqrt()
                rows = sd.unsqueeze(-1).expand(values[tril].shape).clone()
                rows.diagonal(dim1=-2, dim2=-1).fill_(0.5**0.5)  # whose coordinates are logs
                scale[phi.where([loc])], scale[phi.where([tril])] = sd.reshape(-1), rows.reshape(-1)
        return scale

    def _phi(self, state: State, iteration: int) -> Vector:
        is_loc, is_scale = self._normal
        is_all = bool((is_loc | is_scale).all())
        scale = np.ones_like(state.phi) if is_all else self._curvature(state, "E", iteration).copy()
        self._set_normal(scale, state)
        return scale

    def _set_normal(self, scale: Vector, state: State) -> None:
        """Give free Normal factors their lengths."""
        is_loc, is_scale = self._normal
        scale[is_loc] = np.exp(state.phi[is_scale])
        scale[is_scale] = 0.5**0.5

    @functools.cached_property
    def _normal(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Coordinates of the means, and of the log sds, of free Normal factors."""
        guide, phi = self._setup.guide, self._setup.phi
        if isinstance(guide, FactorisedNormal):
            free = free_sites(guide)
            return phi.where(map(guide.loc_name, free)), phi.where(map(guide.scale_name, free))
        if isinstance(guide, MeanFieldConjugate):
            normal = [site.name for site in guide.latents() if guide.kind(site) in ("", "Normal")]
            is_loc = phi.where(guide.parameter_name("loc", site) for site in normal)
            return is_loc, phi.where(guide.parameter_name("scale", site) for site in normal)
        return phi.where(()), phi.where(())

    def _curvature(self, state: State, block: str, iteration: int) -> Vector:
        age = iteration.bit_length()
        if block not in self._probed or self._probed[block][0] != age:
            loss, x = loss_of(self._setup, state, block)
            self._probed[block] = age, curvature_scale(loss, x)
        return self._probed[block][1]


def free_sites(guide: object) -> tuple[str, ...]:
    """Sites whose mean and sd are parameters of their own."""
    if not isinstance(guide, FactorisedNormal):
        return ()
    return tuple(site.name for site in guide.latents() if site.name not in guide.encoded)
