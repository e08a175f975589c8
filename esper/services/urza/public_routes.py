"""`/api/v1`: what submitters and training jobs use."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from esper.artifacts import Signature
from esper.services import references
from esper.services.contracts import BlueprintRecord, BlueprintStatus, CompiledKernelArtifact, KernelQuery
from esper.services.errors import InvalidRequestError, UnknownAttachmentError
from esper.services.urza import uploads
from esper.services.urza.content_response import matches, not_modified, ranged
from esper.services.urza.openapi import BYTES, DOCUMENT, problems, request_body
from esper.services.urza.request_documents import (
    BlueprintPage,
    KernelPage,
    KernelQueryRequest,
    SubmissionRequest,
)
from esper.services.urza.store import UrzaStore
from esper.services.urza.store_threads import StoreThreads

__all__ = ["SIGNATURE_HEADER", "add_blueprint_routes", "add_kernel_routes"]

SIGNATURE_HEADER = "Esper-Signature"
"""Carries the artifact's signature: `Signature.to_json` in URL-safe base64."""

_FOREVER = "private, max-age=31536000, immutable"
_ASK_AGAIN = "private, no-cache"

Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]


def add_blueprint_routes(
    app: FastAPI, store: UrzaStore, threads: StoreThreads, on_submit: Callable[[str], None] | None
) -> None:
    """Submitting, listing, reading and forgetting blueprints."""
    blueprints = store.blueprints

    @app.post(
        "/api/v1/blueprints",
        tags=["blueprints"],
        status_code=201,
        response_model=BlueprintRecord,
        responses={200: {"model": BlueprintRecord, "description": "It was there already"}, **problems(409, 413, 422)},
        openapi_extra=request_body(SubmissionRequest),
    )
    async def submit_blueprint(request: Request, response: Response) -> BlueprintRecord:
        """Store a blueprint and have it compiled. The same content again is the same blueprint."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise InvalidRequestError("send the blueprint as JSON, with `Content-Type: application/json`")
        submission = await threads.write(uploads.submit, store, await request.body())
        if not submission.is_new:
            response.status_code = 200
        elif on_submit is not None:
            on_submit(submission.record.id)
        return submission.record

    @app.get("/api/v1/blueprints", tags=["blueprints"], responses=problems(422))
    async def list_blueprints(
        status_filter: BlueprintStatus | None = None, limit: Limit = 100, cursor: Cursor = None
    ) -> BlueprintPage:
        """Blueprints, the latest first. Pages stay right while others are submitted."""
        page = await threads.read(blueprints.page, status_filter, limit, cursor)
        return BlueprintPage(items=page.items, next_cursor=page.next_cursor)

    @app.get("/api/v1/blueprints/{blueprint_id}", tags=["blueprints"], responses=problems(404))
    async def get_blueprint(blueprint_id: str) -> BlueprintRecord:
        """What is known of a blueprint, by its full id."""
        return await threads.read(blueprints.get, references.blueprint_id(blueprint_id))

    @app.get(
        "/api/v1/blueprints/{blueprint_id}/document",
        tags=["blueprints"],
        response_class=Response,
        responses={**DOCUMENT, **problems(404, 416)},
    )
    async def get_blueprint_document(blueprint_id: str, request: Request) -> Response:
        """The blueprint itself, as canonical JSON. It never changes."""
        document = await threads.read(blueprints.document, references.blueprint_id(blueprint_id))
        headers = {
            "ETag": f'"{hashlib.sha256(document).hexdigest()}"',
            "Cache-Control": _FOREVER,
            "Content-Type": "application/json",
        }
        return not_modified(headers) if matches(request, headers["ETag"]) else ranged(request, document, headers)

    @app.delete("/api/v1/blueprints/{blueprint_id}", tags=["blueprints"], status_code=204, responses=problems(404, 409))
    async def forget_blueprint(blueprint_id: str) -> None:
        """Remove an invalid blueprint, so that it can be submitted and compiled anew."""
        await threads.write(blueprints.forget, references.blueprint_id(blueprint_id))


def add_kernel_routes(app: FastAPI, store: UrzaStore, threads: StoreThreads) -> None:
    """Finding and downloading kernels."""
    kernels = store.kernels

    def found(reference: str) -> CompiledKernelArtifact:
        return kernels.get(kernels.resolve(reference))

    @app.post("/api/v1/kernels/query", tags=["kernels"], responses=problems(422))
    async def query_kernels(query: KernelQueryRequest) -> KernelPage:
        """Kernels that meet every condition, the latest first."""
        conditions = KernelQuery.model_construct(**query.model_dump(exclude={"cursor"}))
        page = await threads.read(kernels.page, conditions, query.cursor)
        return KernelPage(items=page.items, next_cursor=page.next_cursor)

    @app.get("/api/v1/kernels/{reference}", tags=["kernels"], responses=problems(404, 409))
    async def get_kernel(reference: str) -> CompiledKernelArtifact:
        """What is known of a kernel, by its full id, the first 12 or more digits of it, or a name."""
        return await threads.read(found, references.kernel_reference(reference))

    @app.get(
        "/api/v1/kernels/{artifact_id}/content",
        tags=["kernels"],
        response_class=Response,
        responses={**BYTES, **problems(404, 416)},
    )
    async def get_kernel_content(artifact_id: str, request: Request) -> Response:
        """The artifact's file. Its SHA-256 is the id, so it never changes. Has ranges."""
        references.kernel_id(artifact_id)
        headers = {"ETag": f'"{artifact_id}"', "Cache-Control": _FOREVER, "Content-Type": "application/octet-stream"}
        if matches(request, headers["ETag"]):
            return not_modified(headers | _signed(await threads.read(kernels.signature, artifact_id)))
        content, signature = await threads.read(kernels.content, artifact_id)
        return ranged(request, content, headers | _signed(signature))

    @app.get(
        "/api/v1/kernels/{artifact_id}/attachments/{target}",
        tags=["kernels"],
        response_class=Response,
        responses={**BYTES, **problems(404, 416)},
    )
    async def get_kernel_attachment(artifact_id: str, target: str, request: Request) -> Response:
        """Compiled code of a kernel for one toolchain and hardware, packed. Check its signature before use."""
        data = await threads.read(kernels.attachment, references.kernel_id(artifact_id), references.target_key(target))
        if data is None:
            raise UnknownAttachmentError(f"kernel {artifact_id[:12]} has no attachment for {target}")
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Cache-Control": _ASK_AGAIN,
            "Content-Type": "application/octet-stream",
        }
        return not_modified(headers) if matches(request, headers["ETag"]) else ranged(request, data, headers)


def _signed(signature: Signature | None) -> dict[str, str]:
    if signature is None:
        return {}
    return {SIGNATURE_HEADER: base64.urlsafe_b64encode(signature.to_json().encode()).decode("ascii")}
