"""Threads that stand still in the middle of a step, for programs that look at what others can do meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Stop", "StoppedThread"]


class Stop:
    """The moment at which `caller`, "module:function", calls a function `callee`. The first thread there stops.

    For threads whose profile function is :meth:`look`.
    """

    def __init__(self, caller: str, callee: str) -> None:
        self._caller, self._callee = caller, callee
        self._there, self._go = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Until a thread stands there."""
        assert self._there.wait(20), f"{self._caller} has not called {self._callee}"

    def go(self) -> None:
        """Let it go on."""
        self._go.set()

    def look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_back is not None:
            caller, callee = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            caller, callee = frame, argument.__name__
        else:
            return
        if (f"{caller.f_globals.get('__name__')}:{caller.f_code.co_name}", callee) == (self._caller, self._callee):
            sys.setprofile(None)
            self._there.set()
            assert self._go.wait(60)


class StoppedThread:
    """Runs `work`, and stops where `caller` calls `callee`, see :class:`Stop`; made once it stands there."""

    def __init__(self, work: Callable[[], object], caller: str, callee: str) -> None:
        self._work = work
        self._stop = Stop(caller, callee)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stop.wait()

    def go(self) -> None:
        """Go on, to the end."""
        self._stop.go()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        sys.setprofile(self._stop.look)
        self._work()
