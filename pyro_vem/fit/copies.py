"""Copies of results in memory; on disk they are files of their own (`pyro_vem.fit.storage`)."""

import copy
from typing import Any, TypeVar

Result = TypeVar("Result", bound="Copied")


class Copied:
    """An object that is copied like any other, and pickled only without the user's model, which is code."""

    def __copy__(self: Result) -> Result:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self: Result, memo: dict[int, Any]) -> Result:
        memo[id(self)] = twin = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if all(getattr(self, name, None) is None for name in ("_setup", "_whole")):  # read without data
            return super().__reduce_ex__(protocol)
        raise TypeError(
            "a result holds the model, which is code and is not pickled: keep it with fit.save(path), and "
            "read it with VEMResult.load(path, model, data)"
        )
