"""Noticing, and undoing, what a forward did besides computing while it was traced."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["EffectWatch"]

_CONTAINERS = (list, dict, set, deque, bytearray)
_LARGEST = 10_000
_DEEPEST = 3

_Restore = Callable[[], None]


class EffectWatch:
    """Remembers random number generators, and the containers that `modules` and the functions entered refer to."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._contents: dict[int, tuple[Any, list[Any]]] = {}
        self._generators: dict[int, tuple[Any, bytes, _Restore]] = {}
        self._spaces: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        self._remember_generator(random)
        self._remember_generator(torch.default_generator)
        self._remember_generator(np.random)
        for module in modules:
            for name, value in module.__dict__.items():
                if not name.endswith("_hooks") and name != "_modules":
                    self._remember(value, _DEEPEST)

    @property
    def variables(self) -> list[tuple[dict[str, Any], str]]:
        """The global variables that the functions entered read: pairs of a namespace and a name."""
        return list(self._spaces.values())

    def entered(self, frame: FrameType) -> None:
        """A function of the model begins."""
        for name in frame.f_code.co_names:
            if name in frame.f_globals:
                self._spaces[id(frame.f_globals), name] = (frame.f_globals, name)
                self._remember(frame.f_globals[name], 2)
        for name in frame.f_code.co_freevars:
            self._remember(frame.f_locals.get(name), 2)

    def undo(self) -> str | None:
        """Put back what has changed; returns what that was, or None."""
        found = None
        for owner, before, restore in self._generators.values():
            if _state(owner)[0] != before:
                restore()
                found = "it draws random numbers outside of its tensor operations"
        for container, items in self._contents.values():
            now = _items(container)
            if len(now) != len(items) or any(a is not b for a, b in zip(now, items, strict=True)):
                _refill(container, items)
                found = f"it changes a {type(container).__name__} that outlives the call"
        return found

    def _remember(self, value: Any, depth: int) -> None:
        if isinstance(value, _CONTAINERS):
            if id(value) not in self._contents and len(value) <= _LARGEST:
                self._contents[id(value)] = (value, _items(value))
                for item in self._contents[id(value)][1] if depth else ():
                    self._remember(item, depth - 1)
        else:
            self._remember_generator(value)

    def _remember_generator(self, value: Any) -> None:
        if id(value) not in self._generators and _is_generator(value):
            self._generators[id(value)] = (value, *_state(value))


def _items(container: Any) -> list[Any]:
    """The content, keys and values in turn for a dictionary."""
    if isinstance(container, dict):
        return [each for item in dict.items(container) for each in item]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


def _refill(container: Any, items: list[Any]) -> None:
    if isinstance(container, dict):
        dict.clear(container)
        dict.update(container, zip(items[::2], items[1::2], strict=True))
        return
    container.clear()
    if isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _is_generator(value: Any) -> bool:
    """Whether `value` is a source of random numbers, or one of the modules that have one."""
    kinds = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
    return value is random or value is np.random or isinstance(value, kinds)


def _state(generator: Any) -> tuple[bytes, _Restore]:
    """The state, to be compared, and how to go back to it."""
    if generator is random or isinstance(generator, random.Random):
        state = generator.getstate()
        return repr(state).encode(), lambda: generator.setstate(state)
    if isinstance(generator, torch.Generator):
        tensor = generator.get_state()

        def restore() -> None:
            generator.set_state(tensor)

        return tensor.numpy().tobytes(), restore
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        modern = bits.state
        return _plain(modern), lambda: setattr(bits, "state", modern)
    legacy = generator.get_state(legacy=False)
    return _plain(legacy), lambda: generator.set_state(legacy)


def _plain(state: Any) -> bytes:
    """A comparable form of a state of NumPy: nested dictionaries with numbers and arrays."""
    if isinstance(state, dict):
        return b"".join(_plain(item) for item in state.values())
    data: bytes = state.tobytes() if hasattr(state, "tobytes") else repr(state).encode()
    return data
