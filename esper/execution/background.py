"""A thread for work that must not happen on the thread that trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from esper.forking import reset_after_fork

__all__ = ["BackgroundThread"]

_Result = TypeVar("_Result")
_Job = tuple[Callable[[], object], "Future[object]"]


class BackgroundThread:
    """Runs jobs one after the other on one daemon thread, started with the first job.

    A daemon, so that a process may end while a download hangs. After a fork the child starts a thread of its own with
    its first job; jobs that were waiting in the parent stay the parent's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave thread and jobs to the parent; see `esper.forking`."""
        self._lock = threading.Lock()
        self._thread = None

    def submit(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Run `job` after those submitted before it; the future has its result or its exception."""
        future: Future[_Result] = Future()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._jobs = queue.SimpleQueue()
                self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put((job, future))  # type: ignore[arg-type]  # a future of its own job's result
        return future


def _work(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job, future = jobs.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001  # the future carries it to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)
        del job, future
