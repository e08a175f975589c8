"""Watched dictionaries: those of a module, which tell when they change.

A replica's children and hooks live in these, so that code generated for the model is dropped in the moment in which a
child is replaced or a hook is registered. Dynamo traces through them as through the plain ones.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["HOOK_KINDS", "ChangeSignal", "WatchedDict", "WatchedHooks", "signal_of"]

HOOK_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The dictionaries of a module whose hooks run when the module is called."""


class ChangeSignal:
    """Calls its listeners, on the thread that made the change. A listener goes when the object it belongs to does."""

    def __init__(self) -> None:
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call the bound method `listener` at every change."""
        self._listeners = [known for known in self._listeners if known() is not None]
        self._listeners.append(weakref.WeakMethod(listener))

    def __call__(self) -> None:
        for reference in self._listeners:
            listener = reference()
            if listener is not None:
                listener()


class _Watching:
    """The mutating methods of a dictionary, each followed by the signal."""

    __slots__ = ()
    signal: ChangeSignal | None

    def _tell(self) -> None:
        if self.signal is not None:
            self.signal()

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)  # type: ignore[misc]  # a mix-in for dict and OrderedDict
        self._tell()

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)  # type: ignore[misc]  # as above
        self._tell()

    def pop(self, *args: Any, **kwargs: Any) -> Any:
        value = super().pop(*args, **kwargs)  # type: ignore[misc]  # as above
        self._tell()
        return value

    def popitem(self, *args: Any, **kwargs: Any) -> Any:
        item = super().popitem(*args, **kwargs)  # type: ignore[misc]  # as above
        self._tell()
        return item

    def clear(self) -> None:
        super().clear()  # type: ignore[misc]  # as above
        self._tell()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)  # type: ignore[misc]  # as above
        self._tell()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        value = super().setdefault(key, default)  # type: ignore[misc]  # as above
        self._tell()
        return value


class WatchedDict(_Watching, dict[str, Any]):
    """A `_modules` dictionary that calls `signal` when it changes. Copies, however made, are plain."""

    __slots__ = ("signal",)

    def __init__(self, items: Mapping[str, Any] | None = None, signal: ChangeSignal | None = None) -> None:
        self.signal = None
        super().__init__(items or {})
        self.signal = signal

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class WatchedHooks(_Watching, OrderedDict[int, Any]):
    """A dictionary of hooks that calls `signal` when it changes. Copies, however made, are plain."""

    __slots__ = ("signal",)

    def __init__(self, items: Mapping[int, Any] | None = None, signal: ChangeSignal | None = None) -> None:
        self.signal = None
        super().__init__(items or {})
        self.signal = signal

    def move_to_end(self, key: int, last: bool = True) -> None:
        super().move_to_end(key, last)
        self._tell()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (list(self.items()),)


def signal_of(module: nn.Module) -> ChangeSignal | None:
    """The signal of the tree that replica `module` belongs to; None if it is no replica."""
    children = module._modules
    return children.signal if isinstance(children, WatchedDict) else None
