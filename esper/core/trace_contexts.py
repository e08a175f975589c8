"""What surrounds a forward while it is traced, so that torch functions and functions of `math` record traced values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from esper.core.traced_values import TracedValue, values_in
from esper.core.tracer import RegionTracer

__all__ = ["Factories", "math_on_values"]


class Factories(TorchFunctionMode):
    """Shows the tracer the torch functions that no traced value would show it."""

    def __init__(self, tracer: RegionTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if values_in((args, kwargs)):
            return self._tracer.record_torch_call(func, args, kwargs)
        return self._tracer.record_other_call(func, args, kwargs)


@contextmanager
def math_on_values() -> Iterator[None]:
    """Let the functions of `math` record traced values: `math.sqrt(x.size(-1))` is common, and no method of `x`.

    They behave as ever on anything else, so other threads do not notice. The caller holds the tracing lock.
    """
    originals = {name: function for name, function in vars(math).items() if callable(function)}
    for name, function in originals.items():
        setattr(math, name, _recording(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(math, name, function)


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_values(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if issubclass(type(argument), TracedValue):
                return argument.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return on_values
