"""Validated kernels in host memory, within a budget of bytes and one of entries, for all layers of a model.

A hit is a dictionary look-up under a lock that nobody holds for longer than that: fetching, hashing and parsing happen
outside of it. Requests for a kernel that is being fetched wait for that fetch, whichever thread or event loop they come
from. What fails is not remembered: the next request fetches again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch

from esper.artifacts import Limits, load_artifact
from esper.errors import EsperError
from esper.execution.loaded_kernel import KernelTemplate, LoadedKernel
from esper.execution.sources import KernelSource, UnknownKernelError

__all__ = ["Cleared", "KernelCache", "KernelCacheError", "KernelCacheFullError", "KernelTooLargeError"]

_Result = TypeVar("_Result")

_MB = 1024 * 1024
_CONCURRENT_FETCHES = 4
_FAILURES_KEPT = 128


class KernelCacheError(EsperError, RuntimeError):
    """The cache could not keep, pin or fetch a kernel."""


class KernelTooLargeError(KernelCacheError):
    """An artifact that is larger than the whole cache. Nothing was evicted for it."""


class KernelCacheFullError(KernelCacheError):
    """A kernel for which there is no room beside those in use. Nothing was evicted for it."""


class Cleared(NamedTuple):
    """What `KernelCache.clear_cache` did."""

    removed: int
    """Entries that are gone."""
    pinned: int
    """Entries that stayed because a seed uses them."""


class _Pool:
    """The entries that all views of a cache share. Every attribute changes under `lock`, which is held briefly."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.lock = threading.Lock()
        self.kernels: OrderedDict[str, LoadedKernel] = OrderedDict()  # least recently used first
        self.bytes = 0
        self.evictions = 0
        self.pins: dict[str, int] = {}
        self.in_flight: dict[str, Future[LoadedKernel]] = {}
        self.failures: OrderedDict[str, str] = OrderedDict()
        self.fetch_slots = threading.BoundedSemaphore(_CONCURRENT_FETCHES)

    def find(self, artifact_id: str) -> LoadedKernel | None:
        """The cached kernel, now the most recently used; None if there is none or somebody wrote to its weights."""
        kernel = self.kernels.get(artifact_id)
        if kernel is None:
            return None
        if not kernel.template.intact:
            self.remove(artifact_id)
            return None
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
                f"no room for kernel {kernel.artifact_id[:12]} ({kernel.size_bytes / _MB:.2f} MB): {len(self.pins)} "
                f"kernels in use leave too little of {self.max_bytes / _MB:g} MB and {self.max_entries} entries; "
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


