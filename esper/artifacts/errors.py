"""Errors of artifacts, blueprints, keys and attachments.

All are :class:`ArtifactError`, hence :class:`~esper.errors.EsperError` and ``ValueError``. A message names the value
that was refused and the remedy.
"""

from __future__ import annotations

from esper.errors import EsperError

__all__ = [
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactGraphError",
    "ArtifactLimitError",
    "AttachmentError",
    "BlueprintError",
    "SigningKeyError",
    "UntrustedArtifactError",
]


class ArtifactError(EsperError, ValueError):
    """Base class of everything that `esper.artifacts` refuses."""


class ArtifactCorruptError(ArtifactError):
    """The bytes are not an artifact, or not the artifact that was asked for."""


class ArtifactLimitError(ArtifactError):
    """The artifact declares more than :class:`~esper.artifacts.limits.Limits` allows."""


class ArtifactGraphError(ArtifactError):
    """The kernel's graph is not well formed: opcode, attribute, edge, name or shape."""


class UntrustedArtifactError(ArtifactError):
    """A signature is missing, does not verify, or was made by a key that is not trusted."""


class BlueprintError(ArtifactError):
    """A blueprint was refused, or a module cannot be expressed in the operator table."""


class AttachmentError(ArtifactError):
    """The bytes are not an attachment."""


class SigningKeyError(ArtifactError):
    """A signing key could not be read, written or decoded."""
