"""`/api/v1/kernels`: what training jobs use."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints

from esper.artifacts import Signature
from esper.services import ids
from esper.services.contracts import CompiledKernelArtifact, KernelQuery
from esper.services.errors import UnknownAttachmentError
from esper.services.urza.http.content_response import FOREVER, matches, not_modified, ranged
from esper.services.urza.http.openapi import BYTES, problems
from esper.services.urza.http.request_documents import KernelPage, KernelQueryRequest
from esper.services.urza.routes.services import Urza

__all__ = ["SIGNATURE_HEADER", "router"]

SIGNATURE_HEADER = "Esper-Signature"
"""Carries the artifact's signatures, with commas between them: key id and value as JSON, in URL-safe base64."""

_ASK_AGAIN = "private, no-cache"

Signers = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], ...],
    Query(max_length=100, description="Ids of the keys one of which should have signed it, if there is a choice"),
]

router = APIRouter(prefix="/api/v1/kernels", tags=["kernels"])
"""Finding and downloading kernels."""


@router.post("/query", responses=problems(422))
async def query_kernels(urza: Urza, query: KernelQueryRequest) -> KernelPage:
    """Kernels that meet every condition, the latest first."""
    conditions = KernelQuery.model_construct(**query.model_dump(exclude={"cursor"}))
    page = await urza.threads.read(urza.store.kernels.page, conditions, query.cursor)
    return KernelPage(items=page.items, next_cursor=page.next_cursor)


@router.get("/{reference}", responses=problems(404, 409))
async def get_kernel(urza: Urza, reference: str) -> CompiledKernelArtifact:
    """What is known of a kernel, by its full id, the first 12 or more digits of it, or a name."""
    kernels, checked = urza.store.kernels, ids.kernel_reference(reference)
    return await urza.threads.read(lambda: kernels.get(kernels.resolve(checked)))


@router.get(
    "/{artifact_id}/content",
    response_class=Response,
    responses={**BYTES, **problems(404, 416)},
)
async def get_kernel_content(urza: Urza, artifact_id: str, request: Request) -> Response:
    """The artifact's file. Its SHA-256 is the id, so it never changes. Has ranges."""
    ids.kernel_id(artifact_id)
    headers = {"ETag": f'"{artifact_id}"', "Cache-Control": FOREVER, "Content-Type": "application/octet-stream"}
    if matches(request, headers["ETag"]):
        return not_modified(headers | _signed(await urza.threads.read(urza.store.kernels.signatures, artifact_id)))
    content, signatures = await urza.threads.read(urza.store.kernels.content, artifact_id)
    return ranged(request, content, headers | _signed(signatures))


@router.get(
    "/{artifact_id}/attachments/{target}",
    response_class=Response,
    responses={**BYTES, **problems(404, 416)},
)
async def get_kernel_attachment(
    urza: Urza, artifact_id: str, target: str, request: Request, signer: Signers = ()
) -> Response:
    """Compiled code of a kernel for one toolchain and hardware, packed. Check its signature before use."""
    wanted = ids.kernel_id(artifact_id), ids.target_key(target)
    data = await urza.threads.read(urza.store.kernels.attachment, *wanted, signer)
    if data is None:
        raise UnknownAttachmentError(f"kernel {artifact_id[:12]} has no attachment for {target}")
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "Cache-Control": _ASK_AGAIN,
        "Content-Type": "application/octet-stream",
    }
    return not_modified(headers) if matches(request, headers["ETag"]) else ranged(request, data, headers)


def _signed(signatures: Sequence[Signature]) -> dict[str, str]:
    if not signatures:
        return {}
    short = (dataclasses.replace(each, public_key=None).to_json() for each in signatures)  # who trusts a key has it
    return {SIGNATURE_HEADER: ", ".join(base64.urlsafe_b64encode(each.encode()).decode("ascii") for each in short)}
