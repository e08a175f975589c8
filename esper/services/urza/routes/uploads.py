"""`/internal/v1/kernels`: how workers store kernels and their attachments."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from esper.services import ids
from esper.services.contracts import CompiledKernelArtifact
from esper.services.errors import InvalidRequestError
from esper.services.urza.http.openapi import OCTETS, problems, upload_body
from esper.services.urza.http.request_documents import KernelStatusChange, KernelUpload
from esper.services.urza.http.request_limits import CALLER_KEY
from esper.services.urza.routes import checked_uploads
from esper.services.urza.routes.services import Urza

__all__ = ["router"]

_MAX_RECORD = 4 * 2**20

router = APIRouter(prefix="/internal/v1/kernels", tags=["workers"])
"""Storing kernels and their attachments."""


@router.post(
    "",
    status_code=201,
    responses=problems(404, 409, 413, 422),
    openapi_extra=upload_body(KernelUpload),
)
async def add_kernel(urza: Urza, request: Request) -> CompiledKernelArtifact:
    """Store a validated artifact. To one that is there already, the signature is added: one is kept of each key."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequestError("send `multipart/form-data` with the parts `record` and `content`")
    async with request.form(max_files=2, max_fields=2, max_part_size=_MAX_RECORD) as form:
        record, content = form.get("record"), form.get("content")
        if record is None or not isinstance(content, UploadFile):
            raise InvalidRequestError("the parts are `record`, JSON, and `content`, a file; one is missing")
        text = await record.read() if isinstance(record, UploadFile) else record
        return await urza.threads.write(
            checked_uploads.add_kernel, urza.store, text, await content.read(), _token(request)
        )


@router.put(
    "/{artifact_id}/attachments/{target}",
    status_code=204,
    responses=problems(404, 409, 413, 422),
    openapi_extra=OCTETS,
)
async def add_kernel_attachment(urza: Urza, artifact_id: str, target: str, request: Request) -> None:
    """Store compiled code beside its kernel, packed, in place of the same signer's for this target."""
    ids.kernel_id(artifact_id)
    ids.target_key(target)
    await urza.threads.write(
        checked_uploads.add_attachment, urza.store, artifact_id, target, await request.body(), _token(request)
    )


@router.put("/{artifact_id}/status", responses=problems(404, 422))
async def set_kernel_status(urza: Urza, artifact_id: str, body: KernelStatusChange) -> CompiledKernelArtifact:
    """Retire a kernel, or bring it back."""
    return await urza.threads.write(urza.store.kernels.set_status, ids.kernel_id(artifact_id), body.status)


def _token(request: Request) -> str:
    """The name of the request's token; empty for who needs none."""
    return request.scope.get(CALLER_KEY) or ""
