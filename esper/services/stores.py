"""The interface of a store of blueprints and kernels, wherever it is: here, or behind Urza's HTTP interface.

All methods block, and may be called on any thread. They raise :class:`~esper.services.errors.StoreError` or a subclass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from esper.artifacts import Attachment, Blueprint, Signature
from esper.contracts.validation import ValidationReport
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

__all__ = ["LEASE_SECONDS", "BlueprintStore", "KernelFile", "KernelStore", "ManyKernels", "Store"]

LEASE_SECONDS = 30.0
"""How long a claim holds unless it is renewed."""


class BlueprintStore(Protocol):
    """Blueprints, and who compiles them; see `esper.services.urza.storage.blueprints.BlueprintRecords`."""

    def submit(self, blueprint: Blueprint, name: str | None = None) -> BlueprintRecord: ...

    def get(self, blueprint_id: str) -> BlueprintRecord: ...

    def document(self, blueprint_id: str) -> bytes: ...

    def list(self, status_filter: BlueprintStatus | None = None, limit: int = 100) -> tuple[BlueprintRecord, ...]: ...

    def claim(
        self, worker: str, *, lease_seconds: float = LEASE_SECONDS, blueprint_id: str | None = None
    ) -> Claim | None: ...

    def renew(self, claim: Claim, *, lease_seconds: float = LEASE_SECONDS) -> Claim: ...

    def release(self, claim: Claim) -> None: ...

    def set_status(
        self,
        blueprint_id: str,
        status: BlueprintStatus,
        *,
        token: str,
        reason: str = "",
        report: ValidationReport | None = None,
        artifact_id: str | None = None,
    ) -> BlueprintRecord: ...

    def recompile(self, blueprint_id: str, signers: Collection[str] = ()) -> BlueprintRecord: ...

    def forget(self, blueprint_id: str) -> None: ...

    def next_lease_end(self) -> float | None: ...


class KernelStore(Protocol):
    """Kernels; see `esper.services.urza.storage.kernels.KernelRecords`."""

    def add(
        self,
        data: bytes,
        signature: Signature | None,
        *,
        blueprint_id: str,
        metadata: KernelMetadata,
        report: ValidationReport,
    ) -> CompiledKernelArtifact: ...

    def add_attachment(self, attachment: Attachment) -> None: ...

    def get(self, artifact_id: str) -> CompiledKernelArtifact: ...

    def content(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]]: ...

    def signatures(self, artifact_id: str) -> tuple[Signature, ...]: ...

    def attachment(self, artifact_id: str, target_key: str, signers: Collection[str] | None = None) -> bytes | None: ...

    def set_status(self, artifact_id: str, status: KernelStatus) -> CompiledKernelArtifact: ...

    def resolve(self, reference: str) -> str: ...

    def query(self, query: KernelQuery) -> tuple[CompiledKernelArtifact, ...]: ...


class KernelFile(NamedTuple):
    """What is to be known of an artifact's file before it is read: its size in bytes, and its signatures, unchecked."""

    size: int
    signatures: tuple[Signature, ...]


@runtime_checkable
class ManyKernels(Protocol):
    """Kernels that are found in one go, where they are at hand, and read one by one."""

    def files(self, artifact_ids: Sequence[str]) -> dict[str, KernelFile]: ...

    def read(self, artifact_id: str, file: KernelFile) -> bytes: ...


class Store(Protocol):
    """`esper.services.urza.UrzaStore`, or the client of one that is elsewhere."""

    @property
    def blueprints(self) -> BlueprintStore: ...

    @property
    def kernels(self) -> KernelStore: ...

    def stats(self) -> StoreStats: ...

    def close(self) -> None: ...
