"""Which units of a slot multiply which: every product has a hub, and one leaf or several.

In ``a * (theta - b)`` the hub is a. What hub and leaves add by themselves goes into the product,
``(a + c) * (theta - b + d)``, so that no unit of a row is in two products.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .affine import FAINT, ROUNDING, VERIFIED, Probe
from .bilinear import Part
from .columns import Factor, Product
from .units import NoProducts, Unit

FADED = 1e-10  # of a coefficient: changes by less are none
ALONE, SEVERAL = -1, -2  # instead of the number of a partner


def products_of(key: str, units: Sequence[Unit], probe: Probe) -> list[Product]:
    """All products of a slot, and what is left of each unit as a product with a constant.

    Args:
        key: the slot.
        units: those that it depends on.
        probe: with the base that their coefficients belong to.

    Raises:
        NoProducts: if units multiply each other in another way.
    """
    partners = [_partner(key, unit, units, probe) for unit in units]
    stars: dict[int, dict[int, Tensor]] = {}
    for i, (j, coefficient) in enumerate(partners):
        if j < 0:
            continue
        back = partners[j][0]
        if back not in (i, SEVERAL):
            raise NoProducts(f"products of {units[i].name} and {units[j].name} that are not of two latents")
        if back == SEVERAL or j < i:  # of two that have only each other the first is the hub
            stars.setdefault(j, {})[i] = coefficient
    for i, (j, _) in enumerate(partners):
        if j == SEVERAL and not _is_explained(key, units[i], stars.get(i, {}), units, probe):
            raise NoProducts(f"products of {units[i].name} with what multiplies others too")
    values = [unit.function(probe.base[unit.name][unit.seen[key].index]) for unit in units]
    found: list[Product] = []
    rest: dict[int, Tensor] = {}
    for hub, leaves in stars.items():
        product, left = _star(key, hub, leaves, units, values)
        found.append(product)
        rest |= left
    among = {i for hub, leaves in stars.items() for i in (hub, *leaves)}
    rest |= {i: unit.seen[key].slope for i, unit in enumerate(units) if i not in among}
    second = {part.name for product in found for part in product[1].parts}
    for i, coefficient in rest.items():
        if bool(coefficient.any()):
            own = Factor(torch.zeros_like(coefficient), [_part(key, units[i], coefficient)])
            one = Factor(torch.ones_like(coefficient))
            found.append((one, own) if units[i].name in second else (own, one))
    return found


def _partner(key: str, unit: Unit, units: Sequence[Unit], probe: Probe) -> tuple[int, Tensor]:
    """The only unit that moves a unit's coefficient, and by how much; or `ALONE`, or `SEVERAL`."""
    slope, (first, second) = unit.seen[key].slope, unit.seen[key].by
    size = slope.abs() + probe.here[key].abs()
    size = size + 0.1 * size.max()
    live = torch.maximum(first.abs(), second.abs()) > FADED * size
    if not bool(live.any()):
        return ALONE, slope
    row = int(torch.where(live, first.abs() / size, 0.0).argmax())
    ratio = float(second[row] / first[row])
    others = [i for i, other in enumerate(units) if other is not unit]
    nearest = min(others, key=lambda i: abs(units[i].ratio - ratio), default=None)
    if nearest is None:
        return SEVERAL, slope
    other = units[nearest]
    is_it = (second - other.ratio * first).abs() <= ROUNDING * size
    if not bool((is_it | ~live).all()):
        return SEVERAL, slope
    return nearest, torch.where(live, first / _moved(key, other, probe), 0.0)


def _is_explained(
    key: str, hub: Unit, leaves: Mapping[int, Tensor], units: Sequence[Unit], probe: Probe
) -> bool:
    """True if a hub's leaves are all that moves its coefficient."""
    first, size = hub.seen[key].by[0], hub.seen[key].slope.abs()
    rest = first
    for i, coefficient in leaves.items():
        rest, size = rest - coefficient * _moved(key, units[i], probe), size + first.abs()
    return bool((rest.abs() <= VERIFIED * (size + 0.1 * size.max())).all())


def _moved(key: str, unit: Unit, probe: Probe) -> Tensor:
    """How far the first move takes the function of a unit, at each row's element."""
    return unit.change(probe.base[unit.name][unit.seen[key].index], unit.moves[0])


def _star(
    key: str, hub: int, leaves: Mapping[int, Tensor], units: Sequence[Unit], values: Sequence[Tensor]
) -> tuple[Product, dict[int, Tensor]]:
    """A hub times its leaves, with what they add by themselves; and what of that is left, by leaf."""
    slope = units[hub].seen[key].slope
    own, shift = slope, torch.zeros_like(slope)
    rest: dict[int, Tensor] = {}
    for i, coefficient in leaves.items():
        own = own - coefficient * values[i]
    own = _without_dust(own, slope)
    is_shifted = torch.zeros_like(slope, dtype=torch.bool)
    for i, coefficient in leaves.items():
        alone = units[i].seen[key].slope
        alone = _without_dust(alone - coefficient * values[hub], alone)
        is_multiplied = coefficient != 0
        by = torch.where(is_multiplied, alone / torch.where(is_multiplied, coefficient, 1.0), 0.0)
        is_other = (by - shift).abs() > ROUNDING * (by.abs() + shift.abs())
        if bool((is_shifted & is_multiplied & is_other).any()):
            raise NoProducts(f"{units[hub].name} multiplies latents that are added otherwise too")
        shift, is_shifted = torch.where(is_multiplied, by, shift), is_shifted | is_multiplied
        rest[i] = torch.where(is_multiplied, 0.0, alone)
    is_seen = (slope != 0).to(slope)
    first = Factor(shift, [_part(key, units[hub], is_seen)])
    second = Factor(own, [_part(key, units[i], coefficient) for i, coefficient in leaves.items()])
    return (first, second), rest


def _without_dust(values: Tensor, of: Tensor) -> Tensor:
    """Zero where a difference of numbers is rounding."""
    size = of.abs()
    return torch.where(values.abs() <= 100 * FAINT * (size + size.max()), 0.0, values)


def _part(key: str, unit: Unit, coefficient: Tensor) -> Part:
    return Part(unit.name, unit.seen[key].index, coefficient, unit.rate)
