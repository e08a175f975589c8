"""Running a shadow tree with generated code in place of some of its modules.

A view of a module is the module, except for its children, its `forward`, or both: it shares the module's attributes,
parameters and training flag (the very same `__dict__`), and what one sees, the other sees. The user's tree, and what
Dynamo traces, stay as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from esper import torch_internals
from esper.core.subclassing import own_slots, subclass_in_disguise
from esper.core.watched import HOOK_KINDS

__all__ = ["tree_view", "unhooked_view", "view_with_forward"]

_CHILDREN = "_children_seen"
_SLOTS = (_CHILDREN, *HOOK_KINDS)


def _modules_of(view: Any) -> dict[str, Any]:
    # Dynamo takes a view for the module, by its `__class__`, and looks at its own children. So must the guards.
    own: dict[str, Any] = view.__dict__["_modules"] if torch_internals.dynamo_at_work() else view._children_seen
    return own


class _View:
    """Mixed in before a module's class. The slots take precedence over entries of the shared `__dict__`."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        children: dict[str, Any] = self._children_seen
        if name in children:
            return children[name]
        return super().__getattr__(name)  # type: ignore[misc]  # a mix-in


class _Rebound:
    """A hook that is told of the module itself rather than of a view."""

    __slots__ = ("_hook", "_module")

    def __init__(self, hook: Callable[..., Any], module: nn.Module) -> None:
        self._hook = hook
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(self._module, *args[1:], **kwargs)


_classes: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def _class_for(kind: type, slots: tuple[str, ...]) -> type:
    known = _classes.get((kind, slots))
    if known is None:
        namespace = {"__slots__": slots, "__class__": property(lambda _: kind), "_modules": property(_modules_of)}
        known = _classes[kind, slots] = subclass_in_disguise(kind, namespace, _View)
    return known


def tree_view(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """`module` with `children` instead of its own."""
    return _view(module, _SLOTS, dict(children))


def view_with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """`module` with `forward` instead of its own. Its hooks run around it."""
    view = _view(module, (*_SLOTS, "forward"), dict(module._modules))
    object.__setattr__(view, "forward", forward)
    return view


def unhooked_view(module: nn.Module) -> nn.Module:
    """`module` without its hooks."""
    view = _view(module, _SLOTS, dict(module._modules))
    for name in HOOK_KINDS:
        object.__setattr__(view, name, OrderedDict())
    return view


def _view(module: nn.Module, slots: tuple[str, ...], children: dict[str, Any]) -> nn.Module:
    kind = type(module)
    view: nn.Module = object.__new__(_class_for(kind, slots))
    object.__setattr__(view, "__dict__", module.__dict__)
    object.__setattr__(view, _CHILDREN, children)
    for name in HOOK_KINDS:
        hooks = getattr(module, name)
        object.__setattr__(view, name, OrderedDict((key, _Rebound(hook, module)) for key, hook in hooks.items()))
    for name in own_slots(kind):
        if hasattr(module, name):
            object.__setattr__(view, name, getattr(module, name))
    return view
