"""Checks of uploads before they are stored: that they are what they say they are."""

from __future__ import annotations

from pydantic import ValidationError

from esper.artifacts import (
    ArtifactError,
    Attachment,
    AttachmentError,
    Blueprint,
    BlueprintError,
    Signature,
    UntrustedArtifactError,
    artifact_message,
    load_artifact,
)
from esper.artifacts.document import canonical_json, parse_json
from esper.services.contracts import CompiledKernelArtifact, KernelMetadata
from esper.services.errors import InvalidRequestError
from esper.services.urza.http.request_documents import KernelUpload
from esper.services.urza.storage.blueprints import Submission
from esper.services.urza.storage.store import UrzaStore

__all__ = ["add_attachment", "add_kernel", "submit"]


def submit(store: UrzaStore, body: bytes) -> Submission:
    """Store the blueprint of a `SubmissionRequest`, which may be large: it is read here, on a thread.

    Raises ``InvalidRequestError``, ``BlueprintError`` and what ``BlueprintRecords.submit`` raises.
    """
    try:
        fields = parse_json(body, "the request", BlueprintError)
    except BlueprintError as cause:
        raise InvalidRequestError(str(cause)) from cause
    if not isinstance(fields, dict) or not {"blueprint"} <= set(fields) <= {"blueprint", "name"}:
        raise InvalidRequestError('the request is not an object with "blueprint" and, if wanted, "name"')
    document, name = fields["blueprint"], fields.get("name")
    if not isinstance(document, dict) or not isinstance(name, str | None):
        raise InvalidRequestError('"blueprint" is an object and "name" is text, or null')
    try:
        blueprint = Blueprint.from_json(document)
    except BlueprintError:
        raise
    except ArtifactError as cause:
        raise BlueprintError(str(cause)) from cause
    return store.blueprints.put(blueprint, name)


def add_kernel(store: UrzaStore, record: str | bytes, content: bytes, added_by: str) -> CompiledKernelArtifact:
    """Store an artifact if it can be loaded and its record describes it; or a signature of one that is there.

    Whether the signature counts is for those to say who load it. Raises ``InvalidRequestError``, ``ArtifactError`` and
    what ``KernelRecords.add`` raises.
    """
    try:
        upload = KernelUpload.model_validate_json(record)
    except ValidationError as cause:
        parts = [f"record.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in cause.errors()[:5]]
        raise InvalidRequestError("; ".join(parts)) from cause
    signature = None if upload.signature is None else Signature.from_json(canonical_json(upload.signature))
    artifact = load_artifact(content)
    report = upload.report
    described = {
        "metadata": (upload.metadata, KernelMetadata.of(artifact.graph)),
        "blueprint_id": (upload.blueprint_id, artifact.blueprint_id),
        "report.blueprint_id": (report.blueprint_id, artifact.blueprint_id),
        "report.artifact_id": (report.artifact_id, artifact.id),
        "report.passed": (report.passed, True),
    }
    for name, (said, found) in described.items():
        if said != found:
            raise ArtifactError(f"record.{name} is {said}, but the artifact's is {found}; send the record of this one")
    if signature is not None and signature.public_key is not None and not signature.fits(artifact_message(artifact.id)):
        raise UntrustedArtifactError(
            f"record.signature is none of artifact {artifact.id} by its public_key; sign this one, or send none"
        )
    return store.kernels.add(
        content,
        signature,
        blueprint_id=upload.blueprint_id,
        metadata=upload.metadata,
        report=report,
        added_by=added_by,
    )


def add_attachment(store: UrzaStore, artifact_id: str, target_key: str, body: bytes, added_by: str) -> None:
    """Store a packed attachment if it is of this kernel and target.

    Raises ``AttachmentError`` and what ``KernelRecords.add_attachment`` raises.
    """
    attachment = Attachment.unpack(body)
    if attachment.artifact_id != artifact_id:
        raise AttachmentError(f"the attachment is of kernel {attachment.artifact_id}, not of {artifact_id}")
    if attachment.target.key != target_key:
        raise AttachmentError(f"the attachment is for the target {attachment.target.key}, not for {target_key[:200]}")
    if attachment.signature.public_key is not None and not attachment.signature.fits(attachment.message):
        raise AttachmentError("the attachment's signature is none of it by its public_key; sign this one")
    store.kernels.add_attachment(attachment, added_by=added_by)
