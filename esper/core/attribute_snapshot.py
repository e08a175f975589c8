"""What a trace took for constant, and whether it still is.

Attributes of modules that are numbers, strings, flags, functions and the like end up in a graph as they were. A
snapshot keeps them, and says later which have changed.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["AttributeSnapshot"]

_SIMPLE = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
_IGNORED = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_is_torch_compile",  # a note of torch.compile's, on modules that it was given; they stay what they were
    }
)
_LONGEST = 1000
_DEEPEST = 3


class _Same:
    """Equal to another of the same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]  # compared, never a key


class AttributeSnapshot:
    """The attributes of `modules`, by path, and some global variables, as they are now.

    `variables` are pairs of a namespace and a name in it.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], variables: Iterable[tuple[Mapping[str, Any], str]] = ()
    ) -> None:
        self._modules = {path: (module, _attributes(module)) for path, module in modules.items()}
        self._variables = [(space, name, _frozen(space.get(name), 1)) for space, name in variables]

    def changed(self) -> list[str]:
        """Dotted names of what has changed since."""
        names = []
        for path, (module, before) in self._modules.items():
            now = _attributes(module)
            if now != before:
                different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
                names += [f"{path}.{key}" if path else key for key in different]
        names += [name for space, name, before in self._variables if _frozen(space.get(name), 1) != before]
        return names


def _attributes(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _frozen(value, _DEEPEST)
        for name, value in module.__dict__.items()
        if name not in _IGNORED and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    }
    for kind in ("_parameters", "_buffers"):
        found |= {name: tensor is None for name, tensor in module.__dict__[kind].items()}
    found["forward"] = _Same(type(module).forward) if "forward" not in module.__dict__ else _Same(module.forward)
    return found


def _frozen(value: Any, depth: int) -> Any:
    """Something that equals itself for as long as `value` means the same to a trace."""
    if isinstance(value, float):
        return float, repr(value)  # nan equals itself here, and -0.0 is not 0.0
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return torch.Tensor  # read when the code runs
    if depth and isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
        return type(value), [_frozen(item, depth - 1) for item in value]
    if depth and isinstance(value, dict) and len(value) <= _LONGEST:
        return type(value), [(_frozen(key, 1), _frozen(item, depth - 1)) for key, item in value.items()]
    if depth and _is_record(value):
        simple = {key: _frozen(item, 0) for key, item in vars(value).items() if isinstance(item, _SIMPLE)}
        return _Same(value), simple
    return _Same(value)


def _is_record(value: Any) -> bool:
    """Whether `value` is an object such as a configuration, whose attributes a forward may read."""
    kinds = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, kinds)
