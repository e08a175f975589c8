"""Kernels for the execution side: from the local disk, or else from Urza."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from esper.artifacts import Signature, TrustStore, artifact_message
from esper.execution.sources import FetchedKernel, KernelSourceError, UnknownKernelError
from esper.services.errors import StoreError, UrzaProtocolError, UrzaUnavailableError
from esper.services.ids import is_full_id
from esper.services.store_source import StoreKernelSource, best_signature, source_errors
from esper.services.urza_client.disk_cache import DiskCache
from esper.services.urza_client.store import RemoteStore

__all__ = ["RemoteKernelSource"]

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_AT_ONCE = 8
_PATIENCE = 2.0  # seconds, with a store that is asked for news of what is on the disk
_PATIENCE_FOR_CODE = 5.0  # as above, where it is asked for compiled code, which is never needed, of what is on the disk
_ANSWERS = (
    LookupError,
    ValueError,
    PermissionError,
    UrzaProtocolError,
)  # not for a while, and not for lack of a server


class RemoteKernelSource(StoreKernelSource):
    """A :class:`~esper.execution.sources.KernelSource` over a remote store, with what was fetched kept on disk.

    While Urza is away or in trouble, or with `urza.client.offline`, kernels on the disk can be loaded, also by the
    names and prefixes that they were found under before. For any thread.
    """

    def __init__(self, store: RemoteStore, trust: Callable[[], TrustStore]) -> None:
        super().__init__(lambda: store, trust)
        self._remote = store
        settings = store.settings.client
        self.disk = DiskCache(settings.cache_folder, settings.cache_mb)

    def resolve(self, reference: str) -> str:
        """See :class:`~esper.execution.sources.KernelSource`."""
        if is_full_id(reference) and reference in self.disk:
            return reference
        key = f"reference {reference}"
        known = (self.disk.fact(key) or {}).get("id")
        seconds = None if known is None else _PATIENCE
        try:
            with source_errors():
                artifact_id = self._within(seconds, lambda: self._remote.kernels.resolve(reference))
        except KernelSourceError as error:
            if known is None or not _is_trouble(error):
                raise self._explained(error, repr(reference)) from error.__cause__
            _log.warning("%r is taken for %s, as it was before: %s", reference, known, error)
            return known
        self.disk.note(key, {"id": artifact_id})
        return artifact_id

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """See :class:`~esper.execution.sources.KernelSource`."""
        kept = self._kept(artifact_id)
        if kept is not None and self._chosen(artifact_id, kept[1]) is not None:
            return FetchedKernel(kept[0], self._chosen(artifact_id, kept[1]))
        try:
            with source_errors():
                if kept is None:
                    data, signatures = self._remote.kernels.content(artifact_id)
                else:  # somebody whom we trust may have signed it since
                    data, signatures = kept[0], self._remote.kernels.signatures(artifact_id)
        except KernelSourceError as error:
            if kept is None or not _is_trouble(error):
                raise self._explained(error, f"kernel {artifact_id}") from error.__cause__
            data, signatures = kept
        if kept is None:
            self.disk.put(data, artifact_id)
        self.disk.note(_signatures_of(artifact_id), {"signatures": json.dumps([each.to_json() for each in signatures])})
        with source_errors():
            return FetchedKernel(data, best_signature(self._trust(), artifact_id, signatures))

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """See :class:`~esper.execution.sources.KernelSource`. Asks if there is a newer one than on the disk."""
        key = f"attachment {artifact_id} {target_key}"
        digest = (self.disk.fact(key) or {}).get("digest")
        known = None if digest is None else self.disk.get(digest)
        seconds = _PATIENCE if known is not None else _PATIENCE_FOR_CODE if artifact_id in self.disk else None
        try:
            with source_errors():
                signers = self._trust().key_ids
                found = self._within(
                    seconds, lambda: self._remote.kernels.attachment(artifact_id, target_key, signers, known=known)
                )
        except KernelSourceError as error:
            if not _is_trouble(error):
                raise
            _log.info("the attachment on the disk is used, if there is one: %s", error)
            return known
        if found is not None and found is not known:
            self.disk.note(key, {"digest": self.disk.put(found)})
        return found

    def prefetch(self, references: Iterable[str], target_key: str | None = None) -> dict[str, str | KernelSourceError]:
        """Have kernels on the disk before they are asked for: the id of each, or why it is not there. Blocks.

        With a `target_key` (`esper.artifacts.Target.key`) their compiled code for it as well, where there is some.
        """
        wanted = list(dict.fromkeys(references))

        def one(reference: str) -> str | KernelSourceError:
            try:
                artifact_id = self.resolve(reference)
                self.fetch(artifact_id)
                if target_key is not None:
                    self.attachment(artifact_id, target_key)
            except KernelSourceError as error:
                return error
            return artifact_id

        with ThreadPoolExecutor(_AT_ONCE, "esper-prefetch") as pool:
            outcomes = dict(zip(wanted, pool.map(one, wanted), strict=True))
        return {reference: self._on_disk(outcome) for reference, outcome in outcomes.items()}

    def _within(self, seconds: float | None, ask: Callable[[], _Result]) -> _Result:
        """What `ask` returns or raises; ``UrzaUnavailableError`` after `seconds`, however patient the client is."""
        if seconds is None:
            return ask()
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(ask())
            except BaseException as error:  # noqa: BLE001  # the future carries it to who asked
                future.set_exception(error)

        threading.Thread(target=run, name="esper-urza-news", daemon=True).start()
        try:
            return future.result(seconds)
        except TimeoutError as cause:
            url = self._remote.settings.url
            raise UrzaUnavailableError(f"Urza at {url} has not answered within {seconds} s") from cause

    def _on_disk(self, outcome: str | KernelSourceError) -> str | KernelSourceError:
        if isinstance(outcome, KernelSourceError) or outcome in self.disk:
            return outcome
        return KernelSourceError(
            f"kernel {outcome} can be fetched, but is not kept in {self.disk.folder}; make the folder writable, free "
            "some space, or raise urza.client.cache_mb"
        )

    def _explained(self, error: KernelSourceError, what: str) -> KernelSourceError:
        if not _is_trouble(error):
            return error
        return KernelSourceError(f"{error}; {what} is not in {self.disk.folder} either")

    def _kept(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]] | None:
        if not is_full_id(artifact_id):
            raise UnknownKernelError(f"{artifact_id[:80]!r} is not the full id of a kernel")
        fact = self.disk.fact(_signatures_of(artifact_id))
        data = None if fact is None else self.disk.get(artifact_id)
        if data is None or fact is None:
            return None
        return data, tuple(Signature.from_json(each) for each in json.loads(fact.get("signatures") or "[]"))

    def _chosen(self, artifact_id: str, signatures: Sequence[Signature]) -> Signature | None:
        with source_errors():
            return self._trust().choose(artifact_message(artifact_id), signatures)


def _signatures_of(artifact_id: str) -> str:
    return f"signatures {artifact_id}"


def _is_trouble(error: KernelSourceError) -> bool:
    """Whether Urza is away or failed, and has said nothing of the kernel."""
    return isinstance(error.__cause__, StoreError) and not isinstance(error.__cause__, _ANSWERS)
