"""A worker on a daemon thread, for a process that has other things to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from esper.errors import EsperError
from esper.services.errors import ServiceError
from esper.services.tezzeret.watchers import StopSignal, Watchers
from esper.services.tezzeret.worker import Worker

__all__ = ["TezzeretService"]

_log = logging.getLogger(__name__)


class TezzeretService:
    """Compiles what waits in the store, one blueprint after the other.

    The thread starts when it is asked to work, and ends when nothing is left to do: no blueprint waits, and none is in
    work elsewhere, whose lease might run out. It also ends on an error that is not a blueprint's, until asked again.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._stop = StopSignal()
        self._thread: threading.Thread | None = None
        self._watchers = Watchers()
        self._failure: EsperError | None = None

    @property
    def failure(self) -> EsperError | None:
        """What it could not go on for, such as a full disk; None once it was asked again."""
        return self._failure

    def ask(self) -> None:
        """Say that there is work, from any thread."""
        with self._lock:
            if self._stop.is_set():
                return
            self._failure = None
            self._asked.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="esper-tezzeret", daemon=True)
                self._thread.start()

    def watched(self, changed: Callable[[], None]) -> AbstractContextManager[None]:
        """Have `changed` called, on the service's thread, whenever a blueprint was finished or something failed."""
        return self._watchers.added(changed)

    def stop(self, timeout: float | None = 10.0) -> None:
        """End the child that runs, give its blueprint back, and end the thread. With timeout None, wait for nothing."""
        self._stop.set()
        self._asked.set()
        with self._lock:
            thread = self._thread
        if thread is not None and timeout is not None and thread is not threading.current_thread():
            thread.join(timeout)
        self._watchers.tell()

    def _run(self) -> None:
        while True:
            self._asked.clear()
            try:
                while not self._stop.is_set() and self._worker.compile_next(self._stop) is not None:
                    self._watchers.tell()
                rest = self._worker.store.blueprints.next_lease_end()
            except Exception as error:  # noqa: BLE001  # whoever waits for a blueprint is given it
                _log.exception("Tezzeret cannot work")
                self._failure = error if isinstance(error, EsperError) else ServiceError(f"Tezzeret failed: {error!r}")
                rest = None
                self._watchers.tell()
            if rest is not None and not self._stop.is_set():
                self._asked.wait(rest)
            elif self._ended():
                return

    def _ended(self) -> bool:
        with self._lock:
            if self._asked.is_set() and not self._stop.is_set():
                return False
            self._thread = None
            return True
