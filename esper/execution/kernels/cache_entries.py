"""The entries that all views of a kernel cache share, their budgets, and the lock under which they change."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from esper.errors import EsperError
from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.forking import reset_after_fork
from esper.futures import InterruptSafeFuture

__all__ = ["MB", "CacheEntries", "Fetch", "KernelCacheError", "KernelCacheFullError", "KernelTooLargeError"]

MB = 1024 * 1024
_FAILURES_KEPT = 128
_SLOW_SECONDS = 1.0


class KernelCacheError(EsperError, RuntimeError):
    """The cache could not keep, pin or fetch a kernel."""


class KernelTooLargeError(KernelCacheError):
    """An artifact that is larger than the whole cache. Nothing was evicted for it."""


class KernelCacheFullError(KernelCacheError):
    """A kernel for which there is no room beside those in use. Nothing was evicted for it."""


class Fetch:
    """A fetch under way: what it leads to, and whether somebody still waits for it."""

    def __init__(self) -> None:
        self.future: Future[LoadedKernel] = InterruptSafeFuture()
        self.waiting: list[Callable[[], bool]] = []
        self._began = time.monotonic()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any more for what has taken long already: it may hang, so the next one asks anew."""
        late = time.monotonic() - self._began > _SLOW_SECONDS
        return late and not any(still() for still in self.waiting)


class CacheEntries:
    """The entries that all views of a cache share. Every attribute changes under `lock`, which is held briefly.

    A forked child has the parent's entries and none of its fetches.
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.kernels: OrderedDict[str, LoadedKernel] = OrderedDict()  # least recently used first
        self.bytes = 0
        self.evictions = 0
        self.pins: dict[str, int] = {}
        self.failures: OrderedDict[str, str] = OrderedDict()
        self._begin()
        reset_after_fork(self)

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self.in_flight: dict[str, Fetch] = {}

    def after_fork(self) -> None:
        """Leave to the parent the fetches that its threads carry out; see `esper.forking`."""
        self._begin()
        # The fork may have come while a thread changed the entries, before it had changed their sum.
        self.bytes = sum(kernel.size_bytes for kernel in self.kernels.values())

    def find(self, artifact_id: str) -> LoadedKernel | None:
        """The cached kernel, now the most recently used; None if there is none."""
        kernel = self.kernels.get(artifact_id)
        if kernel is not None:
            self.kernels.move_to_end(artifact_id)
        return kernel

    def remove(self, artifact_id: str) -> None:
        self.bytes -= self.kernels.pop(artifact_id).size_bytes

    def insert(self, kernel: LoadedKernel) -> None:
        """Make room and add; or raise and change nothing."""
        if kernel.artifact_id in self.kernels:
            self.remove(kernel.artifact_id)
        size, count = self.bytes + kernel.size_bytes, len(self.kernels) + 1
        victims = []
        for artifact_id, other in self.kernels.items():
            if size <= self.max_bytes and count <= self.max_entries:
                break
            if artifact_id not in self.pins:
                victims.append(artifact_id)
                size, count = size - other.size_bytes, count - 1
        if size > self.max_bytes or count > self.max_entries:
            raise KernelCacheFullError(
                f"no room for kernel {kernel.artifact_id[:12]} ({kernel.size_bytes / MB:.2f} MB): {len(self.pins)} "
                f"kernels in use leave too little of {self.max_bytes / MB:g} MB and {self.max_entries} entries; "
                "unload one, or make the cache larger (cache_size_mb, max_entries)."
            )
        for artifact_id in victims:
            self.remove(artifact_id)
        self.evictions += len(victims)
        self.kernels[kernel.artifact_id] = kernel
        self.bytes += kernel.size_bytes

    def note_failure(self, reference: str, error: BaseException) -> None:
        self.failures[reference] = f"{type(error).__name__}: {error}"  # text: an exception would keep frames alive
        self.failures.move_to_end(reference)
        if len(self.failures) > _FAILURES_KEPT:
            self.failures.popitem(last=False)
