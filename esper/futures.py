"""Futures that stay usable when Ctrl-C interrupts who asks them, and work on a thread that answers one."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

__all__ = ["InterruptSafeFuture", "in_thread"]

_LATE_SECONDS = 0.5  # for a timeout to be noticed by the work, which knows what it is waiting for
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


def in_thread(
    work: Callable[[], _Result], timeout: float | None, late: Callable[[float], Exception]
) -> Future[_Result]:
    """Run `work`, which knows of `timeout`; soon after that, the future has the error `late` and waits no more."""
    future: Future[_Result] = InterruptSafeFuture()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # the future carries it to whoever asks
            fail(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(result)

    def fail(error: BaseException) -> None:
        with suppress(InvalidStateError):
            future.set_exception(error)

    threading.Thread(target=run, name="esper-request", daemon=True).start()
    if timeout is not None:
        timer = threading.Timer(timeout + _LATE_SECONDS, lambda: fail(late(timeout)))
        timer.name, timer.daemon = "esper-request-timeout", True
        timer.start()
        future.add_done_callback(lambda _: timer.cancel())
    return future
