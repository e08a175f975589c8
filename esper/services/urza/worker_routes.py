"""`/internal/v1`: what workers use."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response
from starlette.datastructures import UploadFile

from esper.services import references
from esper.services.contracts import BlueprintRecord, Claim, CompiledKernelArtifact, StoreStats
from esper.services.errors import ClaimLostError, InvalidRequestError
from esper.services.urza import uploads
from esper.services.urza.blueprints import as_datetime
from esper.services.urza.metrics import Metrics
from esper.services.urza.openapi import OCTETS, problems, upload_body
from esper.services.urza.request_documents import (
    BlueprintStatusChange,
    ClaimRelease,
    ClaimRenewal,
    ClaimRequest,
    KernelStatusChange,
    KernelUpload,
    NextLeaseEnd,
)
from esper.services.urza.request_limits import CALLER_KEY
from esper.services.urza.store import UrzaStore
from esper.services.urza.store_threads import StoreThreads

__all__ = ["add_claim_routes", "add_upload_routes"]

_MAX_RECORD = 4 * 2**20


def add_claim_routes(app: FastAPI, store: UrzaStore, threads: StoreThreads, metrics: Metrics) -> None:
    """Getting work, keeping it, and saying how it ended."""
    blueprints = store.blueprints

    @app.post(
        "/internal/v1/blueprints/claim",
        tags=["workers"],
        response_model=Claim,
        responses={204: {"description": "There is nothing to do"}, **problems(422)},
    )
    async def claim_blueprint(body: ClaimRequest) -> Claim | Response:
        """Take the blueprint that has waited longest. The lease is counted on Urza's clock."""
        claim = await threads.write(
            blueprints.claim, body.worker, lease_seconds=body.lease_seconds, blueprint_id=body.blueprint_id
        )
        metrics.claim("nothing" if claim is None else "claimed")
        return Response(status_code=204) if claim is None else claim

    @app.post("/internal/v1/blueprints/{blueprint_id}/renew", tags=["workers"], responses=problems(404, 409, 422))
    async def renew_claim(blueprint_id: str, body: ClaimRenewal) -> Claim:
        """Extend the lease, counted from now."""
        held = Claim(
            blueprint_id=references.blueprint_id(blueprint_id),
            token=body.token,
            worker=body.worker,
            attempt=body.attempt,
            expires_at=as_datetime(time.time()),
        )
        try:
            return await threads.write(blueprints.renew, held, lease_seconds=body.lease_seconds)
        except ClaimLostError:
            metrics.claim("lost")
            raise

    @app.post(
        "/internal/v1/blueprints/{blueprint_id}/release",
        tags=["workers"],
        status_code=204,
        responses=problems(404, 422),
    )
    async def release_claim(blueprint_id: str, body: ClaimRelease) -> None:
        """Give the blueprint back as if it had not been claimed. Nothing happens if the claim was lost."""
        held = Claim(  # the token is what counts
            blueprint_id=references.blueprint_id(blueprint_id),
            token=body.token,
            worker="",
            attempt=1,
            expires_at=as_datetime(time.time()),
        )
        await threads.write(blueprints.release, held)

    @app.put("/internal/v1/blueprints/{blueprint_id}/status", tags=["workers"], responses=problems(404, 409, 422))
    async def set_blueprint_status(blueprint_id: str, body: BlueprintStatusChange) -> BlueprintRecord:
        """End the compilation of a claimed blueprint: compiling -> validated | invalid."""
        try:
            return await threads.write(
                blueprints.set_status,
                references.blueprint_id(blueprint_id),
                body.status,
                token=body.token,
                reason=body.reason,
                report=body.report,
                artifact_id=body.artifact_id,
            )
        except ClaimLostError:
            metrics.claim("lost")
            raise

    @app.get("/internal/v1/blueprints/next-lease-end", tags=["workers"])
    async def get_next_lease_end() -> NextLeaseEnd:
        """When the first lease of a blueprint in work runs out."""
        return NextLeaseEnd(seconds=await threads.read(blueprints.next_lease_end))

    @app.get("/internal/v1/database/stats", tags=["workers"])
    async def get_stats() -> StoreStats:
        """What the store holds."""
        return await threads.read(store.stats)


def add_upload_routes(app: FastAPI, store: UrzaStore, threads: StoreThreads) -> None:
    """Storing kernels and their attachments."""

    @app.post(
        "/internal/v1/kernels",
        tags=["workers"],
        status_code=201,
        responses=problems(404, 409, 413, 422),
        openapi_extra=upload_body(KernelUpload),
    )
    async def add_kernel(request: Request) -> CompiledKernelArtifact:
        """Store a validated artifact. To one that is there already, the signature is added: one is kept of each key."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise InvalidRequestError("send `multipart/form-data` with the parts `record` and `content`")
        async with request.form(max_files=2, max_fields=2, max_part_size=_MAX_RECORD) as form:
            record, content = form.get("record"), form.get("content")
            if record is None or not isinstance(content, UploadFile):
                raise InvalidRequestError("the parts are `record`, JSON, and `content`, a file; one is missing")
            text = await record.read() if isinstance(record, UploadFile) else record
            return await threads.write(uploads.add_kernel, store, text, await content.read(), _token(request))

    @app.put(
        "/internal/v1/kernels/{artifact_id}/attachments/{target}",
        tags=["workers"],
        status_code=204,
        responses=problems(404, 409, 413, 422),
        openapi_extra=OCTETS,
    )
    async def add_kernel_attachment(artifact_id: str, target: str, request: Request) -> None:
        """Store compiled code beside its kernel, packed, in place of the same signer's for this target."""
        references.kernel_id(artifact_id)
        references.target_key(target)
        await threads.write(uploads.add_attachment, store, artifact_id, target, await request.body(), _token(request))

    @app.put("/internal/v1/kernels/{artifact_id}/status", tags=["workers"], responses=problems(404, 422))
    async def set_kernel_status(artifact_id: str, body: KernelStatusChange) -> CompiledKernelArtifact:
        """Retire a kernel, or bring it back."""
        return await threads.write(store.kernels.set_status, references.kernel_id(artifact_id), body.status)


def _token(request: Request) -> str:
    """The name of the request's token; empty for who needs none."""
    return request.scope.get(CALLER_KEY) or ""
