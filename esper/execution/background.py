"""Threads for work that must not happen on the thread that trains, shared by all models of a process.

They end in order with the process. A daemon thread that wants the interpreter back once that is ending is unwound where
it stands, and in the middle of one of torch's operations, C++ takes that for a reason to abort. So at the exit no job
begins, and those that run are waited for, but for those that wait for something themselves: see :func:`waiting`.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from esper.forking import reset_after_fork
from esper.futures import InterruptSafeFuture

__all__ = ["FETCHING", "STAGING", "BackgroundThreads", "JobQueue", "has_worked", "rest", "waiting"]

_Result = TypeVar("_Result")
_Job = tuple[Callable[[], Any], "Future[Any]"]

_SLOW_SECONDS = 0.2
_IDLE_SECONDS = 5.0
_MOST_THREADS = 64
_LONGEST_EXIT = 10.0
_LONGEST_REST = 0.05
_LONGEST_WORK = 0.001  # seconds of a processor, after which a job rests as soon as it can


class _Exit:
    """Whether the process ends, and which threads it need not wait for."""

    def __init__(self) -> None:
        self.has_begun = False
        self.waiting: set[int] = set()


_exit = _Exit()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """In this block a job does nothing but wait for something outside of the process, which may end meanwhile.

    Then the block is never left.
    """
    thread = threading.get_ident()
    _exit.waiting.add(thread)
    try:
        yield
    finally:
        if _exit.has_begun and threading.current_thread().daemon:
            threading.Event().wait()  # the thread's end is the process's
        _exit.waiting.discard(thread)


class _Work(threading.local):
    """What this thread has done: its times of a processor, in seconds."""

    rest = 0.0
    """How often as long as it works it rests; 0 if it is none of those that do."""
    rested = 0.0
    """When it rested last."""
    began = 0.0
    """When its job began."""


_work = _Work()


def rest() -> None:
    """Leave the interpreter to whoever trains for as long as this job has worked since it did so last.

    To be called between any two parts of a job. Short parts go together: every rest is a wait for the interpreter too,
    and what goes on at once finds the processor's caches as it left them. Other threads need not rest.
    """
    if _work.rest and time.thread_time() - _work.rested > _LONGEST_WORK:
        _rest()


def has_worked() -> bool:
    """Whether this job has worked for so long that it should leave to the next one what another can do."""
    return time.thread_time() - _work.began > _LONGEST_WORK


def _rest() -> None:
    time.sleep(min(_work.rest * (time.thread_time() - _work.rested), _LONGEST_REST))
    _work.rested = time.thread_time()


class BackgroundThreads:
    """Runs jobs on daemon threads, `at_once` of them side by side.

    A job that takes longer than a fifth of a second waits for something, and does not count any more: others begin
    beside it, on as many as `most` threads. Threads start when they are needed and end when they have had nothing to
    do for a while. Jobs of threads with `rest` call :func:`rest`, and begin one after the other where they do not wait,
    so that they leave that many times as much time as they take to whoever trains, who wants the interpreter as they
    do. They are daemons, so that a process may end while a download hangs. After a fork the child has
    threads of its own; jobs that were waiting in the parent stay the parent's.
    """

    def __init__(self, name: str, at_once: int, most: int = _MOST_THREADS, rest: float = 0.0) -> None:
        self._name, self._at_once, self._most, self._rest = name, at_once, most, rest
        self.after_fork()
        reset_after_fork(self)
        atexit.register(self._end)

    def _end(self) -> None:
        _exit.has_begun = True
        end = time.monotonic() + _LONGEST_EXIT
        with self._lock:
            self._jobs.clear()
            while not self._running.keys() <= _exit.waiting and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.05))  # nobody says that it began to wait for something

    def after_fork(self) -> None:
        """Leave threads and jobs to the parent; see `esper.forking`."""
        _exit.waiting.clear()
        self._lock = threading.Lock()  # taken by itself: an interrupt cannot come between it and a `with` block
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[_Job] = deque()
        self._threads: set[threading.Thread] = set()
        self._running: dict[int, float] = {}  # since when, by thread
        self._work = _LONGEST_REST / 4  # seconds of a processor that a job takes, by the last ones
        self._resting_until = 0.0

    def submit(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Run `job`; the future has its result or its exception. Raises `RuntimeError` if there is no thread for it."""
        future: Future[_Result] = InterruptSafeFuture()
        with self._lock:
            if _exit.has_begun:
                return future  # which nobody waits for any more
            self._jobs.append((job, future))
            refusal = self._staff()
            if refusal is not None and not self._threads:
                self._jobs.remove((job, future))
                raise refusal
            self._changed.notify()
        return future

    def _staff(self) -> RuntimeError | None:
        """Have a thread wait for every job that may begin, and at least one for those that may not yet; or why not."""
        idle = len(self._threads) - len(self._running)
        room = max(self._at_once - self._fresh(), 1)
        if idle < min(len(self._jobs), room) and len(self._threads) < self._most:
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: one that runs comes back for the job
                return error
            self._threads.add(thread)  # as it does itself, if an interrupt comes before this
        return None

    def _fresh(self) -> int:
        limit = time.monotonic() - _SLOW_SECONDS
        return sum(since > limit for since in self._running.values())

    def _serve(self) -> None:
        while (taken := self._next()) is not None:
            job, future = taken
            if future.set_running_or_notify_cancel():
                _work.rest, _work.rested = self._rest, (began := time.thread_time())
                _work.began = began
                try:
                    result = job()
                except BaseException as error:  # noqa: BLE001  # the future carries it to whoever waits
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
                if self._rest:
                    _rest()
                self._note_work(time.thread_time() - began)
            del job, future, taken  # what they refer to need not live until the next job

    def _note_work(self, seconds: float) -> None:
        with self._lock:
            self._work += (min(seconds, _LONGEST_REST) - self._work) / 2

    def _next(self) -> _Job | None:
        """A job, once it may begin; None after a while without any."""
        thread = threading.get_ident()
        with self._lock:
            self._threads.add(threading.current_thread())
            self._running.pop(thread, None)
            end = time.monotonic() + _IDLE_SECONDS
            while True:
                now = time.monotonic()
                has_jobs = bool(self._jobs) and not _exit.has_begun
                if has_jobs and now < self._resting_until:
                    self._changed.wait(self._resting_until - now)
                elif has_jobs and self._fresh() < self._at_once:
                    self._running[thread] = now
                    job = self._jobs.popleft()
                    if self._rest:
                        self._resting_until = now + (1.0 + self._rest) * self._work
                    self._staff()
                    return job
                elif has_jobs:
                    fresh = sorted(self._running.values())[-self._at_once :]
                    self._changed.wait(max(fresh[0] + _SLOW_SECONDS - now, 0.001))
                elif now < end:
                    self._changed.wait(end - now)
                else:
                    self._threads.discard(threading.current_thread())
                    return None


class JobQueue:
    """Jobs that run one after the other, on `threads` that others use as well."""

    def __init__(self, threads: BackgroundThreads) -> None:
        self._threads = threads
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave the jobs to the parent; see `esper.forking`."""
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], object]] = deque()
        self._is_running = False

    def submit(self, job: Callable[[], object]) -> None:
        """Run `job` after those submitted before it. What it raises is for nobody."""
        with self._lock:
            self._jobs.append(job)
            if self._is_running:
                return
            self._is_running = True
        try:
            self._threads.submit(self._run)
        except BaseException:
            with self._lock:
                self._is_running = False
            raise

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._is_running = False
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException:
                with self._lock:
                    self._is_running = False
                    again = bool(self._jobs)
                if again:
                    self.submit(lambda: None)
                raise


_REST = 3.0
"""That leaves three quarters of the interpreter to whoever trains: a step takes a third longer, and a piece of work."""

FETCHING = BackgroundThreads("esper-fetching", at_once=4, rest=_REST)
"""For what asks kernel sources, which may be slow or hang, and makes kernels of what they answer."""
STAGING = BackgroundThreads("esper-staging", at_once=1, rest=_REST)
"""For what makes models ready for new plans, and waits for compile workers."""
