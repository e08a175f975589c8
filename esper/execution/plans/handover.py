"""The handover from one plan to the next, for forwards that other threads' commits overtake.

A forward that consists of several parts (graphs between graph breaks, modules that run one by one) must see one plan,
while another thread may commit at any time. Nobody waits for anybody: each thread notes the version of the plan at
which its forward began, and parts go on offering what they were before a commit to threads whose forward began then.
That ends when every thread has begun another forward, and after a minute at the latest: a thread may as well have ended
its last forward and call parts of the model by themselves since.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from esper.execution.plans.plan import Plan

__all__ = ["FirstForward", "ForwardStarts", "PlanHandover", "UnfinishedHandovers"]

_LONGEST_FORWARD = 60.0  # seconds
_BEGINNING = -1  # a version before all others


class ForwardStarts:
    """The version of the plan at which the latest forward of each thread began. From any thread, without a lock."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}

    def note(self, runtime: Versioned) -> None:
        """A forward of `runtime`'s model begins on this thread, with the plan in force."""
        thread = threading.get_ident()
        self._starts[thread] = _BEGINNING  # before the version is read: others may settle until then, and not after
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

    def of_living_threads(self) -> dict[int, int]:
        """The starts by thread, `_BEGINNING` while one is being noted."""
        starts = self._starts.copy()
        return {thread: starts[thread] for thread in sys._current_frames() if thread in starts}


class Versioned(Protocol):
    """What a handover has to know of a runtime."""

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

    def note_handover(self, handover: PlanHandover) -> None:
        """See to it that it settles, also where nobody calls it."""


class _Overtaken:
    """What a commit puts an end to: `call`, for forwards that began before it. Keeps no runtime alive."""

    def __init__(self, call: Callable[..., Any], runtimes: Sequence[Versioned]) -> None:
        self.call = call
        self.end = time.monotonic() + _LONGEST_FORWARD
        self._versions = [(weakref.ref(runtime), runtime.upcoming) for runtime in runtimes]
        self._plans = [runtime.plan for runtime in runtimes]
        """What threads may go on with: graphs that are compiled meanwhile ask the runtime, which has no hold on it."""

    def versions(self) -> Iterator[tuple[Versioned, int]]:
        """The version of each model's plan with which the commit comes into force."""
        return ((runtime, version) for each, version in self._versions if (runtime := each()) is not None)

    def is_for_this_thread(self) -> bool:
        """Whether this thread's forward began before the commit."""
        return any(each.starts.of_this_thread(each.version) < version for each, version in self.versions())

    def is_over(self) -> bool:
        """Whether no living thread can be in such a forward."""
        return time.monotonic() >= self.end or all(
            each.version >= version and each.starts.settled(version) for each, version in self.versions()
        )


class PlanHandover:
    """Calls `old` on threads whose forward began before the commit that is under way, and `new` on all others.

    Made before the runtime's version becomes that of the commit, which is the moment at which all parts of a forward
    change together. Where `old` is a handover, that of it is kept which some thread's forward began with, and not
    what came and went meanwhile. `settle` is called once nobody needs anything but `new`.
    """

    def __init__(
        self,
        runtimes: Sequence[Versioned],
        old: Callable[..., Any],
        new: Callable[..., Any],
        finish: Callable[[PlanHandover], None],
    ) -> None:
        self.new = new
        before = old._needed() if isinstance(old, PlanHandover) else []
        latest = _Overtaken(old.new if isinstance(old, PlanHandover) else old, runtimes)
        self._overtaken = [*before, latest]  # the earliest first
        self._finish = finish
        for runtime in runtimes:
            runtime.note_handover(self)

    def _needed(self) -> list[_Overtaken]:
        """What forwards that are under way began with."""
        overtaken = [each for each in self._overtaken if time.monotonic() < each.end]
        starts = {each: each.starts.of_living_threads() for one in overtaken for each, _ in one.versions()}
        if any(_BEGINNING in each.values() for each in starts.values()):
            return overtaken
        needed = []
        for thread in set[int]().union(*starts.values()):
            for one in overtaken:
                if any(starts[each].get(thread, version) < version for each, version in one.versions()):
                    needed.append(one)
                    break
        return [one for one in overtaken if one in needed]

    def finish_if_over(self) -> bool:
        """Settle, unless some thread may need what is overtaken."""
        over = self._overtaken[-1].is_over()
        if over:
            self._finish(self)
        return over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        for each in self._overtaken:
            if now < each.end and each.is_for_this_thread():
                return each.call(*args, **kwargs)
        self.finish_if_over()
        return self.new(*args, **kwargs)


class UnfinishedHandovers(deque["weakref.ref[PlanHandover]"]):
    """Handovers that are not known to have finished, by age; those that nobody has any more are left out."""

    def add(self, handover: PlanHandover) -> None:
        """`handover` is the latest."""
        self.append(weakref.ref(handover))

    def finish(self) -> None:
        """Finish those that can be, from the earliest on. Other threads may be at the same."""
        with contextlib.suppress(IndexError):
            while True:
                each = self.popleft()
                handover = each()
                if handover is not None and not handover.finish_if_over():
                    self.appendleft(each)
                    return


class FirstForward:
    """The forward in which the beginning of forwards was compiled, on one thread."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._has_begun = False

    def is_over(self) -> bool:
        """Whether the forward that begins now is the thread's next one, or the thread has ended."""
        if threading.get_ident() != self._thread:
            return self._thread not in sys._current_frames()
        begun, self._has_begun = self._has_begun, True
        return begun
