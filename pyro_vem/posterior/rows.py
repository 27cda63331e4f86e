"""k-hat row by row: the factors of one plate, each judged alone with the globals at their medians."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bound.draws import NoiseSpec, independent_noise
from ..fit.result import VEMResult
from ..model.sites import Plate
from .arrowhead import Vector
from .containers import psis
from .importance import KHAT_LIMIT, NEARLY_EQUAL, at_noise

# A row's log ratio is close to a cubic in its noise: with fewer draws the tail that is fitted (3 sqrt(n))
# reaches from the tail of the cubic into the plateau of its hump, and k-hat comes out as 2 or 5.
NUM_DRAWS = 40_000
MOST_ROWS = 500  # smoothed; beyond, those whose log weights vary most
MOST_NUMBERS = 100_000_000  # draws times rows of densities
TEST = 0.7  # noise by which elements are told apart


@dataclass(frozen=True, eq=False)
class RowKhat:
    """Tail indices of the rows of a plate.

    Attributes:
        plate: name of the plate whose latents were looked at.
        khat: one for each row; nan where it was not looked at, 0 where weights are nearly equal: the
            tail of such weights is harmless, and the fit of a Pareto distribution to it erratic.
    """

    plate: str
    khat: Vector

    @property
    def worst(self) -> tuple[int, float]:
        """Row with the largest k-hat, and that."""
        row = int(np.nanargmax(self.khat))
        return row, float(self.khat[row])

    @property
    def num_high(self) -> int:
        """Rows above the limit."""
        return int(np.nansum(self.khat > KHAT_LIMIT))

    @property
    def notes(self) -> list[str]:
        """Which rows are above the limit, in a sentence; nothing where none is."""
        if not self.num_high:
            return []
        row, worst = self.worst
        plate, limit = self.plate, KHAT_LIMIT
        return [f"k-hat above {limit} in {self.num_high} rows of plate {plate!r}: {worst:.2f} in row {row}"]


def row_khat(fit: VEMResult, seed: int = 1) -> RowKhat | None:
    """k-hat of each row of the largest plate with latents inside; None where rows cannot be told apart.

    The weights of a row are those of its own latents only, so that k-hat does not grow with the
    number of rows, as that of all latents together does.
    """
    specs = fit.setup.objective.specs
    plates = {plate for spec in specs for plate in spec.plates}
    if not plates:
        return None
    plate = max(plates, key=lambda p: (p.size, p.name))
    inside = [spec for spec in specs if plate in spec.plates]
    owners = owners_of(fit, plate, inside)
    if owners is None:
        return None
    numbers = sum(len(owner) for owner in owners.values())
    num = min(NUM_DRAWS, max(200, MOST_NUMBERS // max(1, numbers)))
    noise = {spec.name: torch.zeros(num, *spec.shape, dtype=torch.float64) for spec in specs}
    noise |= independent_noise(inside, num, torch.Generator().manual_seed(seed))
    log_weights, _ = by_owner(at_noise(fit, noise, "model_rows", "guide_rows"), owners, plate.size)
    return RowKhat(plate.name, _smoothed(log_weights))


def by_owner(
    densities: Mapping[str, Mapping[str, Tensor]], owners: Mapping[str, Tensor], size: int
) -> tuple[Vector, Vector]:
    """Log p - log q of each row, (draws, size), and of what belongs to no row, (draws,)."""
    num = len(next(iter(densities["model_rows"].values())))
    rows, rest = torch.zeros(num, size, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
    for group, sign in (("model_rows", 1.0), ("guide_rows", -1.0)):
        for name, value in densities[group].items():
            owner, flat = owners[f"{group}/{name}"], sign * value.double().reshape(num, -1)
            rows.index_add_(1, owner[owner >= 0], flat[:, owner >= 0])
            rest += flat[:, owner < 0].sum(1)
    return rows.numpy(), rest.numpy()


def _smoothed(log_weights: Vector) -> Vector:
    result = np.full(log_weights.shape[1], np.nan)
    spread = log_weights.std(0)
    for row in np.argsort(-spread, kind="stable")[:MOST_ROWS]:
        ratio = log_weights[:, row]
        raw = np.exp(ratio - ratio.max())
        is_equal = raw.sum() ** 2 > NEARLY_EQUAL * len(raw) * np.square(raw).sum()
        result[row] = 0.0 if is_equal else psis(ratio)[1]
    return result


def owners_of(fit: VEMResult, plate: Plate, inside: list[NoiseSpec]) -> dict[str, Tensor] | None:
    """For each density of a run, the row of the plate that it depends on, -1 for none.

    Bit k of a density's row is read off two runs: one that moves all rows with that bit set, one
    that moves the others. None if some density depends on several rows.
    """
    bits = max(1, (plate.size - 1).bit_length())
    patterns: list[NDArray[np.bool_]] = [np.zeros(plate.size, dtype=bool)]
    for k in range(bits):
        is_set = (np.arange(plate.size) >> k & 1).astype(bool)
        patterns += [is_set, ~is_set]
    moved = torch.as_tensor(TEST * np.stack(patterns))
    noise = {
        spec.name: torch.zeros(len(moved), *spec.shape, dtype=torch.float64)
        for spec in fit.setup.objective.specs
    }
    for spec in inside:
        axis = len(spec.batch) + plate.dim
        shape = [len(moved)] + [1] * len(spec.shape)
        shape[1 + axis] = plate.size
        noise[spec.name] = noise[spec.name] + moved.reshape(shape)
    found = at_noise(fit, noise, "model_rows", "guide_rows")
    owners = {}
    for group, members in found.items():
        for name, value in members.items():
            changed = (value.reshape(len(moved), -1) != value.reshape(len(moved), -1)[:1])[1:]
            ones, zeros = changed[0::2], changed[1::2]
            if bool((ones & zeros).any()):
                return None
            row = (ones.long() * 2 ** torch.arange(bits)[:, None]).sum(0)
            is_owned = (ones | zeros).any(0)
            if not bool((ones | zeros)[:, is_owned].all()):
                return None
            owners[f"{group}/{name}"] = torch.where(is_owned, row, -1)
    return owners
