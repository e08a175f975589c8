"""Futures that Ctrl-C cannot leave locked."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any

import pytest

import esper
from esper.futures import InterruptSafeFuture
from tests.compiler.agreement import put
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


class _Stop(BaseException):
    """An interrupt at one instruction of the standard library's own code."""


def _is_left_locked(make: Callable[[], Future[int]], ask: Callable[[Future[int]], object]) -> bool:
    """Whether an interrupt at some instruction of `Condition` leaves a future that cannot be answered."""
    for at in range(1000):
        future, seen = make(), 0

        def trace(frame: FrameType, event: str, argument: Any, at: int = at) -> Any:
            nonlocal seen
            frame.f_trace_opcodes = frame.f_code.co_filename == threading.__file__
            if event == "opcode":
                seen += 1
                if seen > at:
                    raise _Stop
            return trace

        sys.settrace(trace)
        try:
            ask(future)
        except _Stop:
            pass
        else:
            return False
        finally:
            sys.settrace(None)
        if not _elsewhere(lambda future=future: future._condition.acquire(blocking=False)):
            return True
    raise AssertionError("it never came to an end")


def _elsewhere(work: Callable[[], bool]) -> bool:
    """The result of `work` on another thread."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    "ask", [Future.done, Future.running, Future.cancelled, lambda future: future.add_done_callback(print)]
)
def test_an_interrupt_while_a_future_is_asked_leaves_it_usable(ask: Callable[[Future[int]], object]) -> None:
    assert _is_left_locked(Future, ask), "a plain one is left locked, or this test sees nothing"
    assert not _is_left_locked(InterruptSafeFuture, ask)


def test_loads_go_on_after_interrupts_of_a_program_that_asks_whether_one_is_done(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    kernel, usual = put(shelf), signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for round_ in range(40):
            signal.setitimer(signal.ITIMER_REAL, 0.002 + round_ / 20000)
            try:
                future = model.request_kernel("0", 0, kernel)
                while True:
                    future.done()
            except KeyboardInterrupt:
                model.unload_kernel("0", 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert model.request_kernel("0", 1, kernel).result(60)
