"""A forward for the wrapped models of each class of hosts.

Dynamo keeps what it compiled with the code that it traced, compiles one code eight times at most, and remembers which
sizes it has seen vary in it. Plain models share these with others of their class; wrapped models would with all others.
"""

from __future__ import annotations

import types
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["with_own_forward"]

_Class = TypeVar("_Class", bound=type)
_classes: WeakKeyDictionary[type, dict[type, Any]] = WeakKeyDictionary()  # by the host's class and the base


def with_own_forward(base: _Class, host: type) -> _Class:
    """The subclass of `base`, under its name, for hosts of class `host`: its `forward` has code of its own."""
    known = _classes.setdefault(host, {})
    if base not in known:
        shared: types.FunctionType = base.forward  # type: ignore[attr-defined]  # a class of modules
        code = shared.__code__.replace(co_name=f"forward of {host.__module__}.{host.__qualname__}")
        own = types.FunctionType(code, shared.__globals__, "forward", shared.__defaults__, shared.__closure__)
        own.__kwdefaults__, own.__doc__, own.__qualname__ = shared.__kwdefaults__, shared.__doc__, shared.__qualname__
        about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        known[base] = type(base)(base.__name__, (base,), {**about, "forward": own})
    subclass: _Class = known[base]
    return subclass
