"""What holds threads, locks or connections starts afresh in a forked child, such as a data loader's worker."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Forkable", "reset_after_fork"]


class Forkable(Protocol):
    """Something that a forked child must not use in the state that the fork left it in."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there. Replaces locks, and forgets threads."""
        ...


_live: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_after_fork(owner: Forkable) -> None:
    """Have `owner.after_fork()` called in every child that is forked while `owner` lives."""
    _live.add(owner)


def _in_child() -> None:
    for owner in list(_live):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
