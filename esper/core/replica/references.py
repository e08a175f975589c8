"""References between modules, followed when a module tree is copied."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["References"]


class References:
    """Redirects references to modules, given by identity in `copies`, to their copies.

    References are found in plain attributes: modules, bound methods, partials, weak references, and lists, tuples and
    dictionaries of these. What refers to no such module is left as it is, the same object. A container that two places
    share is copied once.
    """

    def __init__(self, copies: Mapping[int, nn.Module]) -> None:
        self._copies = copies
        self._containers: dict[int, Any] = {}
        self._keep: list[object] = []  # what the ids in `_containers` belong to

    def redirected(self, value: Any) -> Any:
        """`value` with every reference in it redirected; `value` itself if there is none."""
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        if isinstance(value, (list, tuple, dict)):
            return self._container(value)
        if isinstance(value, types.MethodType):
            owner = self.redirected(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            new = tuple(self.redirected(part) for part in parts)
            same = all(a is b for a, b in zip(parts, new, strict=True))
            return value if same else functools.partial(new[0], *new[1], **new[2])
        if type(value) is weakref.ref and isinstance(value(), nn.Module):
            return weakref.ref(self.redirected(value()))
        return value

    def redirected_hook(self, hook: Any) -> Any:
        """A hook as it stands in a module's dictionary, for the copy of that module."""
        owner = getattr(hook, "module", None)  # the wrapper that torch puts around load_state_dict pre-hooks
        if getattr(hook, "with_module", False) and callable(owner):
            copy = self._copies.get(id(owner()))
            return hook if copy is None else type(hook)(self.redirected(hook.hook), copy)
        return self.redirected(hook)

    def _container(self, value: Any) -> Any:
        if id(value) in self._containers:
            return self._containers[id(value)]
        self._keep.append(value)
        self._containers[id(value)] = value  # while it is looked into: a container may hold itself
        items = list(value.values() if isinstance(value, dict) else value)
        new = [self.redirected(item) for item in items]
        if any(a is not b for a, b in zip(items, new, strict=True)):
            if isinstance(value, dict):
                copy = value.copy()
                copy.update(zip(value.keys(), new, strict=True))
            else:
                copy = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
            self._containers[id(value)] = copy
        return self._containers[id(value)]
