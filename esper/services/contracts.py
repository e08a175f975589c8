"""Records of blueprints and kernels: the documents of Urza's interface."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from esper.contracts.validation import (
    AttachmentReport,
    LatencyMeasurement,
    ValidationCheck,
    ValidationReport,
)

if TYPE_CHECKING:
    from esper.artifacts import KernelGraph, Signature

__all__ = [
    "AttachmentReport",
    "BlueprintRecord",
    "BlueprintStatus",
    "Claim",
    "CompiledKernelArtifact",
    "KernelMetadata",
    "KernelQuery",
    "KernelSignature",
    "KernelStatus",
    "LatencyMeasurement",
    "StoreStats",
    "Text",
    "ValidationCheck",
    "ValidationReport",
]


_MAX_FEATURES = 2**31 - 1
_MAX_SIZE = 2**63 - 1

Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
"""Databases refuse the character NUL."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlueprintStatus(StrEnum):
    """`unvalidated -> compiling -> validated | invalid`; the last two are final."""

    UNVALIDATED = "unvalidated"
    COMPILING = "compiling"
    VALIDATED = "validated"
    INVALID = "invalid"

    @property
    def is_final(self) -> bool:
        return self in (BlueprintStatus.VALIDATED, BlueprintStatus.INVALID)


class KernelStatus(StrEnum):
    """Only kernels that passed validation are stored. A retired one is found by its full id only."""

    VALIDATED = "validated"
    RETIRED = "retired"


class KernelMetadata(_Document):
    """What a kernel is, read off its graph."""

    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    dtype: str
    uses_host: bool
    """Whether the kernel reads what the site has computed so far."""
    parameter_count: int = Field(ge=0)
    node_count: int = Field(ge=1)
    graph_digest: str
    """`KernelGraph.digest`: equal for kernels that differ in weights only."""

    @classmethod
    def of(cls, graph: KernelGraph) -> KernelMetadata:
        """Read off `graph`."""
        return cls(
            in_features=graph.in_features,
            out_features=graph.out_features,
            dtype=graph.dtype,
            uses_host=graph.uses_host,
            parameter_count=sum(spec.elements for spec in graph.tensors),
            node_count=len(graph.nodes),
            graph_digest=graph.digest,
        )


class BlueprintRecord(_Document):
    """A blueprint as the store knows it."""

    id: str
    names: tuple[str, ...] = ()
    status: BlueprintStatus
    reason: str = ""
    """Why it is invalid."""
    report: ValidationReport | None = None
    artifact_id: str | None = None
    """The kernel, once validated."""
    attempts: int = Field(default=0, ge=0)
    """How often a worker has claimed it."""
    lease_expires_at: AwareDatetime | None = None
    """While compiling: when another worker may claim it."""
    submitted_at: AwareDatetime
    updated_at: AwareDatetime

    def __repr__(self) -> str:
        """One line; all of it is in `model_dump()`."""
        named = f"{', '.join(self.names)}, " if self.names else ""
        kernel = f", kernel={self.artifact_id[:12]}" if self.artifact_id else ""
        why = f", reason={self.reason[:80]!r}" if self.reason else ""
        return f"BlueprintRecord({named}{self.status}{why}{kernel}, id={self.id[:12]})"

    __str__ = __repr__


class Claim(_Document):
    """A worker's hold on one blueprint. Whoever shows `token` may renew, finish or release it until it runs out."""

    blueprint_id: str
    token: str
    worker: str
    attempt: int = Field(ge=1)
    expires_at: AwareDatetime


class KernelSignature(_Document):
    """What one key's holder signed a kernel with, as `esper.artifacts.Signature` writes it. Not checked."""

    key_id: str
    value: str
    public_key: str | None = None

    @classmethod
    def of(cls, signature: Signature) -> KernelSignature:
        return cls(**signature.fields())

    def signature(self) -> Signature:
        """Raises ``UntrustedArtifactError`` if it is none."""
        from esper.artifacts import Signature  # which imports torch, for those who need it

        return Signature.from_json(self.model_dump_json(exclude_none=True))


class CompiledKernelArtifact(_Document):
    """A kernel in the store. `id` is the artifact id, the SHA-256 of its file."""

    id: str
    blueprint_id: str
    name: str | None = None
    """One of the names under which the blueprint was submitted: the first."""
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    dtype: str
    size_bytes: int = Field(ge=1)
    status: KernelStatus
    created_at: AwareDatetime
    metadata: KernelMetadata
    report: ValidationReport
    latency_us: float | None = None
    """Median microseconds of one forward at the smallest number of rows of at least 32 that was measured (or at the
    largest): the attachment's if there is one, else the graph's."""
    signatures: tuple[KernelSignature, ...] = ()
    """One of each key that signed it. It is for the reader to trust one of them."""
    attachments: tuple[str, ...] = ()
    """Target keys for which compiled code is stored."""

    def __repr__(self) -> str:
        """One line, with as much of the id as `load_kernel` needs; all of it is in `model_dump()`."""
        named = f"{self.name}, " if self.name else ""
        features = f"{self.in_features} -> {self.out_features}"
        return f"CompiledKernelArtifact({named}{features}, {self.dtype}, {self.status}, id={self.id[:12]})"

    __str__ = __repr__


class KernelQuery(_Document):
    """Conditions that must all hold; None asks for nothing."""

    in_features: int | None = Field(default=None, ge=1, le=_MAX_FEATURES)
    out_features: int | None = Field(default=None, ge=1, le=_MAX_FEATURES)
    dtype: Text | None = None
    blueprint_id: Text | None = None
    graph_digest: Text | None = None
    uses_host: bool | None = None
    max_size_bytes: int | None = Field(default=None, ge=1, le=_MAX_SIZE)
    max_latency_us: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    target_key: Text | None = None
    """Only kernels with an attachment for this target."""
    status: KernelStatus | None = KernelStatus.VALIDATED
    limit: int = Field(default=100, ge=1, le=1000)


class StoreStats(_Document):
    """What the store holds."""

    schema_version: str
    blueprints: dict[BlueprintStatus, int]
    kernels: int
    attachments: int
    artifact_bytes: int
    attachment_bytes: int
