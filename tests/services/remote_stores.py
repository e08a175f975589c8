"""What tests of Urza's client share: clients of a server, and kernels put into any store."""

from __future__ import annotations

from typing import Any

from esper.artifacts import Artifact, Signature, SigningKey, Target
from esper.configs import UrzaConfig
from esper.contracts.validation import AttachmentReport, LatencyMeasurement, ValidationCheck, ValidationReport
from esper.services.contracts import Claim, CompiledKernelArtifact, KernelMetadata
from esper.services.stores import Store
from esper.services.urza_client import RemoteStore
from tests.services.urza_server import RunningUrza

__all__ = ["KEY", "NOBODY", "TARGET", "add", "claimed", "remote_of", "report_of"]

KEY = SigningKey.generate()
TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")
NOBODY = "0" * 64


def remote_of(urza: RunningUrza, **fields: Any) -> RemoteStore:
    return RemoteStore(UrzaConfig.model_validate({"url": urza.url, **fields}))


def report_of(artifact: Artifact) -> ValidationReport:
    """One with something in every field."""
    return ValidationReport(
        blueprint_id=artifact.blueprint_id,
        pipeline="fast",
        passed=True,
        artifact_id=artifact.id,
        checks=(ValidationCheck(name="shapes", passed=True, detail="1, 7 and 33 rows → all well"),),
        attachment=AttachmentReport(
            status="compiled",
            target_key=TARGET.key,
            size_bytes=12,
            compile_seconds=1.5,
            tried={"default": 1e-3, "x": None},
        ),
        latencies=(
            LatencyMeasurement(rows=32, graph_us=10.125, attachment_us=3.3),
            LatencyMeasurement(rows=1, graph_us=1),
        ),
        seconds=0.1 + 0.2,
        peak_memory_mb=123.456,
    )


def claimed(store: Store, blueprint_id: str) -> Claim:
    claim = store.blueprints.claim("a test", blueprint_id=blueprint_id)
    assert claim is not None
    return claim


def add(
    store: Store, artifact: Artifact, signature: Signature | None, report: ValidationReport
) -> CompiledKernelArtifact:
    return store.kernels.add(
        artifact.data,
        signature,
        blueprint_id=artifact.blueprint_id,
        metadata=KernelMetadata.of(artifact.graph),
        report=report,
    )
