"""The size of a message, found out without writing it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

__all__ = ["size_at_least"]


def size_at_least(value: object, enough: int) -> int:
    """Bytes that `value` takes as JSON at the least; beyond `enough` it is not looked any further.

    Counts the characters of texts, and one byte and a comma for any other value. A large text costs nothing, and many
    small values at most `enough` steps.
    """
    size, waiting = 0, [value]
    while waiting and size <= enough:
        each = waiting.pop()
        if isinstance(each, str | bytes | bytearray):
            size += len(each) + 2
            continue
        size += 1
        if isinstance(each, BaseModel):
            size += len(type(each).model_fields)
            waiting += each.__dict__.values()
            waiting += (each.model_extra or {}).values()
        elif isinstance(each, Mapping):
            size += len(each)
            if size + len(each) <= enough:
                waiting += each.keys()
                waiting += each.values()
            else:
                size += len(each)
        elif isinstance(each, list | tuple | set | frozenset):
            size += len(each)
            if size <= enough:
                waiting += each
    return size
