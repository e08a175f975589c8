"""Deduplication: the ids of the messages that were seen lately."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["RecentIds"]

_REMEMBERED = 8192


class RecentIds:
    """The last `size` different ids, from one thread or under its owner's lock."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size = size
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, each: str) -> bool:
        """Remember `each`; False if it was known."""
        if each in self._ids:
            self._ids.move_to_end(each)
            return False
        self._ids[each] = None
        if len(self._ids) > self._size:
            self._ids.popitem(last=False)
        return True
