"""Validation reports: what Tezzeret found out about a kernel, as a document that travels with the kernel's record."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AttachmentReport", "LatencyMeasurement", "ValidationCheck", "ValidationReport"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValidationCheck(_Frozen):
    """One check of a kernel: what was looked at, whether it held, and the numbers or the reason."""

    name: str
    passed: bool
    detail: str = ""


class LatencyMeasurement(_Frozen):
    """Median time of one forward without gradients, on one thread, for `rows` input rows."""

    rows: int = Field(ge=1)
    graph_us: float = Field(ge=0)
    """Microseconds for the kernel's graph run by PyTorch, operator by operator."""
    attachment_us: float | None = Field(default=None, ge=0)
    """Microseconds for the compiled attachment; None where there is none."""


class AttachmentReport(_Frozen):
    """Whether the kernel was compiled to machine code, and why not."""

    status: Literal["compiled", "unavailable"]
    target_key: str
    """`esper.artifacts.Target.key` of the toolchain and hardware."""
    detail: str = ""
    """Why there is none: for example that this machine has no working C++ compiler."""
    size_bytes: int | None = Field(default=None, ge=0)
    compile_seconds: float | None = Field(default=None, ge=0)
    """For all sets of options that were tried."""
    options: str = "default"
    """The set of Inductor's options that was kept: the fastest of those that were tried."""
    tried: dict[str, float | None] = Field(default_factory=dict)
    """Microseconds of one forward on the most rows that were tried, by set of options; None where it did not compile or
    did not agree with the graph."""


class ValidationReport(_Frozen):
    """The outcome of building, compiling and checking one blueprint. `passed` is what makes a kernel usable."""

    blueprint_id: str
    pipeline: str
    passed: bool
    reason: str = ""
    """Why it did not pass, for people; empty when it did."""
    artifact_id: str | None = None
    checks: tuple[ValidationCheck, ...] = ()
    attachment: AttachmentReport | None = None
    latencies: tuple[LatencyMeasurement, ...] = ()
    seconds: float = Field(default=0.0, ge=0)
    """Wall-clock time that the child process took, start included."""
    peak_memory_mb: float | None = Field(default=None, ge=0)
    """Highest resident size of the child and its own children that was seen, in MiB."""

    def failures(self) -> tuple[ValidationCheck, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.passed)
