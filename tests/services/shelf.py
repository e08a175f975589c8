"""Small blueprints, and kernels stored without compiling them, for tests of the store."""

from __future__ import annotations

from esper.artifacts import Artifact, Blueprint, SigningKey, artifact_message, build_artifact
from esper.contracts.validation import LatencyMeasurement, ValidationReport
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact, KernelMetadata
from esper.services.urza import UrzaStore

__all__ = ["add_kernel", "blueprint", "exponential"]


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


def add_kernel(
    store: UrzaStore,
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
