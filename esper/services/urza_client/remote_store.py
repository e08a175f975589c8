"""A store that is elsewhere, for code that is not async: `esper.services.stores.Store` over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from esper.artifacts import Attachment, Blueprint, Signature
from esper.configs import UrzaConfig
from esper.contracts.validation import ValidationReport
from esper.forking import reset_after_fork
from esper.services import references
from esper.services.contracts import (
    BlueprintRecord,
    BlueprintStatus,
    Claim,
    CompiledKernelArtifact,
    KernelMetadata,
    KernelQuery,
    KernelStatus,
    StoreStats,
)
from esper.services.errors import UrzaUnavailableError
from esper.services.stores import LEASE_SECONDS
from esper.services.urza_client.client import UrzaClient
from esper.services.urza_client.loop_thread import LoopThread

__all__ = ["RemoteStore"]

_Result = TypeVar("_Result")


class RemoteStore:
    """Urza at `settings.url`. Blocking; for any thread but an event loop's, and for forked children.

    Connects at the first question. With `settings.client.offline` every question raises ``UrzaUnavailableError``.
    """

    def __init__(self, settings: UrzaConfig) -> None:
        self.settings = settings
        self.blueprints = RemoteBlueprints(self)
        self.kernels = RemoteKernels(self)
        self._thread = LoopThread()
        self._client: UrzaClient | None = None
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave the connections to the parent; see `esper.forking`."""
        self._client = None

    def ask(
        self, question: Callable[[UrzaClient], Coroutine[Any, Any, _Result]], seconds: float | None = None
    ) -> _Result:
        """The result of `question(client)`, which runs on the client's own thread.

        Without an answer within `seconds` it raises ``UrzaUnavailableError``, however patient the client is.
        """
        if self.settings.client.offline:
            raise UrzaUnavailableError("urza.client.offline is set: only kernels downloaded before can be used")
        try:
            return self._thread.run(self._asked(question), seconds)
        except CancelledError as cause:
            raise UrzaUnavailableError(f"the store at {self.settings.url} was closed while it was asked") from cause
        except TimeoutError as cause:
            raise UrzaUnavailableError(f"Urza at {self.settings.url} has not answered within {seconds} s") from cause

    async def _asked(self, question: Callable[[UrzaClient], Coroutine[Any, Any, _Result]]) -> _Result:
        if self._client is None:
            self._client = UrzaClient(self.settings)
        return await question(self._client)

    def stats(self) -> StoreStats:
        """Counts and sizes; for a worker's token."""
        return self.ask(lambda client: client.stats())

    def close(self) -> None:
        """Close the connections and end the thread. What others ask just then fails; another question starts anew."""
        self._thread.stop(self._close_client)

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class RemoteBlueprints:
    """See :class:`~esper.services.stores.BlueprintStore`."""

    def __init__(self, store: RemoteStore) -> None:
        self._ask = store.ask

    def submit(self, blueprint: Blueprint, name: str | None = None) -> BlueprintRecord:
        return self._ask(lambda client: client.submit(blueprint, name))

    def get(self, blueprint_id: str) -> BlueprintRecord:
        return self._ask(lambda client: client.blueprint(blueprint_id))

    def document(self, blueprint_id: str) -> bytes:
        return self._ask(lambda client: client.document(blueprint_id))

    def list(self, status_filter: BlueprintStatus | None = None, limit: int = 100) -> tuple[BlueprintRecord, ...]:
        return self._ask(lambda client: client.blueprints(status_filter, limit))

    def claim(
        self, worker: str, *, lease_seconds: float = LEASE_SECONDS, blueprint_id: str | None = None
    ) -> Claim | None:
        return self._ask(lambda client: client.claim(worker, lease_seconds=lease_seconds, blueprint_id=blueprint_id))

    def renew(self, claim: Claim, *, lease_seconds: float = LEASE_SECONDS) -> Claim:
        return self._ask(lambda client: client.renew(claim, lease_seconds=lease_seconds))

    def release(self, claim: Claim) -> None:
        self._ask(lambda client: client.release(claim))

    def set_status(
        self,
        blueprint_id: str,
        status: BlueprintStatus,
        *,
        token: str,
        reason: str = "",
        report: ValidationReport | None = None,
        artifact_id: str | None = None,
    ) -> BlueprintRecord:
        return self._ask(
            lambda client: client.set_status(
                blueprint_id, status, token=token, reason=reason, report=report, artifact_id=artifact_id
            )
        )

    def recompile(self, blueprint_id: str, signers: Collection[str] = ()) -> BlueprintRecord:
        return self._ask(lambda client: client.recompile(blueprint_id, signers))

    def forget(self, blueprint_id: str) -> None:
        self._ask(lambda client: client.forget(blueprint_id))

    def next_lease_end(self) -> float | None:
        return self._ask(lambda client: client.next_lease_end())


class RemoteKernels:
    """See :class:`~esper.services.stores.KernelStore`."""

    def __init__(self, store: RemoteStore) -> None:
        self._ask = store.ask

    def add(
        self,
        data: bytes,
        signature: Signature | None,
        *,
        blueprint_id: str,
        metadata: KernelMetadata,
        report: ValidationReport,
    ) -> CompiledKernelArtifact:
        return self._ask(
            lambda client: client.add_kernel(
                data, signature, blueprint_id=blueprint_id, metadata=metadata, report=report
            )
        )

    def add_attachment(self, attachment: Attachment) -> None:
        self._ask(lambda client: client.add_attachment(attachment))

    def get(self, artifact_id: str) -> CompiledKernelArtifact:
        full = references.kernel_id(artifact_id)  # the route takes names and prefixes as well
        return self._ask(lambda client: client.kernel(full))

    def content(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]]:
        return self._ask(lambda client: client.content(artifact_id))

    def signatures(self, artifact_id: str) -> tuple[Signature, ...]:
        return tuple(each.signature() for each in self.get(artifact_id).signatures)

    def attachment(self, artifact_id: str, target_key: str, signers: Collection[str] | None = None) -> bytes | None:
        return self._ask(lambda client: client.attachment(artifact_id, target_key, None, signers or ()))

    def set_status(self, artifact_id: str, status: KernelStatus) -> CompiledKernelArtifact:
        return self._ask(lambda client: client.set_kernel_status(artifact_id, status))

    def resolve(self, reference: str) -> str:
        return self._ask(lambda client: client.kernel(reference)).id

    def query(self, query: KernelQuery) -> tuple[CompiledKernelArtifact, ...]:
        return self._ask(lambda client: client.query(query))
