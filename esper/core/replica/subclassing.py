"""Subclasses of a module's class, made while the program runs, that pass for the class itself."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

__all__ = ["own_slots", "subclass_in_disguise", "undisguised"]


class _Quiet:
    """Keeps `__init_subclass__` of the classes that follow from hearing of a subclass that nobody wrote.

    It has no `__slots__`: an object of a class can become one of a subclass only if neither of its bases has.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as an object of the class that it passes for."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str):
            return made
        kind, passes_for = type(self), undisguised(type(self))
        create = _new_object if made[0] is copyreg.__newobj__ else made[0]  # type: ignore[attr-defined]  # not in typeshed
        return create, tuple(passes_for if each is kind else each for each in made[1]), *made[2:]


def _new_object(kind: type, *args: Any) -> Any:
    """As `copyreg.__newobj__`, which pickle takes for objects of exactly the class of the original only."""
    return kind.__new__(kind, *args)


def subclass_in_disguise(kind: type, namespace: Mapping[str, Any], *before: type) -> type:
    """A subclass of `kind` under its name, with the classes `before` ahead of it and the attributes of `namespace`."""
    attributes = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **namespace}
    metaclass: Any = type(kind)
    quiet = () if issubclass(kind, _Quiet) else (_Quiet,)
    subclass: type = metaclass(kind.__name__, (*before, *quiet, kind), attributes)
    return subclass


def undisguised(kind: type) -> type:
    """The class that somebody wrote: what `kind` passes for, if it is a subclass in disguise."""
    ancestry = kind.__mro__
    return ancestry[ancestry.index(_Quiet) + 1] if _Quiet in ancestry else kind


def own_slots(kind: type) -> list[str]:
    """The slots of `kind` and its bases, in which instances keep what is not in their `__dict__`."""
    named = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in named for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]
