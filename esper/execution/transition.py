"""Which plan a forward sees that other threads' commits overtake.

A forward that consists of several parts (graphs between graph breaks, modules that run one by one) must see one plan,
while another thread may commit at any time. Nobody waits for anybody: each thread notes the version of the plan at
which its forward began, and parts go on offering what they were before a commit to threads whose forward began then.
That ends when every thread has begun another forward, and after a minute at the latest: a thread may as well have ended
its last forward and call parts of the model by themselves since.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from esper.execution.plan import Plan

__all__ = ["ForwardStarts", "Transition"]

_LONGEST_FORWARD = 60.0  # seconds


class ForwardStarts:
    """The version of the plan at which the latest forward of each thread began. From any thread, without a lock."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}

    def note(self, runtime: Versioned) -> None:
        """A forward of `runtime`'s model begins on this thread, with the plan in force."""
        thread = threading.get_ident()
        if thread not in self._starts:
            self._starts[thread] = -1  # before the version is read: others may settle until then, and not after
        self._starts[thread] = runtime.version

    def of_this_thread(self, otherwise: int) -> int:
        """The version at which this thread's forward began; `otherwise` if none ever did."""
        return self._starts.get(threading.get_ident(), otherwise)

    def forget_before(self, version: int) -> None:
        """Forget forwards that began before `version`: nobody has noted for a while whether others have begun since."""
        for thread, start in self._starts.copy().items():
            if start < version:
                self._starts.pop(thread, None)

    def settled(self, version: int) -> bool:
        """Whether no living thread can be in a forward that began before `version`."""
        earlier = [thread for thread, start in self._starts.copy().items() if start < version]
        return not earlier or not sys._current_frames().keys() & earlier


class Versioned(Protocol):
    """What a transition has to know of a runtime."""

    @property
    def version(self) -> int: ...

    @property
    def upcoming(self) -> int:
        """The version of what is being followed just now: during a commit, the one that it leads to."""
        ...

    @property
    def plan(self) -> Plan: ...

    @property
    def starts(self) -> ForwardStarts: ...


class Transition:
    """Calls `old` on threads whose forward began before the commit that is under way, and `new` on all others.

    Made before the runtime's version becomes that of the commit, which is the moment at which all parts of a forward
    change together. `settle` is called once nobody needs `old` any more.
    """

    def __init__(
        self,
        runtimes: Sequence[Versioned],
        old: Callable[..., Any],
        new: Callable[..., Any],
        settle: Callable[[Transition], None],
    ) -> None:
        self._since = [(runtime, runtime.upcoming) for runtime in runtimes]
        self._plans = [runtime.plan for runtime in runtimes]
        """What threads may go on with: graphs that are compiled meanwhile ask the runtime, which has no hold on it."""
        self._old = old
        self._settle = settle
        self._end = time.monotonic() + _LONGEST_FORWARD
        self.new = new

    def __call__(self, *args: Any) -> Any:
        if time.monotonic() < self._end:
            for runtime, version in self._since:
                if runtime.starts.of_this_thread(runtime.version) < version:
                    return self._old(*args)
            if any(
                runtime.version < version or not runtime.starts.settled(version) for runtime, version in self._since
            ):
                return self.new(*args)
        self._settle(self)
        return self.new(*args)
