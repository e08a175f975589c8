"""Noticing, and undoing, what a forward did besides computing while it was traced."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn

__all__ = ["EffectWatch"]

_CONTAINERS = (list, dict, set, deque)
_LARGEST = 10_000
_DEEPEST = 3


class EffectWatch:
    """Remembers the random number generators, and the containers that `modules` and the functions entered refer to.

    `variables` are the global variables that those functions read: pairs of a namespace and a name.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._generators = _generator_states()
        self._spaces: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        for module in modules:
            for name, value in module.__dict__.items():
                if not (name.startswith("_") and name.endswith("_hooks")) and name not in ("_modules",):
                    self._remember(value, _DEEPEST)

    @property
    def variables(self) -> list[tuple[dict[str, Any], str]]:
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
        if _generator_states() != self._generators:
            _restore_generators(self._generators)
            found = "it draws random numbers outside of its tensor operations"
        for container, before in self._contents.values():
            if not _same(container, before):
                _refill(container, before)
                found = f"it changes a {type(container).__name__} that outlives the call"
        return found

    def _remember(self, value: Any, depth: int) -> None:
        if type(value) not in _CONTAINERS or id(value) in self._contents or len(value) > _LARGEST:
            return
        self._contents[id(value)] = (value, value.copy())
        if depth:
            for item in list(value.values() if isinstance(value, dict) else value):
                self._remember(item, depth - 1)


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in before}
    return all(a is b for a, b in zip(container, before, strict=True))


def _refill(container: Any, before: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(before)
    else:
        container.extend(before)


def _generator_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    states: list[Any] = [random.getstate(), bytes(torch.get_rng_state().numpy())]
    states.append(repr(_plain(numpy.random.get_state())) if numpy is not None else None)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # of torch
        states += [bytes(state.numpy()) for state in torch.cuda.get_rng_state_all()]
    return tuple(states)


def _plain(state: Any) -> Any:
    return [item.tolist() if hasattr(item, "tolist") else item for item in state]


def _restore_generators(states: tuple[Any, ...]) -> None:
    import ast

    python, cpu, numpy_state, *cuda = states
    random.setstate(python)
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(tuple(ast.literal_eval(numpy_state)))
    if cuda:
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in cuda])
