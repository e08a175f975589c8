"""Threads that stand still in the middle of a step, for programs that look at what others can do meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["StoppedThread"]


class StoppedThread:
    """Runs `work`, and stops where a function of `module` calls the function `name`; made once it stands there."""

    def __init__(self, work: Callable[[], object], module: str, name: str) -> None:
        self._work = work
        self._module, self._name = module, name
        self._there, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._there.wait(20), f"nothing in {module} called {name}"

    def go(self) -> None:
        """Go on, to the end."""
        self._go.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        sys.setprofile(self._look)
        self._work()

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_back is not None:
            caller, name = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            caller, name = frame, argument.__name__
        else:
            return
        if (caller.f_globals.get("__name__"), name) == (self._module, self._name):
            sys.setprofile(None)
            self._there.set()
            self._go.wait(60)
