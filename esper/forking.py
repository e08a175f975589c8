"""Fork safety: what holds threads, locks or connections starts afresh in a forked child, as in a data loader."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Forkable", "ModuleLock", "no_forks", "reset_after_fork"]


class Forkable(Protocol):
    """Something that a forked child must not use in the state that the fork left it in."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there. Replaces locks, and forgets threads."""
        ...


_live: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_after_fork(owner: Forkable) -> None:
    """Have `owner.after_fork()` called in every child that is forked while `owner` lives."""
    _live.add(owner)


class ModuleLock:
    """A reentrant lock that is free in a forked child, whoever held it in the parent."""

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """See :class:`Forkable`."""
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Held until the block is left."""
        with self._lock:
            yield


_forking = threading.RLock()


@contextmanager
def no_forks() -> Iterator[None]:
    """Until the block is left, other threads that fork wait. Only for what takes no longer than to start a process.

    A process that is forked while `subprocess` starts another one inherits both ends of its pipes: whoever waits for
    such a pipe to close, as `subprocess` itself does, waits for the forked process to end.
    """
    with _forking:
        yield


def _in_child() -> None:
    _forking.release()
    for owner in list(_live):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_in_child)
