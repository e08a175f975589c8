"""The protocol between a worker and its child process.

The worker writes one line of JSON, a :class:`ChildRequest`, to the child's standard input and keeps it open: its end
tells the child that the worker is gone. The child leaves its results as files in the request's folder; `RESULT` comes
last and by renaming, so it is whole or not there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from esper.contracts.validation import ValidationReport
from esper.services.contracts import KernelMetadata

__all__ = ["ARTIFACT", "ATTACHMENT", "BLUEPRINT", "LOG", "RESULT", "ChildRequest", "ChildResult"]

BLUEPRINT = "blueprint.json"
"""Written by the worker: the blueprint's canonical JSON."""
ARTIFACT = "artifact.safetensors"
ATTACHMENT = "attachment.payload"
RESULT = "result.json"
LOG = "log.txt"
"""What the child and its compilers print."""


class ChildRequest(BaseModel):
    """What to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    pipeline: Literal["fast", "standard", "aggressive"]
    data_bytes: int
    cpu_seconds: int


class ChildResult(BaseModel):
    """What came of it. `metadata` is there if `ARTIFACT` is, `target` if `ATTACHMENT` is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: ValidationReport
    metadata: KernelMetadata | None = None
    target: dict[str, Any] | None = None
    """`esper.artifacts.Target` as JSON."""
