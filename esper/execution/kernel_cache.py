"""Validated kernels in host memory, within a budget of bytes and one of entries, for all layers of a model.

A hit is a dictionary look-up under a lock that nobody holds for longer than that: fetching, hashing and parsing happen
outside of it. Requests for a kernel that is being fetched wait for that fetch, whichever thread or event loop they come
from. What fails is not remembered: the next request fetches again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from esper.artifacts.limits import Limits
from esper.artifacts.loading import load_artifact
from esper.execution.background import FETCHING, rest, waiting
from esper.execution.kernels.cache_entries import (
    MB,
    CacheEntries,
    Fetch,
    KernelCacheError,
    KernelCacheFullError,
    KernelTooLargeError,
)
from esper.execution.kernels.loaded_kernel import KernelTemplate, LoadedKernel
from esper.execution.kernels.service_locator import kernel_source
from esper.execution.sources import ExpectingSource, KernelSource, UnknownKernelError

__all__ = ["Cleared", "KernelCache", "KernelCacheError", "KernelCacheFullError", "KernelTooLargeError"]

_LOG = logging.getLogger("esper.execution")
_DEFAULT_SOURCE = kernel_source()


class Cleared(NamedTuple):
    """What `KernelCache.clear_cache` did."""

    removed: int
    """Entries that are gone."""
    pinned: int
    """Entries that stayed because a seed uses them."""


class KernelCache:
    """A cache of kernels in front of a `KernelSource`, by default the default platform's; None is an empty one.

    May be used from any thread and any event loop.

    A kernel that it returns is frozen, on the CPU, and shared by everybody who asks for it: a seed executes a `place()`
    of it. Kernels in use are pinned and never evicted; of the others, the least recently used goes first.
    """

    def __init__(
        self,
        max_cache_size_mb: float = 512,
        max_entries: int = 128,
        *,
        source: KernelSource | None = _DEFAULT_SOURCE,
        limits: Limits | None = None,
    ) -> None:
        if not max_cache_size_mb > 0:
            raise ValueError(f"max_cache_size_mb is {max_cache_size_mb}; pass a number of megabytes above 0.")
        if max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}; pass at least 1.")
        self._entries = CacheEntries(int(max_cache_size_mb * MB), max_entries)
        self._source = source
        self._limits = limits if limits is not None else Limits()
        self._parent: KernelCache | None = None
        self.layer_name: str | None = None
        self._hits = self._misses = 0

    def view(self, layer_name: str) -> KernelCache:
        """The same cache with hit and miss counters of its own, for one layer; this one goes on counting all."""
        view = object.__new__(type(self))
        view.layer_name = layer_name
        view._entries, view._source, view._limits = self._entries, self._source, self._limits
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
        kernel = self._hit(artifact_id, artifact_id, pin)
        if kernel is not None:
            return kernel
        try:
            identity = artifact_id
            if not _is_full_id(artifact_id):
                identity = await asyncio.wrap_future(FETCHING.submit(lambda: self._resolve(artifact_id)))
                kernel = self._hit(identity, artifact_id, pin)
                if kernel is not None:
                    return kernel
            return self._take(await self._obtain_async(identity), artifact_id, pin)
        except UnknownKernelError as error:
            self._note(artifact_id, error)
            return None
        except Exception as error:
            self._note(artifact_id, error)
            raise

    def fetch(self, artifact_id: str, *, pin: bool = False, wanted: Callable[[], bool] = lambda: True) -> LoadedKernel:
        """`load_kernel` for background threads: waits for the source, and raises `UnknownKernelError` as well.

        While `wanted()`, others who ask for the same kernel wait for the same fetch, however long it takes.
        """
        kernel = self._hit(artifact_id, artifact_id, pin)
        if kernel is not None:
            return kernel
        try:
            identity = artifact_id
            if not _is_full_id(artifact_id):
                identity = self._resolve(artifact_id)
                kernel = self._hit(identity, artifact_id, pin)
                if kernel is not None:
                    return kernel
            return self._take(self._obtain(identity, wanted), artifact_id, pin)
        except Exception as error:
            self._note(artifact_id, error)
            raise

    def expect(self, references: Iterable[str]) -> None:
        """These are about to be fetched: have the source find those that are not here in one go, if it can.

        For background threads. Where it goes wrong, each fetch says so.
        """
        missing = [each for each in references if _is_full_id(each) and each not in self]
        if len(missing) > 1 and isinstance(self._source, ExpectingSource):
            try:
                with waiting():
                    self._source.expect(missing)
            except Exception as error:  # noqa: BLE001  # whatever a source raises, each fetch says what is wrong
                _LOG.info("%d kernels are looked for one by one: %s", len(missing), error)

    def failure(self, artifact_id: str) -> str | None:
        """Why the last request for this reference failed, or None if it did not, or was long ago."""
        return self._entries.failures.get(artifact_id)

    def _hit(self, artifact_id: str, reference: str, pin: bool) -> LoadedKernel | None:
        entries = self._entries
        with entries.lock:
            kernel = entries.find(artifact_id)
            if kernel is not None:
                self._count(hit=True)
                if pin:
                    entries.pins[artifact_id] = entries.pins.get(artifact_id, 0) + 1
                if entries.failures:
                    entries.failures.pop(reference, None)
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
            with waiting():
                return self._require_source(reference).resolve(reference)
        except BaseException:
            with self._entries.lock:
                self._count(hit=False)
            raise

    def _require_source(self, reference: str) -> KernelSource:
        if self._source is None:
            raise UnknownKernelError(f"there is no kernel {reference!r}: this cache was made without a kernel source.")
        return self._source

    # A failed future, its exception and the frames of the traceback refer to each other, and the frames hold the whole
    # artifact: whoever has the future in a frame lets go of it, so that all of it is freed with the exception.

    def _obtain(self, artifact_id: str, wanted: Callable[[], bool]) -> LoadedKernel:
        fetch, leads = self._join(artifact_id)
        fetch.waiting.append(wanted)
        try:
            if leads:
                self._carry_out(artifact_id, fetch)
            with waiting():
                return fetch.future.result()
        finally:
            fetch.waiting.remove(wanted)
            del fetch

    async def _obtain_async(self, artifact_id: str) -> LoadedKernel:
        fetch, leads = self._join(artifact_id)
        ours = asyncio.wrap_future(fetch.future)
        fetch.waiting.append(_until_done(ours))
        try:
            if leads:
                try:
                    FETCHING.submit(partial(self._carry_out, artifact_id, fetch))
                except RuntimeError as error:  # no thread to be had
                    self._give_up(artifact_id, fetch, error)
            return await ours
        finally:
            del fetch, ours

    def _join(self, artifact_id: str) -> tuple[Fetch, bool]:
        """The fetch of this id that is under way, or a new one and True: then the caller has to carry it out."""
        entries = self._entries
        with entries.lock:
            self._count(hit=False)
            fetch = entries.in_flight.get(artifact_id)
            if fetch is not None and not fetch.is_abandoned:
                return fetch, False
            fetch = entries.in_flight[artifact_id] = Fetch()
            fetch.future.set_running_or_notify_cancel()  # from here on, cancelling one waiter cannot cancel it for all
        return fetch, True

    def _carry_out(self, artifact_id: str, fetch: Fetch) -> None:
        """Fetch, verify and insert; the future gets the kernel or the exception."""
        entries = self._entries
        try:
            kernel = self._fetch_and_verify(artifact_id)
            with entries.lock:
                entries.insert(kernel)
                self._forget(artifact_id, fetch)
            fetch.future.set_result(kernel)
        except Exception as error:  # noqa: BLE001  # the future carries it to whoever waits
            self._give_up(artifact_id, fetch, error)
        except BaseException:  # KeyboardInterrupt is for this thread alone
            interrupted = KernelCacheError(f"the fetch of kernel {artifact_id[:12]} was interrupted; ask again.")
            self._give_up(artifact_id, fetch, interrupted)
            raise
        finally:
            del fetch

    def _give_up(self, artifact_id: str, fetch: Fetch, error: Exception) -> None:
        try:
            with self._entries.lock:
                self._forget(artifact_id, fetch)
            fetch.future.set_exception(error)
        finally:
            del fetch

    def _forget(self, artifact_id: str, fetch: Fetch) -> None:
        if self._entries.in_flight.get(artifact_id) is fetch:
            del self._entries.in_flight[artifact_id]

    def _fetch_and_verify(self, artifact_id: str) -> LoadedKernel:
        source = self._require_source(artifact_id)
        with waiting():
            fetched = source.fetch(artifact_id)
        size, allowed = len(fetched.data), self._entries.max_bytes
        if size > allowed:
            raise KernelTooLargeError(
                f"kernel {artifact_id[:12]} has {size / MB:.2f} MB, more than the whole cache of "
                f"{allowed / MB:g} MB; make the cache larger (cache_size_mb)."
            )
        rest()
        with torch.inference_mode(False):  # weights must stay usable in a backward, whoever asked for them
            artifact = load_artifact(
                fetched.data,
                expected_id=artifact_id,
                signature=fetched.signature,
                trust=source.trust(),
                limits=self._limits,
                pause=rest,
            )
            rest()
            return KernelTemplate.from_artifact(artifact).first(artifact)

    def _take(self, kernel: LoadedKernel, reference: str, pin: bool) -> LoadedKernel:
        """Hand over a kernel that was just fetched, pinned if asked for: even if it was evicted meanwhile."""
        entries = self._entries
        with entries.lock:
            if pin:
                if kernel.artifact_id not in entries.kernels:
                    entries.insert(kernel)
                entries.pins[kernel.artifact_id] = entries.pins.get(kernel.artifact_id, 0) + 1
            entries.failures.pop(reference, None)
        return kernel

    def _note(self, reference: str, error: Exception) -> None:
        with self._entries.lock:
            self._entries.note_failure(reference, error)

    # ---- keeping -----------------------------------------------------------------------------------------------

    def pin(self, artifact_id: str) -> None:
        """Keep a cached kernel from being evicted until as many `unpin`; `KernelCacheError` if it is not cached."""
        entries = self._entries
        with entries.lock:
            if artifact_id not in entries.kernels:
                raise KernelCacheError(f"kernel {artifact_id[:12]} is not cached; load it with pin=True.")
            entries.pins[artifact_id] = entries.pins.get(artifact_id, 0) + 1

    def unpin(self, artifact_id: str) -> None:
        """Take back one `pin` of a full id; `KernelCacheError` if there is none."""
        entries = self._entries
        with entries.lock:
            count = entries.pins.get(artifact_id, 0)
            if count == 0:
                raise KernelCacheError(f"kernel {artifact_id[:12]} is not pinned, so it cannot be unpinned.")
            if count == 1:
                del entries.pins[artifact_id]
            else:
                entries.pins[artifact_id] = count - 1

    def adopt(self, kernel: LoadedKernel) -> bool:
        """Keep and pin a kernel that was verified elsewhere; False, and nothing changed, if there is no room for it."""
        entries, identity = self._entries, kernel.artifact_id
        frozen = kernel.template.place()
        with entries.lock:
            if entries.find(identity) is None:
                if kernel.size_bytes > entries.max_bytes:
                    return False
                try:
                    entries.insert(frozen)
                except KernelCacheFullError:
                    return False
            entries.pins[identity] = entries.pins.get(identity, 0) + 1
        return True

    def held(self, artifact_id: str) -> LoadedKernel | None:
        """The cached kernel with this full id, or None; not counted as a request."""
        with self._entries.lock:
            return self._entries.find(artifact_id)

    def clear_cache(self) -> Cleared:
        """Drop every kernel that is not in use. Counters stay."""
        entries = self._entries
        with entries.lock:
            loose = [artifact_id for artifact_id in entries.kernels if artifact_id not in entries.pins]
            for artifact_id in loose:
                entries.remove(artifact_id)
            return Cleared(removed=len(loose), pinned=len(entries.kernels))

    # ---- questions ---------------------------------------------------------------------------------------------

    def get_cache_stats(self) -> dict[str, Any]:
        """`cache_hit_rate` (0 to 1; 0 before the first request), `cache_hits`, `cache_misses`: of this view.
        `cache_size_mb`, `cache_entries`: of the whole cache."""
        entries = self._entries
        with entries.lock:
            requests = self._hits + self._misses
            return {
                "cache_hit_rate": self._hits / requests if requests else 0.0,
                "cache_hits": self._hits,
                "cache_misses": self._misses,
                "cache_size_mb": entries.bytes / MB,
                "cache_entries": len(entries.kernels),
            }

    @property
    def evictions(self) -> int:
        """How many kernels have made room for others, in the whole cache."""
        return self._entries.evictions

    @property
    def source(self) -> KernelSource | None:
        return self._source

    @property
    def max_cache_size_mb(self) -> float:
        """The budget of the whole cache, in MB of 2**20 bytes."""
        return self._entries.max_bytes / MB

    @property
    def max_entries(self) -> int:
        return self._entries.max_entries

    def __contains__(self, artifact_id: str) -> bool:
        """Whether the kernel with this full id is cached; not counted as a request."""
        return artifact_id in self._entries.kernels

    def __len__(self) -> int:
        return len(self._entries.kernels)

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        """A copied model uses the same cache: its kernels are shared and immutable."""
        return self


def _is_full_id(reference: str) -> bool:
    return len(reference) == 64 and all(letter in "0123456789abcdef" for letter in reference)


def _until_done(future: asyncio.Future[LoadedKernel]) -> Callable[[], bool]:
    return lambda: not future.done()
