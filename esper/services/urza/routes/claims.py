"""`/internal/v1/blueprints` and statistics: how workers get work, keep it, and say how it ended."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from esper.services import ids
from esper.services.contracts import BlueprintRecord, Claim, StoreStats
from esper.services.errors import ClaimLostError
from esper.services.urza.http.openapi import problems
from esper.services.urza.http.request_documents import (
    BlueprintStatusChange,
    ClaimRelease,
    ClaimRenewal,
    ClaimRequest,
    NextLeaseEnd,
)
from esper.services.urza.routes.services import Urza
from esper.services.urza.storage.blueprints import as_datetime

__all__ = ["router"]

router = APIRouter(prefix="/internal/v1", tags=["workers"])
"""Getting work, keeping it, and saying how it ended."""


@router.post(
    "/blueprints/claim",
    response_model=Claim,
    responses={204: {"description": "There is nothing to do"}, **problems(422)},
)
async def claim_blueprint(urza: Urza, body: ClaimRequest) -> Claim | Response:
    """Take the blueprint that has waited longest. The lease is counted on Urza's clock."""
    claim = await urza.threads.write(
        urza.store.blueprints.claim, body.worker, lease_seconds=body.lease_seconds, blueprint_id=body.blueprint_id
    )
    urza.metrics.claim("nothing" if claim is None else "claimed")
    return Response(status_code=204) if claim is None else claim


@router.post("/blueprints/{blueprint_id}/renew", responses=problems(404, 409, 422))
async def renew_claim(urza: Urza, blueprint_id: str, body: ClaimRenewal) -> Claim:
    """Extend the lease, counted from now."""
    held = _claim(blueprint_id, body.token, body.worker, body.attempt)
    try:
        return await urza.threads.write(urza.store.blueprints.renew, held, lease_seconds=body.lease_seconds)
    except ClaimLostError:
        urza.metrics.claim("lost")
        raise


@router.post(
    "/blueprints/{blueprint_id}/release",
    status_code=204,
    responses=problems(404, 422),
)
async def release_claim(urza: Urza, blueprint_id: str, body: ClaimRelease) -> None:
    """Give the blueprint back as if it had not been claimed. Nothing happens if the claim was lost."""
    await urza.threads.write(urza.store.blueprints.release, _claim(blueprint_id, body.token))


@router.put("/blueprints/{blueprint_id}/status", responses=problems(404, 409, 422))
async def set_blueprint_status(urza: Urza, blueprint_id: str, body: BlueprintStatusChange) -> BlueprintRecord:
    """End the compilation of a claimed blueprint: compiling -> validated | invalid."""
    try:
        return await urza.threads.write(
            urza.store.blueprints.set_status,
            ids.blueprint_id(blueprint_id),
            body.status,
            token=body.token,
            reason=body.reason,
            report=body.report,
            artifact_id=body.artifact_id,
        )
    except ClaimLostError:
        urza.metrics.claim("lost")
        raise


@router.get("/blueprints/next-lease-end")
async def get_next_lease_end(urza: Urza) -> NextLeaseEnd:
    """When the first lease of a blueprint in work runs out."""
    return NextLeaseEnd(seconds=await urza.threads.read(urza.store.blueprints.next_lease_end))


@router.get("/database/stats")
async def get_stats(urza: Urza) -> StoreStats:
    """What the store holds."""
    return await urza.threads.read(urza.store.stats)


def _claim(blueprint_id: str, token: str, worker: str = "", attempt: int = 1) -> Claim:
    """The claim that a request shows: its token is what counts, and how long it holds is for the store to know."""
    return Claim(
        blueprint_id=ids.blueprint_id(blueprint_id),
        token=token,
        worker=worker,
        attempt=attempt,
        expires_at=as_datetime(time.time()),
    )
