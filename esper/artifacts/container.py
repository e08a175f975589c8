"""Artifacts: a kernel as one safetensors file whose name is the SHA-256 of its bytes.

The tensors are the weights. One metadata entry, :data:`MANIFEST_KEY`, holds the canonical JSON manifest: schema
version, graph and provenance. Nothing goes in that differs from run to run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from esper.artifacts.document import Json
from esper.artifacts.graph import KernelGraph

__all__ = ["ID_PATTERN", "MANIFEST_KEY", "SCHEMA", "Artifact", "artifact_id"]

SCHEMA = 1
MANIFEST_KEY = "esper"
ID_PATTERN = r"[0-9a-f]{64}"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A kernel that passed every check. `data` is the file, `id` the hex SHA-256 of it; equal ids, equal artifacts."""

    id: str
    data: bytes = field(repr=False)
    graph: KernelGraph = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    manifest: Mapping[str, Json] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def in_features(self) -> int:
        """The size of the kernel's input."""
        return self.graph.in_features

    @property
    def out_features(self) -> int:
        """The size of the kernel's output."""
        return self.graph.out_features

    @property
    def blueprint_id(self) -> str:
        """The id of the blueprint that the artifact was built from."""
        provenance = self.manifest["provenance"]
        assert isinstance(provenance, Mapping)
        return str(provenance["blueprint"])


def artifact_id(data: bytes) -> str:
    """The hex SHA-256 of an artifact's bytes."""
    return hashlib.sha256(data).hexdigest()
