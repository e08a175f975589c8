"""Telling others of submissions without having the submitter wait for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Announcements"]

_log = logging.getLogger(__name__)
_MAX_WAITING = 1000


class Announcements:
    """Calls a function with the id of each submitted blueprint, one after the other, on a thread of its own.

    One that cannot be announced is not lost: it waits in the store, where whoever sweeps it finds it.
    """

    def __init__(self, announce: Callable[[str], None] | None) -> None:
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, "urza-announcements")
        self._slots = threading.BoundedSemaphore(_MAX_WAITING)

    def __call__(self, blueprint_id: str) -> None:
        """Never blocks and never raises."""
        if self._announce is None:
            return
        if not self._slots.acquire(blocking=False):
            _log.warning("blueprint %s is not announced: %d wait already", blueprint_id[:12], _MAX_WAITING)
            return
        self._thread.submit(self._call, self._announce, blueprint_id)

    def close(self) -> None:
        """End after the announcement that is being made. Those that wait are left to the sweep."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _call(self, announce: Callable[[str], None], blueprint_id: str) -> None:
        try:
            announce(blueprint_id)
        except Exception:  # noqa: BLE001  # whatever it is, the submission stands, and the next one is announced
            _log.exception("blueprint %s was submitted but not announced; the sweep finds it", blueprint_id[:12])
        finally:
            self._slots.release()
