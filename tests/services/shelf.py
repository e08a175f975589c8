"""Small blueprints, and kernels stored without compiling them, for tests of the store."""

from __future__ import annotations

import time

from sqlalchemy import insert

from esper.artifacts import Artifact, Blueprint, SigningKey, artifact_message, build_artifact
from esper.contracts.validation import LatencyMeasurement, ValidationReport
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact, KernelMetadata
from esper.services.stores import Store
from esper.services.urza import UrzaStore
from esper.services.urza.storage.models import BlueprintRow

__all__ = ["add_kernel", "blueprint", "exponential", "fill"]


def blueprint(seed: int = 0, width: int = 4) -> Blueprint:
    """A small blueprint; another seed is another content."""
    return Blueprint.bottleneck(width, width, 2, start="kaiming", seed=seed)


def exponential() -> Blueprint:
    """A blueprint that is well formed and that no validation lets pass: its output overflows on large inputs."""
    return Blueprint.from_json(
        {
            "schema": 1,
            "family": "graph",
            "graph": {
                "in_features": 4,
                "out_features": 4,
                "dtype": "float32",
                "tensors": [],
                "nodes": [{"name": "y", "op": "exp", "inputs": ["x"], "attributes": {}}],
                "output": "y",
            },
            "tensors": {},
            "seed": 0,
        }
    )


def fill(store: UrzaStore, count: int, at_once: int = 1) -> list[str]:
    """Waiting blueprints, written straight into the table, so many of each moment; their ids as they were submitted."""
    ids = [f"{number:064x}" for number in range(count)]
    now = time.time() - count
    rows = [
        {
            "id": each, "document": each, "status": "unvalidated", "reason": "", "attempts": 0,
            "submitted_at": now + number // at_once, "updated_at": now,
        }
        for number, each in enumerate(ids)
    ]  # fmt: skip
    with store.database.writing() as session:
        session.execute(insert(BlueprintRow), rows)
    return ids


def add_kernel(
    store: Store,
    of: Blueprint,
    name: str | None = None,
    *,
    key: SigningKey | None = None,
    latencies: tuple[LatencyMeasurement, ...] = (),
) -> tuple[Artifact, CompiledKernelArtifact]:
    """Submit `of` and do for it what a worker does when all goes well, except for compiling and measuring."""
    store.blueprints.submit(of, name)
    claim = store.blueprints.claim("a test", blueprint_id=of.id)
    assert claim is not None
    artifact = build_artifact(of)
    report = ValidationReport(
        blueprint_id=of.id, pipeline="fast", passed=True, artifact_id=artifact.id, latencies=latencies
    )
    metadata = KernelMetadata.of(artifact.graph)
    signature = (key or SigningKey.generate()).sign(artifact_message(artifact.id))
    kernel = store.kernels.add(artifact.data, signature, blueprint_id=of.id, metadata=metadata, report=report)
    store.blueprints.set_status(
        of.id, BlueprintStatus.VALIDATED, token=claim.token, report=report, artifact_id=artifact.id
    )
    return artifact, kernel