class KernelCache:
    """A cache of kernels in front of a `KernelSource`. May be used from any thread and any event loop.

    A kernel that it returns is frozen, on the CPU, and shared by everybody who asks for it: a seed executes a `place()`
    of it. Kernels in use are pinned and never evicted; of the others, the least recently used goes first.
    """

    def __init__(
        self,
        max_cache_size_mb: float = 512,
        max_entries: int = 128,
        *,
        source: KernelSource | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not max_cache_size_mb > 0:
            raise ValueError(f"max_cache_size_mb is {max_cache_size_mb}; pass a number of megabytes above 0.")
        if max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}; pass at least 1.")
        self._pool = _Pool(int(max_cache_size_mb * _MB), max_entries)
        self._source = source
        self._limits = limits if limits is not None else Limits()
        self._parent: KernelCache | None = None
        self.layer_id: str | None = None
        self._hits = self._misses = 0

    def view(self, layer_id: str) -> KernelCache:
        """The same cache with hit and miss counters of its own, for one layer; this one goes on counting all."""
        view = object.__new__(type(self))
        view.layer_id = layer_id
        view._pool, view._source, view._limits = self._pool, self._source, self._limits
        view._parent = self
        view._hits = view._misses = 0
        return view

    # ---- loading -----------------------------------------------------------------------------------------------

    async def load_kernel(self, artifact_id: str, *, pin: bool = False) -> LoadedKernel | None:
        """The kernel with this id, unique prefix or registered name; None if the source knows none.

        `failure` tells why there is none. `pin` pins it in the same moment. Raises `ArtifactError` for an artifact that
        is corrupt or not trusted, `KernelTooLargeError`, `KernelCacheFullError`, `AmbiguousKernelError`, and what the
        source raises. Cancelling one waiter does not disturb the fetch that others wait for.
        """
        kernel = self._hit(artifact_id, pin)
        if kernel is not None:
            return kernel
        try:
            identity = artifact_id
            if not _is_full_id(artifact_id):
                identity = await asyncio.wrap_future(_in_thread(lambda: self._resolve(artifact_id)))
            kernel = self._hit(identity, pin)
            if kernel is not None:
                return kernel
            future, leads = self._join(identity)
            if leads:
                _in_thread(lambda: self._carry_out(identity, future))
            return self._take(await asyncio.wrap_future(future), pin)
        except UnknownKernelError as error:
            self._note(artifact_id, error)
            return None
        except Exception as error:
            self._note(artifact_id, error)
            raise

    def fetch(self, artifact_id: str, *, pin: bool = False) -> LoadedKernel:
        """`load_kernel` for background threads: waits for the source, and raises `UnknownKernelError` as well."""
        kernel = self._hit(artifact_id, pin)
        if kernel is not None:
            return kernel
        try:
            identity = artifact_id if _is_full_id(artifact_id) else self._resolve(artifact_id)
            kernel = self._hit(identity, pin)
            if kernel is not None:
                return kernel
            future, leads = self._join(identity)
            if leads:
                self._carry_out(identity, future)
            return self._take(future.result(), pin)
        except Exception as error:
            self._note(artifact_id, error)
            raise

    def failure(self, artifact_id: str) -> str | None:
        """Why the last request for this reference failed, or None if it did not, or was long ago."""
        return self._pool.failures.get(artifact_id)

    def _hit(self, artifact_id: str, pin: bool) -> LoadedKernel | None:
        pool = self._pool
        with pool.lock:
            kernel = pool.find(artifact_id)
            if kernel is not None:
                self._count(hit=True)
                if pin:
                    pool.pins[artifact_id] = pool.pins.get(artifact_id, 0) + 1
                if pool.failures:
                    pool.failures.pop(artifact_id, None)
        return kernel

    def _count(self, *, hit: bool) -> None:
        counting: KernelCache | None = self
        while counting is not None:
            if hit:
                counting._hits += 1
            else:
                counting._misses += 1
            counting = counting._parent

    def _resolve(self, reference: str) -> str:
        try:
            return self._require_source(reference).resolve(reference)
        except BaseException:
            with self._pool.lock:
                self._count(hit=False)
            raise

    def _require_source(self, reference: str) -> KernelSource:
        if self._source is None:
            raise UnknownKernelError(f"there is no kernel {reference!r}: this cache was made without a kernel source.")
        return self._source

    def _join(self, artifact_id: str) -> tuple[Future[LoadedKernel], bool]:
        """The fetch of this id that is under way, or a new one and True: then the caller has to carry it out."""
        pool = self._pool
        with pool.lock:
            self._count(hit=False)
            future = pool.in_flight.get(artifact_id)
            if future is not None:
                return future, False
            future = pool.in_flight[artifact_id] = Future()
            future.set_running_or_notify_cancel()  # from here on, cancelling one waiter cannot cancel it for all
        return future, True

    def _carry_out(self, artifact_id: str, future: Future[LoadedKernel]) -> None:
        """Fetch, verify and insert; the future gets the kernel or the exception."""
        pool = self._pool
        try:
            with pool.fetch_slots:
                kernel = self._fetch_and_verify(artifact_id)
            with pool.lock:
                pool.insert(kernel)
                del pool.in_flight[artifact_id]
        except BaseException as error:
            with pool.lock:
                del pool.in_flight[artifact_id]
            if not isinstance(error, Exception):  # KeyboardInterrupt is for this thread alone
                future.set_exception(
                    KernelCacheError(f"the fetch of kernel {artifact_id[:12]} was interrupted; retry.")
                )
                raise
            future.set_exception(error)
        else:
            future.set_result(kernel)

    def _fetch_and_verify(self, artifact_id: str) -> LoadedKernel:
        source = self._require_source(artifact_id)
        fetched = source.fetch(artifact_id)
        size, allowed = len(fetched.data), self._pool.max_bytes
        if size > allowed:
            raise KernelTooLargeError(
                f"kernel {artifact_id[:12]} has {size / _MB:.2f} MB, more than the whole cache of "
                f"{allowed / _MB:g} MB; make the cache larger (cache_size_mb)."
            )
        with torch.inference_mode(False):  # weights must stay usable in a backward, whoever asked for them
            artifact = load_artifact(
                fetched.data,
                expected_id=artifact_id,
                signature=fetched.signature,
                trust=source.trust(),
                limits=self._limits,
            )
            return KernelTemplate.from_artifact(artifact).place()

    def _take(self, kernel: LoadedKernel, pin: bool) -> LoadedKernel:
        """Hand over a kernel that was just fetched, pinned if asked for: even if it was evicted meanwhile."""
        pool = self._pool
        with pool.lock:
            if pin:
                if kernel.artifact_id not in pool.kernels:
                    pool.insert(kernel)
                pool.pins[kernel.artifact_id] = pool.pins.get(kernel.artifact_id, 0) + 1
            pool.failures.pop(kernel.artifact_id, None)
        return kernel

    def _note(self, reference: str, error: Exception) -> None:
        with self._pool.lock:
            self._pool.note_failure(reference, error)

    # ---- keeping -----------------------------------------------------------------------------------------------

    def pin(self, artifact_id: str) -> None:
        """Keep a cached kernel from being evicted until as many `unpin`; `KernelCacheError` if it is not cached."""
        pool = self._pool
        with pool.lock:
            if artifact_id not in pool.kernels:
                raise KernelCacheError(f"kernel {artifact_id[:12]} is not cached; load it with pin=True.")
            pool.pins[artifact_id] = pool.pins.get(artifact_id, 0) + 1

    def unpin(self, artifact_id: str) -> None:
        """Take back one `pin` of a full id; `KernelCacheError` if there is none."""
        pool = self._pool
        with pool.lock:
            count = pool.pins.get(artifact_id, 0)
            if count == 0:
                raise KernelCacheError(f"kernel {artifact_id[:12]} is not pinned, so it cannot be unpinned.")
            if count == 1:
                del pool.pins[artifact_id]
            else:
                pool.pins[artifact_id] = count - 1

    def clear_cache(self) -> Cleared:
        """Drop every kernel that is not in use. Counters stay."""
        pool = self._pool
        with pool.lock:
            loose = [artifact_id for artifact_id in pool.kernels if artifact_id not in pool.pins]
            for artifact_id in loose:
                pool.remove(artifact_id)
            return Cleared(removed=len(loose), pinned=len(pool.kernels))

    # ---- questions ---------------------------------------------------------------------------------------------

    def get_cache_stats(self) -> dict[str, Any]:
        """`cache_hit_rate` (0 to 1; 0 before the first request), `cache_hits`, `cache_misses`: of this view.
        `cache_size_mb`, `cache_entries`: of the whole cache."""
        pool = self._pool
        with pool.lock:
            requests = self._hits + self._misses
            return {
                "cache_hit_rate": self._hits / requests if requests else 0.0,
                "cache_hits": self._hits,
                "cache_misses": self._misses,
                "cache_size_mb": pool.bytes / _MB,
                "cache_entries": len(pool.kernels),
            }

    @property
    def evictions(self) -> int:
        """How many kernels have made room for others, in the whole cache."""
        return self._pool.evictions

    @property
    def source(self) -> KernelSource | None:
        return self._source

    @property
    def max_cache_size_mb(self) -> float:
        """The budget of the whole cache, in MB of 2**20 bytes."""
        return self._pool.max_bytes / _MB

    @property
    def max_entries(self) -> int:
        return self._pool.max_entries

    def __contains__(self, artifact_id: str) -> bool:
        """Whether the kernel with this full id is cached; not counted as a request."""
        return artifact_id in self._pool.kernels

    def __len__(self) -> int:
        return len(self._pool.kernels)

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        """A copied model uses the same cache: its kernels are shared and immutable."""
        return self


def _is_full_id(reference: str) -> bool:
    return len(reference) == 64 and all(letter in "0123456789abcdef" for letter in reference)


def _in_thread(work: Callable[[], _Result]) -> Future[_Result]:
    """Run `work` on a daemon thread of its own: a process may end while a download hangs."""
    future: Future[_Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # the future carries it to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="esper-kernel-cache", daemon=True).start()
    return future
