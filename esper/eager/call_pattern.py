"""The pattern of a module's call: which arguments are tensors, and the values of the others, constants of a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import nn

__all__ = ["CallPattern", "forwarded", "parameter_list", "pattern_of", "pattern_of_a_plain_call"]

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_BY_IDENTITY = (type(None), bool, torch.dtype, torch.layout, torch.memory_format)
_BY_VALUE = (int, float, str, torch.device)
_BEFORE_KEYWORDS = frozenset((Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY))


@dataclass(frozen=True)
class _Constant:
    """An argument that is no tensor. Values of different types are different: 1 is not True."""

    kind: type
    value: Any


@dataclass(frozen=True)
class CallPattern:
    """The arguments that are tensors, and all others but `*args` and `**kwargs`, which are empty."""

    tensors: tuple[str, ...]
    constants: tuple[tuple[str, _Constant], ...]

    def arguments(self, signature: Signature, tensor: Callable[[str], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of such a call, with `tensor(name)` for the tensors."""
        values = {name: constant.value for name, constant in self.constants}
        values.update({name: tensor(name) for name in self.tensors})
        positional, keywords = [], {}
        for name, value in ((name, values[name]) for name in signature.parameters if name in values):
            if signature.parameters[name].kind is Parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        return positional, keywords

    def tests(self, signature: Signature, bind: Callable[[Any, str], str]) -> list[str]:
        """Expressions of which one is true for a call of another pattern; `bind` makes a value a global."""
        variadic = [name for name, each in signature.parameters.items() if each.kind in _VARIADIC]
        tensors = [
            f"not {bind(isinstance, 'isinstance')}({name}, {bind(torch.Tensor, 'Tensor')})" for name in self.tensors
        ]
        return [*variadic, *tensors, *(_differs(name, constant.value, bind) for name, constant in self.constants)]


def _differs(name: str, value: Any, bind: Callable[[Any, str], str]) -> str:
    if value is None or isinstance(value, bool):
        return f"{name} is not {value!r}"
    differs = f"{name} is not {bind(value, name)}"
    if type(value) not in _BY_VALUE:
        return differs
    kind = bind(type(value), type(value).__name__)
    return f"{differs} and ({bind(type, 'type')}({name}) is not {kind} or {name} != {bind(value, name)})"


def pattern_of(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallPattern | None:
    """The pattern of a call; None if the call has none, such as one that passes a list."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    tensors: list[str] = []
    constants: list[tuple[str, _Constant]] = []
    for name, value in bound.arguments.items():
        parameter, kind = signature.parameters[name], type(value)
        if parameter.kind in _VARIADIC:
            if value:
                return None
        elif kind is torch.Tensor or kind is nn.Parameter:
            tensors.append(name)
        elif _is_constant(value) or (value is parameter.default and kind.__hash__ is not None):
            constants.append((name, _Constant(kind, value)))
        else:
            return None
    return CallPattern(tuple(tensors), tuple(constants))


def _is_constant(value: Any) -> bool:
    kind = type(value)
    return kind in _BY_IDENTITY or (kind in _BY_VALUE and not (kind is float and math.isnan(value)))


def pattern_of_a_plain_call(signature: Signature) -> CallPattern | None:
    """That of a call with a tensor for each argument that has to be given, or for the first if none has to."""
    names = [name for name, each in signature.parameters.items() if each.kind not in _VARIADIC]
    given = [name for name in names if signature.parameters[name].default is Parameter.empty] or names[:1]
    placeholder = torch.empty(0, device="meta")
    kwargs = {name: placeholder for name in given if signature.parameters[name].kind is not Parameter.POSITIONAL_ONLY}
    return pattern_of(signature, tuple(placeholder for name in given if name not in kwargs), kwargs)


def parameter_list(signature: Signature, bind: Callable[[Any, str], str]) -> str:
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


def forwarded(signature: Signature) -> str:
    """The arguments of a call that passes everything on, as text."""
    marks: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*{0}", Parameter.VAR_KEYWORD: "**{0}"}
    marks[Parameter.KEYWORD_ONLY] = "{0}={0}"
    return ", ".join(marks.get(each.kind, "{0}").format(each.name) for each in signature.parameters.values())
