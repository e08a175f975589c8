"""Messages on Oona: the envelope, the topics, and one payload model for each topic that Esper itself publishes.

All are frozen. Unknown keys are refused, so that a misspelt field is an error and not a silent default.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from esper.contracts.validation import ValidationReport

__all__ = [
    "BlueprintSubmitted",
    "GrowthReport",
    "HealthSignal",
    "KernelCharacterized",
    "KernelReady",
    "OonaMessage",
    "SeedReport",
    "TopicNames",
]


class TopicNames(StrEnum):
    """Every topic. A member is its own string: `TopicNames.SYSTEM_EVENTS_EPOCH == "system.events.epoch"`."""

    TELEMETRY_SEED_HEALTH = "telemetry.seed.health"
    CONTROL_KASMINA_COMMANDS = "control.kasmina.commands"
    CONTROL_KASMINA_OUTCOMES = "control.kasmina.outcomes"
    COMPILATION_BLUEPRINT_SUBMITTED = "compilation.blueprint.submitted"
    COMPILATION_KERNEL_READY = "compilation.kernel.ready"
    VALIDATION_KERNEL_CHARACTERIZED = "validation.kernel.characterized"
    SYSTEM_EVENTS_EPOCH = "system.events.epoch"
    INNOVATION_FIELD_REPORTS = "innovation.field_reports"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _new_id() -> str:
    return uuid.uuid4().hex


class OonaMessage(_Message):
    """The envelope of everything on Oona."""

    event_id: str = Field(default_factory=_new_id, min_length=1)
    """Unique for each message; consumers drop a message whose id they have handled."""
    sender_id: str = Field(min_length=1)
    timestamp: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it was published, with a time zone."""
    trace_id: str = Field(default_factory=_new_id, min_length=1)
    """Shared by the messages that one cause led to."""
    topic: str = Field(min_length=1)
    payload: dict[str, JsonValue] = Field(default_factory=dict)
    """JSON of the topic's payload model; not to be changed."""


class HealthSignal(_Message):
    """`telemetry.seed.health`: the state of one layer, sent every 100 executions."""

    layer_id: int = Field(ge=0)
    """The layer's number in its model, in the order of the model's sites."""
    layer_name: str
    """The layer's dotted name in the host."""
    seed_count: int = Field(ge=0)
    active_seed_count: int = Field(ge=0)
    avg_execution_latency_μs: float = Field(ge=0)
    """Microseconds, averaged over sampled executions."""
    cache_hit_rate: float = Field(ge=0, le=1)
    error_count: int = Field(ge=0)
    memory_usage_mb: float = Field(ge=0)
    """MiB that the layer's loaded kernels take."""


class SeedReport(_Message):
    """`innovation.field_reports`: what became of one seed, for example that a kernel could not be loaded."""

    layer_id: int = Field(ge=0)
    layer_name: str
    seed_idx: int = Field(ge=0)
    state: str
    """Name of the seed's lifecycle state after the event."""
    error_count: int = Field(default=0, ge=0)
    reason: str = ""


class GrowthReport(_Message):
    """`system.events.epoch`: a decision of an `esper.Grower`, with its numbers; see its `GrowthRecord`."""

    step: int = Field(ge=0)
    event: str
    layer: str = ""
    seed: int | None = None
    width: int | None = None
    parameters: int = Field(default=0, ge=0)
    gain: float | None = None
    host_gain: float | None = None
    loss: float | None = None
    loss_with: float | None = None
    loss_without: float | None = None
    seconds: float = Field(default=0.0, ge=0)
    compute_share: float | None = None
    reason: str = ""


class BlueprintSubmitted(_Message):
    """`compilation.blueprint.submitted`."""

    blueprint_id: str
    name: str | None = None


class KernelReady(_Message):
    """`compilation.kernel.ready`: a validated kernel is in the store and can be loaded."""

    blueprint_id: str
    artifact_id: str
    name: str | None = None
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    dtype: str
    size_bytes: int = Field(ge=0)


class KernelCharacterized(_Message):
    """`validation.kernel.characterized`: a blueprint's compilation has ended; `report.passed` says how."""

    blueprint_id: str
    artifact_id: str | None = None
    report: ValidationReport
