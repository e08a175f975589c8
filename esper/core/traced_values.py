"""What stands for a value while a region is traced.

A traced value records what is done with it, like `torch.fx.Proxy`. Where recording would lose something (the value is
compared, iterated over, printed, hashed, asked for its type, ...) it refuses, so that no decision that depends on data
ends up in a graph.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from torch import fx

if TYPE_CHECKING:
    from esper.core.tracer import RegionTracer

__all__ = ["Refusal", "TracedFlag", "TracedValue", "unpack", "values_in"]

_PLAIN_ACCESS = ("LOAD_ATTR", "LOAD_METHOD")


class Refusal(Exception):  # no error: how a trace ends that is not to be used
    """This code cannot be traced; the message is the reason, worded to follow "not traced: "."""


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """`value` as a tuple of exactly `count` items, or the `ValueError` of an assignment to `count` names."""
    items = tuple(value)
    if len(items) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(items)})")
    if len(items) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    return items


class TracedValue(fx.Proxy):
    """A value of the traced forward: a placeholder, or the result of a recorded call."""

    tracer: RegionTracer

    def __init__(self, node: fx.Node, tracer: RegionTracer) -> None:
        object.__setattr__(self, "tracer", tracer)
        object.__setattr__(self, "node", node)

    def _refuse(self, what: str) -> NoReturn:
        self.tracer.refuse(what)

    @property
    def __class__(self) -> type:
        """What `isinstance` is told: a tensor, where that is certain or can be checked when the code runs."""
        return self.tracer.class_of(self.node)

    @__class__.setter
    def __class__(self, value: type) -> None:
        self._refuse("it changes the class of a value")

    def __getattr__(self, name: str) -> Any:
        instruction = _instruction(sys._getframe(1))
        if instruction not in _PLAIN_ACCESS:  # hasattr() and getattr(): True for every name, if one does not look
            self._refuse(f"it asks whether a value has the attribute {name!r}")
        if instruction == "LOAD_METHOD":
            return _TracedMethod(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(f"it sets the attribute {name!r} of a value")

    def __delattr__(self, name: str) -> None:
        self._refuse(f"it deletes the attribute {name!r} of a value")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        code, position = frame.f_code.co_code, frame.f_lasti
        if _instruction(frame) != "UNPACK_SEQUENCE" or dis.opname[code[position - 2]] == "EXTENDED_ARG":
            self._refuse("it iterates over a value")
        count = code[position + 1]
        items = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([items[position] for position in range(count)])

    def __bool__(self) -> bool:
        self._refuse("its control flow depends on a value")

    def __len__(self) -> int:
        self._refuse("it takes the length of a value")

    def __int__(self) -> int:
        self._refuse("it turns a value into an int")

    def __index__(self) -> int:
        self._refuse("it turns a value into an int")

    def __float__(self) -> float:
        self._refuse("it turns a value into a float")

    def __complex__(self) -> complex:
        self._refuse("it turns a value into a complex number")

    def __str__(self) -> str:
        self._refuse("it turns a value into text")

    def __format__(self, spec: str) -> str:
        self._refuse("it turns a value into text")

    def __hash__(self) -> int:
        self._refuse("it uses a value as a key")

    def __contains__(self, item: object) -> bool:
        self._refuse("it looks for something in a value")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("it hands a value to NumPy")

    def __copy__(self) -> NoReturn:
        self._refuse("it copies a value with the copy module")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("it copies a value with the copy module")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("it pickles a value")

    def keys(self) -> Any:
        """Recorded as a call, like any other method."""
        return self.tracer.create_proxy("call_method", "keys", (self,), {})

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        values = values_in((args or (), kwargs or {}))
        return values[0].tracer.record_torch_call(orig_method, args or (), kwargs or {})


class TracedFlag(TracedValue):
    """A module's `training`: read when the code runs where it is passed on, fixed for the trace where it is tested."""

    def __init__(self, node: fx.Node, tracer: RegionTracer, path: str, current: bool) -> None:
        super().__init__(node, tracer)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "current", current)

    def __bool__(self) -> bool:
        path, current = object.__getattribute__(self, "path"), object.__getattribute__(self, "current")
        self.tracer.training_tested[path] = current
        return bool(current)

    @property  # type: ignore[misc]  # a flag's class is not set either
    def __class__(self) -> type:
        return bool


class _TracedMethod:
    """A method of a traced value, on its way to be called."""

    __slots__ = ("_name", "_value")

    def __init__(self, value: TracedValue, name: str) -> None:
        self._value = value
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value.tracer.create_proxy("call_method", self._name, (self._value, *args), kwargs)


def values_in(structure: Any) -> list[TracedValue]:
    """The traced values in nested tuples, lists and dictionaries."""
    kind = type(structure)
    if issubclass(kind, TracedValue):
        return [structure]
    if issubclass(kind, (tuple, list)):
        return [value for item in structure for value in values_in(item)]
    if issubclass(kind, dict):
        return [value for item in structure.values() for value in values_in(item)]
    if kind is slice:
        return values_in((structure.start, structure.stop, structure.step))
    return []


def _instruction(frame: Any) -> str:
    code, position = frame.f_code.co_code, frame.f_lasti
    return _method_or_attribute(dis.opname[code[position]], code[position + 1])


def _method_or_attribute(name: str, argument: int) -> str:
    if sys.version_info >= (3, 12) and name == "LOAD_ATTR":  # one instruction for both since then
        return "LOAD_METHOD" if argument & 1 else name
    return name


def _inplace(name: str) -> Callable[[TracedValue, Any], Any]:
    target = getattr(operator, name)

    def record(self: TracedValue, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(TracedValue, f"__i{_name}__", _inplace(f"i{_name}"))
