"""When the exact KL of a site may stand for E_q[log q - log p], and on what proof.

The replacement is exact if no model parent of the site is a guide descendant of it. Our own
guides have no arrows between latents, so the condition holds by construction; for any other
guide it has to be proved, and until it is, the site is sampled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..guides.factorised import FactorisedNormal
from ..model.runtime import Site
from ..model.sites import plates_of
from .kl import canonical, lookup


@dataclass(frozen=True)
class Certificate:
    """Whether a site's KL is exact here; `text` is the proof, or the reason why it is not.

    Example:
        >>> bool(Certificate(False, "no closed form for Normal against Cauchy"))
        False
    """

    holds: bool
    text: str

    def __bool__(self) -> bool:
        return self.holds


def certify(guide: Callable[..., Any], q: Site, p: Site) -> Certificate:
    """Decide on one latent site, from its guide and model records."""
    if not isinstance(guide, FactorisedNormal):
        return Certificate(False, "independence not proved for a foreign guide")
    if lookup(q["fn"], p["fn"]) is None:
        pair = f"{_name(q['fn'])} against {_name(p['fn'])}"
        return Certificate(False, f"no closed form for {pair}")
    if plates_of(q) != plates_of(p):
        return Certificate(False, "guide and model put the site in different plates")
    return Certificate(True, "independent factors by construction")


def _name(distribution: Any) -> str:
    return type(canonical(distribution)).__name__
