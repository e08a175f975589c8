"""The beginnings of forwards: the outermost call of a model's modules or methods that is under way on a thread.

A forward may enter a model anywhere: at the model, at a method of the host's class, at one of its modules. Nothing is
noted of that while there is nothing to commit. Once there is, whoever is entered (a layer with seeds, the model, a
compiled graph) looks up its thread's stack for the outermost call of the model's own, and begins a forward if that
call is another one than before.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from esper import torch_internals

__all__ = ["Entries"]

_Code = tuple[str, int, str]
_SUSPENDS = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR: such a call is under way for long
_MOST_TRIES = 100  # to see all calls of a thread; one that was started in a generator never looks whole


class Entries:
    """The calls that are under way in one model, and which of them is a forward that has begun.

    :meth:`begins` belongs to the thread that calls the model; :meth:`watch` and :meth:`forget` are called under the
    runtime's lock, on any thread.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self._modules = modules
        self._look: _Look | None = _Look(())  # before the first commit every call begins a forward
        self._look.watching = True
        self._prepared = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model, kernels' included; one that is used in several places comes several times."""
        return (each for module in self._modules() for each in module._parameters.values() if each is not None)

    def _writes(self) -> int:
        """How often they were written to."""
        return sum(0 if each.is_inference() else each._version for each in self.parameters())

    def prepare(self) -> None:
        """There is something to commit: learn which calls are the model's own, before anybody is told to look for them.

        Until :meth:`watch`, no forward begins: one that is under way may not be known yet.
        """
        if not self._prepared:
            self._look = _Look(list(self._modules()))
            self._prepared = True

    def watch(self) -> None:
        """Everybody looks for calls now: the forwards that are under way on any thread have begun."""
        look = self._look
        if look is None or look.watching:
            return
        threads, tries = list(sys._current_frames()), _MOST_TRIES
        while threads and tries:
            threads, tries = look.note_under_way(threads), tries - 1
        look.watching = True

    def forget(self) -> None:
        """There is nothing to commit any more."""
        self._look = None
        self._prepared = False

    def begins(self, whole: bool) -> bool:
        """Whether the caller, who was entered just now, is the first of a forward that has not begun; it has then.

        `whole` says that the model as a whole was entered. A method that trains in itself is a forward for each of its
        steps: it enters the whole model again after its parameters were written to.
        """
        look = self._look  # one and the same until the end, though there may be nothing to commit by then
        if look is None:  # since a moment ago: a part may be in the middle of a forward, the model begins one
            return whole
        watching = look.watching  # before the rest: a forward that began before is known by then
        frame = sys._getframe(1)
        outermost = look.outermost(frame)
        thread = threading.get_ident()
        if outermost is None:
            look.begun.pop(thread, None)
            return whole or not _goes_on(frame)
        begun, before = look.begun.get(thread, (None, None))
        if begun is not outermost:
            look.begun[thread] = outermost, None
            return watching and look.under_way.pop(thread, None) is not outermost
        if not whole:
            return False
        now = self._writes()
        look.begun[thread] = outermost, now
        return before is not None and before != now

    def is_inside(self) -> bool:
        """Whether the forward of one of the model's modules is under way on this thread, and it is this one that asks.

        Methods of other names may train in themselves: between their steps no forward is under way.
        """
        caller = sys._getframe(1)
        if not any(_hints_at_a_forward(frame.f_code) for frame in _around(caller)):
            return False
        modules = list(self._modules())
        ids, codes = frozenset(map(id, modules)), set[_Code]().union(*map(_forwards, {type(each) for each in modules}))
        codes.update(code for each in modules for code in _codes(vars(each).get("forward")))
        return any(_key(frame.f_code) in codes and id(_first_argument(frame)) in ids for frame in _around(caller))


class _Look:
    """A look for the calls of `modules`, from when there is something to commit until there is nothing any more."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.begun: dict[int, tuple[FrameType, Any]] = {}
        """The outermost call on each thread that has begun a forward, and the steps that were taken by then."""
        self.under_way: dict[int, FrameType] = {}
        """The outermost call on each thread that was in the model when it began."""
        self.watching = False
        self._ids = frozenset(map(id, modules))
        self._codes = frozenset({torch_internals.module_call_code()}.union(*map(_methods, {type(m) for m in modules})))

    def note_under_way(self, threads: Collection[int]) -> list[int]:
        """Learn in which calls `threads` are; returns those of which that cannot be told, since they went on meanwhile.

        A thread may leave a generator while its frames are gone through, which has no hold on its caller then.
        """
        again = []
        frames = {thread: frame for thread, frame in sys._current_frames().items() if thread in threads}
        if threading.get_ident() in frames:
            frames[threading.get_ident()] = sys._getframe(1)  # one that refers to itself would live, with all callers
        for thread, frame in frames.items():
            outermost, is_whole = self._walk(frame)
            if outermost is not None:
                self.under_way[thread] = outermost
            if not is_whole:
                again.append(thread)
        return again

    def outermost(self, frame: FrameType | None) -> FrameType | None:
        """The outermost call of the modules that `frame` is in.

        From the outside: of calls further in, which may be another thread's and go on meanwhile, no variable is read.
        """
        return self._walk(frame)[0]

    def _walk(self, frame: FrameType | None) -> tuple[FrameType | None, bool]:
        """The outermost call that `frame` is in, and whether all calls around `frame` were seen."""
        calls, last = [], None
        while frame is not None:
            if _key(frame.f_code) in self._codes:
                calls.append(frame)
            frame, last = frame.f_back, frame
        outermost = next((call for call in reversed(calls) if id(_first_argument(call)) in self._ids), None)
        return outermost, last is None or not last.f_code.co_flags & _SUSPENDS


def _around(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _hints_at_a_forward(code: CodeType) -> bool:
    """Whether it is worth to go through all modules, so that variables are read of their forwards alone.

    Until a frame ends it keeps what it had when they were read, though the user has deleted it since.
    """
    return "forward" in code.co_name or _key(code) == torch_internals.module_call_code()


def _forwards(kind: type) -> frozenset[_Code]:
    """The codes of the forwards of a class of modules."""
    return frozenset(code for each in kind.__mro__ for code in _codes(vars(each).get("forward")))


def _codes(function: Any) -> Iterator[_Code]:
    """Those of a function or method, and of what its decorators, such as `torch.no_grad()`, are around."""
    while function is not None:
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType):
            yield _key(function.__code__)
        function = getattr(function, "__wrapped__", None)


def _goes_on(frame: FrameType | None) -> bool:
    """Whether compiled code on the stack goes on after a graph break: what is called there began before."""
    while frame is not None:
        if torch_internals.goes_on_after_break(frame.f_code):
            return True
        frame = frame.f_back
    return False


def _key(code: CodeType) -> _Code:
    """What Dynamo keeps of a code when it compiles it."""
    return code.co_filename, code.co_firstlineno, code.co_name


def _first_argument(frame: FrameType) -> object:
    """Until its call ends, a frame that is asked keeps what its variables hold now: none is asked without need."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _methods(kind: type) -> frozenset[_Code]:
    """The codes of what a class of modules adds to torch's own."""
    found = set()
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] == torch.__name__ or each is object:
            continue
        for value in vars(each).values():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType) and not function.__code__.co_flags & _SUSPENDS:
                found.add(_key(function.__code__))
                inner = getattr(function, "__wrapped__", None)  # of a decorator such as torch.no_grad()
                if isinstance(inner, FunctionType):
                    found.add(_key(inner.__code__))
    return frozenset(found)
