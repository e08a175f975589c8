"""A copy of a module tree that shares every tensor with the original.

Each container is a new object of the original's class. It has its own children, hooks and training flag, and shares the
dictionaries of parameters and buffers, so that a parameter that is replaced or moved on one side is so on the other.
The original stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["plant"]

_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def plant(
    model: nn.Module, targets: Mapping[str, nn.Linear], replace: Callable[[str, nn.Linear], nn.Module]
) -> nn.Module:
    """The shadow of `model`, in which `replace(name, linear)` stands for each of `targets`.

    A module that occurs under several names has one shadow. Plain attributes that refer to modules of the tree, directly
    or in lists, tuples and dicts, refer to their shadows.
    """
    names = {id(linear): name for name, linear in targets.items()}
    shadows: dict[int, nn.Module] = {}
    for module in model.modules():
        if id(module) in names:
            shadows[id(module)] = replace(names[id(module)], module)  # type: ignore[arg-type]  # targets are linear
        else:
            shadows[id(module)] = module.__class__.__new__(module.__class__)
    for module in model.modules():
        if id(module) not in names:
            shadows[id(module)].__dict__.update(_contents(module, shadows))
    return shadows[id(model)]


def _contents(module: nn.Module, shadows: Mapping[int, nn.Module]) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in _SHARED:
            contents[name] = value
        elif name == "_modules":
            contents[name] = {key: None if child is None else shadows[id(child)] for key, child in value.items()}
        elif "hooks" in name and isinstance(value, dict):
            contents[name] = copy.copy(value)
        else:
            contents[name] = _redirected(value, shadows)
    return contents


def _redirected(value: Any, shadows: Mapping[int, nn.Module]) -> Any:
    """`value` with the modules in it replaced by their shadows; itself, if there are none."""
    if isinstance(value, nn.Module):
        return shadows.get(id(value), value)
    if type(value) in (list, tuple):
        items = [_redirected(item, shadows) for item in value]
        return type(value)(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if type(value) is dict:
        entries = {key: _redirected(item, shadows) for key, item in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value
