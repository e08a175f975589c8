"""Bodies of requests and answers, beside the documents of `esper.services.contracts`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from esper.contracts.validation import ValidationReport
from esper.services.contracts import (
    BlueprintRecord,
    BlueprintStatus,
    CompiledKernelArtifact,
    KernelMetadata,
    KernelQuery,
    KernelStatus,
    Text,
)
from esper.services.stores import LEASE_SECONDS

__all__ = [
    "BlueprintPage",
    "BlueprintStatusChange",
    "ClaimRelease",
    "ClaimRenewal",
    "ClaimRequest",
    "Health",
    "KernelPage",
    "KernelQueryRequest",
    "KernelStatusChange",
    "KernelUpload",
    "NextLeaseEnd",
    "RecompileRequest",
    "SubmissionRequest",
]

_DAY = 86_400.0

Lease = Annotated[float, Field(gt=0, le=_DAY, allow_inf_nan=False)]
Token = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WorkerName = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Reason = Annotated[Text, StringConstraints(max_length=100_000)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SubmissionRequest(_Request):
    """A blueprint to be compiled. Its order of keys and its spaces do not matter."""

    blueprint: dict[str, Any]
    """As `Blueprint.to_json` writes it."""
    name: str | None = None


class RecompileRequest(_Request):
    """Who does not trust those that signed a kernel asks for another signature."""

    signers: Annotated[tuple[Digest, ...], Field(max_length=1000)] = ()
    """Ids of the keys that are trusted: nothing is done if one of them has signed the kernel meanwhile."""


class BlueprintPage(_Request):
    """Blueprints, the latest first. `next_cursor` is null on the last page."""

    items: tuple[BlueprintRecord, ...]
    next_cursor: str | None


class KernelPage(_Request):
    """Kernels, the latest first. `next_cursor` is null on the last page."""

    items: tuple[CompiledKernelArtifact, ...]
    next_cursor: str | None


class KernelQueryRequest(KernelQuery):
    """Conditions that must all hold, and where to go on."""

    cursor: str | None = None
    """`next_cursor` of the page before."""


class ClaimRequest(_Request):
    """A worker asks for work."""

    worker: WorkerName
    lease_seconds: Lease = LEASE_SECONDS
    blueprint_id: Digest | None = None
    """Only this one; null for whichever has waited longest."""


class ClaimRenewal(_Request):
    """A worker goes on."""

    token: Token
    worker: WorkerName
    attempt: int = Field(ge=1, le=1000)
    lease_seconds: Lease = LEASE_SECONDS


class ClaimRelease(_Request):
    """A worker gives its blueprint back."""

    token: Token


class BlueprintStatusChange(_Request):
    """How a compilation ended."""

    status: BlueprintStatus
    token: Token
    reason: Reason = ""
    report: ValidationReport | None = None
    artifact_id: Digest | None = None


class KernelUpload(_Request):
    """The part `record` of an upload; the part `content` is the artifact's file."""

    blueprint_id: Digest
    metadata: KernelMetadata
    report: ValidationReport
    signature: dict[str, Any] | None = None
    """As `Signature.to_json` writes it."""


class KernelStatusChange(_Request):
    """Retire a kernel, or bring it back."""

    status: KernelStatus


class NextLeaseEnd(_Request):
    """Seconds until the first lease runs out; null if nothing is in work."""

    seconds: float | None


class Health(_Request):
    """Whether Urza runs (`live`) and can do its work (`ready`)."""

    status: str
    live: bool
    ready: bool
    schema_version: str
    detail: str
