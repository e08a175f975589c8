"""Kernels for the execution side: from the local disk, or else from Urza."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from esper.artifacts import Signature, TrustStore
from esper.execution.sources import FetchedKernel, KernelSourceError, UnknownKernelError
from esper.services.errors import UrzaUnavailableError
from esper.services.names import is_full_id
from esper.services.store_source import source_errors
from esper.services.urza_client.client import UrzaClient
from esper.services.urza_client.disk_cache import DiskCache
from esper.services.urza_client.remote_store import RemoteStore

__all__ = ["RemoteKernelSource"]

_log = logging.getLogger(__name__)
_AT_ONCE = 8


class RemoteKernelSource:
    """A :class:`~esper.execution.sources.KernelSource` over a remote store, with what was fetched kept on disk.

    While Urza is away, or with `urza.client.offline`, kernels on the disk can be loaded, also by the names and prefixes
    that they were found under before.
    """

    def __init__(self, store: RemoteStore, trust: Callable[[], TrustStore]) -> None:
        self._store = store
        self._trust = trust
        settings = store.settings.client
        self.disk = DiskCache(settings.cache_folder, settings.cache_mb)

    def __deepcopy__(self, memo: object) -> RemoteKernelSource:
        return self  # a copied model finds its kernels where the original does

    def resolve(self, reference: str) -> str:
        """See :class:`~esper.execution.sources.KernelSource`."""
        if is_full_id(reference) and self._kept(reference) is not None:
            return reference
        with source_errors():
            try:
                artifact_id = self._store.kernels.resolve(reference)
            except UrzaUnavailableError as away:
                known = (self.disk.fact(f"reference {reference}") or {}).get("id")
                if known is None:
                    raise
                _log.warning("%r is taken for %s, as it was before: %s", reference, known, away)
                return known
        self.disk.note(f"reference {reference}", {"id": artifact_id})
        return artifact_id

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """See :class:`~esper.execution.sources.KernelSource`."""
        kept = self._kept(artifact_id)
        if kept is not None:
            return kept
        with source_errors():
            data, signature = self._store.kernels.content(artifact_id)
        self._keep(data, signature)
        return FetchedKernel(data, signature)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """See :class:`~esper.execution.sources.KernelSource`. Asks whether there is a newer one than on the disk."""
        key = f"attachment {artifact_id} {target_key}"
        digest = (self.disk.fact(key) or {}).get("digest")
        known = None if digest is None else self.disk.get(digest)
        with source_errors():
            try:
                found = self._store.ask(lambda client: client.attachment(artifact_id, target_key, known))
            except UrzaUnavailableError as away:
                _log.info("the attachment on the disk is used, if there is one: %s", away)
                return known
        if found is not None and found is not known:
            self.disk.note(key, {"digest": self.disk.put(found)})
        return found

    def trust(self) -> TrustStore:
        """The keys that the platform trusts."""
        with source_errors():
            return self._trust()

    def prefetch(self, references: Iterable[str]) -> dict[str, str | KernelSourceError]:
        """Have kernels on the disk before they are asked for: the id of each, or why it cannot be had."""
        wanted = list(dict.fromkeys(references))
        outcomes: dict[str, str | KernelSourceError] = {}

        async def work(client: UrzaClient) -> None:
            turns = asyncio.Semaphore(_AT_ONCE)

            async def one(reference: str) -> None:
                async with turns:
                    try:
                        with source_errors():
                            kernel = await client.kernel(reference)
                            if self.disk.get(kernel.id) is None:
                                self._keep(*await client.content(kernel.id))
                    except KernelSourceError as error:
                        outcomes[reference] = error
                    else:
                        self.disk.note(f"reference {reference}", {"id": kernel.id})
                        outcomes[reference] = kernel.id

            await asyncio.gather(*map(one, wanted))

        with source_errors():
            self._store.ask(work)
        return {reference: outcomes[reference] for reference in wanted}

    def _keep(self, data: bytes, signature: Signature | None) -> None:
        digest = self.disk.put(data)
        self.disk.note(f"signature {digest}", {"signature": None if signature is None else signature.to_json()})

    def _kept(self, artifact_id: str) -> FetchedKernel | None:
        if not is_full_id(artifact_id):
            raise UnknownKernelError(f"{artifact_id[:80]!r} is not the full id of a kernel")
        fact = self.disk.fact(f"signature {artifact_id}")
        data = None if fact is None else self.disk.get(artifact_id)
        if data is None or fact is None:
            return None
        text = fact.get("signature")
        return FetchedKernel(data, None if text is None else Signature.from_json(text))
