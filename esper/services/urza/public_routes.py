"""`/api/v1`: what submitters and training jobs use."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from pydantic import StringConstraints

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
    RecompileRequest,
    SubmissionRequest,
)
from esper.services.urza.store import UrzaStore
from esper.services.urza.store_threads import StoreThreads

__all__ = ["SIGNATURE_HEADER", "add_blueprint_routes", "add_kernel_routes"]

SIGNATURE_HEADER = "Esper-Signature"
"""Carries the artifact's signatures, with commas between them: key id and value as JSON, in URL-safe base64."""

_FOREVER = "private, max-age=31536000, immutable"
_ASK_AGAIN = "private, no-cache"

Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before")]
Signers = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], ...],
    Query(max_length=100, description="Ids of the keys one of which should have signed it, if there is a choice"),
]
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

    @app.post("/api/v1/blueprints/{blueprint_id}/recompile", tags=["blueprints"], responses=problems(404, 422))
    async def recompile_blueprint(blueprint_id: str, body: RecompileRequest) -> BlueprintRecord:
        """Have a finished blueprint compiled again, unless its kernel is signed by one of the keys named."""
        record = await threads.write(blueprints.recompile, references.blueprint_id(blueprint_id), body.signers)
        if on_submit is not None and not record.status.is_final:
            on_submit(record.id)
        return record

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
            return not_modified(headers | _signed(await threads.read(kernels.signatures, artifact_id)))
        content, signatures = await threads.read(kernels.content, artifact_id)
        return ranged(request, content, headers | _signed(signatures))

    @app.get(
        "/api/v1/kernels/{artifact_id}/attachments/{target}",
        tags=["kernels"],
        response_class=Response,
        responses={**BYTES, **problems(404, 416)},
    )
    async def get_kernel_attachment(artifact_id: str, target: str, request: Request, signer: Signers = ()) -> Response:
        """Compiled code of a kernel for one toolchain and hardware, packed. Check its signature before use."""
        wanted = references.kernel_id(artifact_id), references.target_key(target)
        data = await threads.read(kernels.attachment, *wanted, signer)
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
