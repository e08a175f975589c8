"""Futures that stay usable when Ctrl-C interrupts who asks them."""

from __future__ import annotations

import operator
import threading
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["InterruptSafeFuture"]

_Result = TypeVar("_Result")


class _Condition(threading.Condition):
    """A condition that `with` enters by one call in C.

    `threading.Condition` enters its lock in a method of its own, written in Python. An interrupt that comes when that
    has the lock and has not returned leaves it locked for good, and whoever notifies waits for it. A `with` statement
    looks these two up on the class, and calls what they give.
    """

    __enter__ = property(operator.attrgetter("_lock.__enter__"))
    __exit__ = property(operator.attrgetter("_lock.__exit__"))


class InterruptSafeFuture(Future[_Result]):
    """A future that a thread may ask for which interrupts are meant, while another one answers it.

    A plain one whose `done()` or `result()` is interrupted may stay locked: the thread that answers it hangs then, with
    all that it would have done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()
