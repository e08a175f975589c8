"""The modules that a forward meets while it is traced.

Each module of a region has a stand-in: an instance of a subclass of the module's class, with the module's attributes.
Calling it is recorded or traced through; its parameters, buffers and plain tensors are traced values; setting anything
on it is refused. Nothing is patched for this: other threads, and the modules themselves, do not notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from esper.core.module_references import References
from esper.core.shadow import opaque_reason
from esper.core.subclassing import own_slots, subclass_in_disguise

if TYPE_CHECKING:
    from esper.core.tracer import RegionTracer

__all__ = ["StandIns", "is_stand_in"]

_TRACER = "_esper_tracer"
_PATH = "_esper_path"
_TENSORS = "_esper_tensors"


class _StandIn:
    """Mixed in before a module's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        return own[_TRACER].call(own[_PATH], super().__call__, args, kwargs)  # type: ignore[misc]  # a mix-in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        return own[_TRACER].forward(own[_PATH], super().forward, args, kwargs)  # type: ignore[misc]  # a mix-in

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name == "training" or own["_parameters"].get(name) is not None or own["_buffers"].get(name) is not None:
            return own[_TRACER].read(own[_PATH], name)
        if name in own[_TENSORS]:
            return own[_TRACER].read(own[_PATH], name)
        return super().__getattr__(name)  # type: ignore[misc]  # a mix-in

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[_TRACER].refuse(f"it sets the attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        self.__dict__[_TRACER].refuse(f"it deletes the attribute {name!r}")


class _OpaqueStandIn(nn.Module):
    """For a module whose class cannot be subclassed: it can be called, and nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        return own[_TRACER].call(own[_PATH], None, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        self.__dict__[_TRACER].refuse(f"it reads the attribute {name!r} of a {self.__dict__['_esper_kind']}")


_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


def _class_for(kind: type) -> type:
    known = _classes.get(kind)
    if known is None:
        disguise = property(lambda _: kind)  # for self.__class__(...), as ModuleList does to slice itself
        known = _classes[kind] = subclass_in_disguise(kind, {"__class__": disguise}, _StandIn)
    return known


def is_stand_in(value: object) -> bool:
    """Whether `value` is a stand-in."""
    return issubclass(type(value), (_StandIn, _OpaqueStandIn))


class StandIns:
    """Stand-ins for a module and those below it. `modules` has one path for each; the module itself is ""."""

    def __init__(self, modules: Mapping[str, nn.Module], tracer: RegionTracer) -> None:
        copies: dict[int, nn.Module] = {id(module): _blank(module) for module in modules.values()}
        references = References(copies)
        for path, module in modules.items():
            _fill(copies[id(module)], path, module, tracer, references)
        self.root = copies[id(modules[""])]
        self._before = {path: dict(copies[id(module)].__dict__) for path, module in modules.items()}
        self._copies = {path: copies[id(module)] for path, module in modules.items()}

    def altered(self) -> str | None:
        """The name of an attribute that the forward has set behind the stand-ins' back, or None."""
        for path, before in self._before.items():
            now = self._copies[path].__dict__
            for name in now.keys() | before.keys():
                if name not in now or name not in before or now[name] is not before[name]:
                    return f"{path}.{name}" if path else name
        return None


def _fill(stand_in: nn.Module, path: str, module: nn.Module, tracer: RegionTracer, references: References) -> None:
    own = stand_in.__dict__
    own.update({_TRACER: tracer, _PATH: path})
    if "_esper_kind" in own:
        return
    own[_TENSORS] = {name for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)}
    for name, value in module.__dict__.items():
        if name == "_modules":
            own[name] = MappingProxyType({key: references.redirected(child) for key, child in value.items()})
        elif name in ("_parameters", "_buffers"):
            own[name] = MappingProxyType(value)  # a forward that registers something must not reach the module
        elif name.endswith("_hooks"):
            own[name] = MappingProxyType({})  # a module with hooks is called, not traced through
        elif name != "training" and name not in own[_TENSORS]:
            own[name] = references.redirected(value)


def _blank(module: nn.Module) -> nn.Module:
    if opaque_reason(module) is None:
        kind = type(module)
        stand_in: nn.Module = object.__new__(_class_for(kind))
        for name in own_slots(kind):
            if hasattr(module, name):
                object.__setattr__(stand_in, name, getattr(module, name))
        return stand_in
    opaque: nn.Module = object.__new__(_OpaqueStandIn)
    opaque.__dict__["_esper_kind"] = type(module).__name__
    return opaque
