"""Whoever wants to be told of something, for as long as they want it; and a signal to stop, which is told at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["StopSignal", "Watchers"]


class Watchers:
    """Functions that are called when there is news. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []

    @contextmanager
    def added(self, changed: Callable[[], None]) -> Iterator[None]:
        """Have `changed` called by :meth:`tell` until the block is left."""
        with self._lock:
            self._watchers.append(changed)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(changed)

    def tell(self) -> None:
        """Call all of them, on this thread."""
        with self._lock:
            watchers = list(self._watchers)
        for changed in watchers:
            changed()


class StopSignal(threading.Event):
    """Set once, from any thread, to end what runs: whatever is attached is called then, once or twice."""

    def __init__(self) -> None:
        super().__init__()
        self._attached = Watchers()

    def set(self) -> None:
        super().set()
        self._attached.tell()

    @contextmanager
    def attached(self, action: Callable[[], None]) -> Iterator[None]:
        """Have `action` called on :meth:`set`, or now if that has been; until the block is left."""
        with self._attached.added(action):
            if self.is_set():
                action()
            yield
