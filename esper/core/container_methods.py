"""What Python looks up on classes and not on instances: the container methods of a host such as `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["with_container_methods"]

_NAMES = ("__getitem__", "__setitem__", "__delitem__", "__len__", "__iter__", "__contains__", "__reversed__")

_Class = TypeVar("_Class", bound=type)
_classes: WeakKeyDictionary[type, dict[tuple[str, ...], Any]] = WeakKeyDictionary()


def with_container_methods(base: _Class, host: type) -> _Class:
    """`base`, or a subclass of it with those container methods that `host` has and that work on `self._root`."""
    names = tuple(name for name in _NAMES if getattr(host, name, None) is not None)
    if not names:
        return base
    known = _classes.setdefault(base, {})
    if names not in known:
        methods = {name: _forwarding(name) for name in names}
        about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        known[names] = type(base)(base.__name__, (base,), {**about, **methods})
    subclass: _Class = known[names]
    return subclass


def _forwarding(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self._root, name)(*args)

    method.__name__ = name
    return method
