"""The errors and warnings that users meet. Each message names the site and what to type instead."""

import difflib
import itertools
import sys
import warnings
from collections.abc import Iterable

OURS = ("pyro_vem", "pyro", "torch", "contextlib")  # packages whose lines tell a user nothing


class VEMError(Exception):
    """Base class of every error that pyro_vem raises on purpose.

    Example:
        >>> issubclass(UnsupportedModelError, VEMError)
        True
    """


class ModelError(VEMError):
    """The model or guide, with this data, cannot be fitted as written.

    Example:
        >>> raise ModelError("site 'y': plate 'obs' has size 3, the data have 4 rows")
        Traceback (most recent call last):
        ...
        pyro_vem.errors.ModelError: site 'y': plate 'obs' has size 3, the data have 4 rows
    """


class UnsupportedModelError(VEMError):
    """The model is legitimate, but pyro_vem cannot fit it yet.

    Example:
        >>> raise UnsupportedModelError("site 'z' is discrete")
        Traceback (most recent call last):
        ...
        pyro_vem.errors.UnsupportedModelError: site 'z' is discrete
    """


class NonMonotoneError(VEMError):
    """The bound fell in a step that must raise it: an internal invariant is broken.

    Example:
        >>> raise NonMonotoneError("M-step of iteration 3: the bound fell by 0.1")
        Traceback (most recent call last):
        ...
        pyro_vem.errors.NonMonotoneError: M-step of iteration 3: the bound fell by 0.1
    """


def check_names(
    what: str, given: Iterable[str], known: Iterable[str], kind: type[Exception] = ModelError
) -> None:
    """Raise an error about the names in `given` that are not in `known`, with close matches.

    Example:
        >>> check_names("fixed=", ["tau"], ["mu", "tau"])
        >>> check_names("fixed=", ["tua"], ["tau"])
        Traceback (most recent call last):
        ...
        pyro_vem.errors.ModelError: fixed=: unknown name 'tua' (did you mean 'tau'?). Known names: 'tau'.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        parts.append(f"unknown name {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    listing = ", ".join(repr(name) for name in known) or "none"
    raise kind(f"{what}: {', '.join(parts)}. Known names: {listing}.")


def warn(message: str) -> None:
    """A `UserWarning` at the user's own line, however deep it arises."""
    for level in itertools.count(1):
        try:
            name = sys._getframe(level).f_globals.get("__name__", "")
        except ValueError:  # no line of the user's
            break
        if name.partition(".")[0] not in OURS:
            break
    warnings.warn(message, stacklevel=level + 1)
