"""Calls of methods that do not keep their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["weakly"]


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a bound method, which returns None once the method's object is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*args, **kwargs)

    return call
