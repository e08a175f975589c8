"""Kernels as data: blueprints, the operator table, the artifact file, signatures and attachments."""

from esper.artifacts.attachment import Attachment, Target
from esper.artifacts.blueprint import Blueprint
from esper.artifacts.building import build_artifact
from esper.artifacts.container import Artifact, artifact_id
from esper.artifacts.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactGraphError,
    ArtifactLimitError,
    AttachmentError,
    BlueprintError,
    SigningKeyError,
    UntrustedArtifactError,
)
from esper.artifacts.graph import KernelGraph, Node, TensorSpec
from esper.artifacts.limits import Limits
from esper.artifacts.loading import load_artifact
from esper.artifacts.operators import OPERATORS, Operator
from esper.artifacts.signing import (
    Signature,
    SigningKey,
    TrustStore,
    artifact_message,
    attachment_message,
    key_id,
)

__all__ = [
    "OPERATORS",
    "Artifact",
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactGraphError",
    "ArtifactLimitError",
    "Attachment",
    "AttachmentError",
    "Blueprint",
    "BlueprintError",
    "KernelGraph",
    "Limits",
    "Node",
    "Operator",
    "Signature",
    "SigningKey",
    "SigningKeyError",
    "Target",
    "TensorSpec",
    "TrustStore",
    "UntrustedArtifactError",
    "artifact_id",
    "artifact_message",
    "attachment_message",
    "build_artifact",
    "key_id",
    "load_artifact",
]
