"""The head of a generated function: its parameters, and the test whether the code below stands for the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import nn

from esper.core.watched import global_module_hooks

__all__ = ["Guards", "forwarded", "guard_tests", "is_default", "parameter_list"]

_Bind = Callable[[Any, str], str]
"""Binds a value as a global of the function, under about the given name; returns the name."""

_BEFORE_KEYWORDS = frozenset((Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY))


@dataclass(frozen=True)
class Guards:
    """What must hold for the generated code to stand for the module; where it does not, `fallback` runs.

    Arguments with a default must be at it, unless they are in `given`. `training` are modules whose flag is fixed.
    """

    fallback: Callable[..., Any]
    tensor_arguments: tuple[str, ...] = ()
    given_arguments: tuple[str, ...] = ()
    training: tuple[tuple[nn.Module, bool], ...] = ()
    given: frozenset[str] = frozenset()


def parameter_list(signature: Signature, bind: _Bind) -> str:
    """The parameters of a function with that signature, as text."""
    parts: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for position, parameter in enumerate(signature.parameters.values()):
        text = parameter.name
        if parameter.kind is Parameter.VAR_POSITIONAL:
            text = f"*{text}"
        elif parameter.kind is Parameter.VAR_KEYWORD:
            text = f"**{text}"
        elif parameter.kind is Parameter.KEYWORD_ONLY and not _BEFORE_KEYWORDS.intersection(kinds[:position]):
            parts.append("*")
        if parameter.default is not Parameter.empty:
            text += f"={bind(parameter.default, 'default')}"
        parts.append(text)
        following = kinds[position + 1] if position + 1 < len(kinds) else None
        if parameter.kind is Parameter.POSITIONAL_ONLY and following is not Parameter.POSITIONAL_ONLY:
            parts.append("/")
    return ", ".join(parts)


def guard_tests(guards: Guards, signature: Signature, bind: _Bind) -> list[str]:
    """Expressions of which one is true where the code does not stand for the module."""
    tests = [bind(hooks, "hooks") for hooks in global_module_hooks()]
    for parameter in signature.parameters.values():
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            tests.append(parameter.name)
        elif parameter.default is not Parameter.empty and parameter.name not in guards.given:
            tests.append(_not_default(parameter, bind))
        elif parameter.name in guards.tensor_arguments:
            tests.append(f"not {bind(isinstance, 'isinstance')}({parameter.name}, {bind(torch.Tensor, 'Tensor')})")
        elif parameter.name in guards.given_arguments:
            tests.append(f"{parameter.name} is None")
    for module, flag in guards.training:
        tests.append(("not " if flag else "") + f"{bind(module, 'module')}.training")
    return tests


def _not_default(parameter: Parameter, bind: _Bind) -> str:
    """The contrary of :func:`is_default`."""
    default, name = parameter.default, parameter.name
    if default is None or isinstance(default, bool):
        return f"{name} is not {default!r}"
    differs = f"{name} is not {bind(default, 'default')}"
    if type(default) not in (int, str):
        return differs
    kind = bind(type(default), type(default).__name__)
    return f"({differs} and ({bind(type, 'type')}({name}) is not {kind} or {name} != {default!r}))"


def is_default(value: object, default: object) -> bool:
    """Whether an argument counts as being at its default: the test that the generated code makes."""
    return value is default or (type(default) in (int, str) and type(value) is type(default) and value == default)


def forwarded(signature: Signature) -> str:
    """The arguments of a call that passes everything on, as text."""
    parts = []
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            parts.append(f"*{parameter.name}")
        elif parameter.kind is Parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            parts.append(f"{parameter.name}={parameter.name}")
        else:
            parts.append(parameter.name)
    return ", ".join(parts)
