"""`/api/v1/blueprints`: what submitters use."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from esper.services import ids
from esper.services.contracts import BlueprintRecord, BlueprintStatus
from esper.services.errors import InvalidRequestError
from esper.services.urza.http.content_response import FOREVER, matches, not_modified, ranged
from esper.services.urza.http.openapi import DOCUMENT, problems, request_body
from esper.services.urza.http.request_documents import BlueprintPage, RecompileRequest, SubmissionRequest
from esper.services.urza.routes import checked_uploads
from esper.services.urza.routes.services import Urza

__all__ = ["router"]

Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]

router = APIRouter(prefix="/api/v1/blueprints", tags=["blueprints"])
"""Submitting, listing, reading and forgetting blueprints."""


@router.post(
    "",
    status_code=201,
    response_model=BlueprintRecord,
    responses={200: {"model": BlueprintRecord, "description": "It was there already"}, **problems(409, 413, 422)},
    openapi_extra=request_body(SubmissionRequest),
)
async def submit_blueprint(urza: Urza, request: Request, response: Response) -> BlueprintRecord:
    """Store a blueprint and have it compiled. The same content again is the same blueprint."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequestError("send the blueprint as JSON, with `Content-Type: application/json`")
    submission = await urza.threads.write(checked_uploads.submit, urza.store, await request.body())
    if not submission.is_new:
        response.status_code = 200
    elif urza.on_submit is not None:
        urza.on_submit(submission.record.id)
    return submission.record


@router.get("", responses=problems(422))
async def list_blueprints(
    urza: Urza, status_filter: BlueprintStatus | None = None, limit: Limit = 100, cursor: Cursor = None
) -> BlueprintPage:
    """Blueprints, the latest first. Pages stay right while others are submitted."""
    page = await urza.threads.read(urza.store.blueprints.page, status_filter, limit, cursor)
    return BlueprintPage(items=page.items, next_cursor=page.next_cursor)


@router.get("/{blueprint_id}", responses=problems(404))
async def get_blueprint(urza: Urza, blueprint_id: str) -> BlueprintRecord:
    """What is known of a blueprint, by its full id."""
    return await urza.threads.read(urza.store.blueprints.get, ids.blueprint_id(blueprint_id))


@router.get(
    "/{blueprint_id}/document",
    response_class=Response,
    responses={**DOCUMENT, **problems(404, 416)},
)
async def get_blueprint_document(urza: Urza, blueprint_id: str, request: Request) -> Response:
    """The blueprint itself, as canonical JSON. It never changes."""
    document = await urza.threads.read(urza.store.blueprints.document, ids.blueprint_id(blueprint_id))
    headers = {
        "ETag": f'"{hashlib.sha256(document).hexdigest()}"',
        "Cache-Control": FOREVER,
        "Content-Type": "application/json",
    }
    return not_modified(headers) if matches(request, headers["ETag"]) else ranged(request, document, headers)


@router.post("/{blueprint_id}/recompile", responses=problems(404, 422))
async def recompile_blueprint(urza: Urza, blueprint_id: str, body: RecompileRequest) -> BlueprintRecord:
    """Have a finished blueprint compiled again, unless its kernel is signed by one of the keys named."""
    record = await urza.threads.write(urza.store.blueprints.recompile, ids.blueprint_id(blueprint_id), body.signers)
    if urza.on_submit is not None and not record.status.is_final:
        urza.on_submit(record.id)
    return record


@router.delete("/{blueprint_id}", status_code=204, responses=problems(404, 409))
async def forget_blueprint(urza: Urza, blueprint_id: str) -> None:
    """Remove an invalid blueprint, so that it can be submitted and compiled anew."""
    await urza.threads.write(urza.store.blueprints.forget, ids.blueprint_id(blueprint_id))
