"""Signed kernels in a real store, put there without Tezzeret: tests of execution need many, and no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from esper import Blueprint, Platform
from esper.artifacts import Artifact, Attachment, SigningKey, Target, artifact_message, build_artifact
from esper.compiler.attachment import read_payload, with_latencies
from esper.contracts.validation import ValidationReport
from esper.services.contracts import BlueprintStatus, KernelMetadata

__all__ = ["COMPILED", "KernelShelf", "compiled_code"]

COMPILED = {
    "bottleneck": Blueprint.bottleneck(8, 6, rank=3, start="kaiming", activation="tanh"),
    "gated": Blueprint.gated_mlp(8, 6, hidden=5, start="kaiming"),
    "identity": Blueprint.bottleneck(8, 6, rank=2, start="identity"),
}
"""Kernels that the platform of the fixture `compiled` has compiled; the last one reads the host's output."""


class KernelShelf:
    """An embedded platform in `root` and a way to put a blueprint's kernel into its store at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.platform = Platform.embedded(root)
        self._key = SigningKey.load_or_create(root / "signing.pem")  # the platform's own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.platform.close()

    def put(self, blueprint: Blueprint) -> Artifact:
        """Build, sign and store the kernel of `blueprint`; it can be loaded by the artifact's id."""
        artifact = build_artifact(blueprint)
        store = self.platform.store
        record = store.blueprints.submit(blueprint)
        report = ValidationReport(blueprint_id=record.id, pipeline="fast", passed=True, artifact_id=artifact.id)
        store.kernels.add(
            artifact.data,
            self._key.sign(artifact_message(artifact.id)),
            blueprint_id=record.id,
            metadata=KernelMetadata(
                in_features=artifact.graph.in_features,
                out_features=artifact.graph.out_features,
                dtype=artifact.graph.dtype,
                uses_host=artifact.graph.uses_host,
                parameter_count=sum(tensor.numel() for tensor in artifact.tensors.values()),
                node_count=max(len(artifact.graph.nodes), 1),
                graph_digest=artifact.graph.digest,
            ),
            report=report,
        )
        claim = store.blueprints.claim("shelf", blueprint_id=record.id)
        if claim is not None:  # else it was put here before; what waits would be compiled before anything that is asked
            store.blueprints.set_status(
                record.id, BlueprintStatus.VALIDATED, token=claim.token, report=report, artifact_id=artifact.id
            )
        return artifact

    def attach(self, artifact_id: str, compiled_code: bytes, *latencies: tuple[int, float, float]) -> None:
        """Store compiled code for a kernel, with rows and times of graph and code as its worker would have found them.

        Without any, the code is said to be faster for any number of rows.
        """
        payload = with_latencies(compiled_code, latencies or ((2, 100.0, 1.0),))
        self.store_attachment(Attachment.create(artifact_id, Target.current("cpu"), payload, self._key))

    def store_attachment(self, attachment: Attachment) -> None:
        """Store an attachment as it is, whoever signed it."""
        self.platform.store.kernels.add_attachment(attachment)


def compiled_code(platform: Platform, artifact_id: str) -> bytes:
    """What a platform's worker has compiled for a kernel."""
    packed = platform.kernel_source.attachment(artifact_id, Target.current("cpu").key)
    assert packed is not None
    return read_payload(Attachment.unpack(packed).payload)[1]
