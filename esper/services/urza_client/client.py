"""Every route of Urza's HTTP interface, as a coroutine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from esper.artifacts import Attachment, Blueprint, Limits, Signature, UntrustedArtifactError
from esper.configs import UrzaConfig
from esper.contracts.validation import ValidationReport
from esper.services import references
from esper.services.contracts import (
    BlueprintRecord,
    BlueprintStatus,
    Claim,
    CompiledKernelArtifact,
    KernelMetadata,
    KernelQuery,
    KernelStatus,
    StoreStats,
)
from esper.services.errors import (
    ForbiddenError,
    UnknownAttachmentError,
    UnknownKernelReferenceError,
)
from esper.services.stores import LEASE_SECONDS
from esper.services.urza_client.transport import Answer, UrzaTransport

__all__ = ["UrzaClient"]

_SIGNATURE_HEADER = "Esper-Signature"
_PAGE = 1000
_MOST_SIGNERS = 100  # that Urza takes in one question
_MAX_BYTES = 256 * 2**20  # of a blueprint or an attachment
_API, _INTERNAL = "/api/v1", "/internal/v1"
_Document = TypeVar("_Document", bound=BaseModel)


class _LeaseEnd(BaseModel):
    seconds: float | None


class UrzaClient:
    """Asks the Urza at `settings.url`. For one event loop; close it, or use it with `async with`.

    Every coroutine raises what the store's method of that name does (see `esper.services.stores`), and
    :class:`~esper.services.errors.UrzaUnavailableError` and ``UrzaProtocolError``. Requests that can be repeated are,
    as `settings.client` says; a claim is not, since nobody would know of the first.
    """

    def __init__(self, settings: UrzaConfig) -> None:
        self._transport = UrzaTransport(settings)

    async def __aenter__(self) -> UrzaClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    # -- blueprints ----------------------------------------------------------------------------------------------------

    async def submit(self, blueprint: Blueprint, name: str | None = None) -> BlueprintRecord:
        """`POST /api/v1/blueprints`."""
        body = {"blueprint": json.loads(blueprint.to_json()), "name": name}
        return self._read(BlueprintRecord, await self._transport.request("POST", "/api/v1/blueprints", json=body))

    async def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """`GET /api/v1/blueprints/{id}`."""
        return self._read(BlueprintRecord, await self._transport.request("GET", _blueprint(_API, blueprint_id)))

    async def document(self, blueprint_id: str) -> bytes:
        """`GET /api/v1/blueprints/{id}/document`: canonical JSON, its hash checked."""
        path = _blueprint(_API, blueprint_id, "document")
        return (await self._transport.download(path, blueprint_id, _MAX_BYTES)).body

    async def blueprints(
        self, status_filter: BlueprintStatus | None = None, limit: int = 100
    ) -> tuple[BlueprintRecord, ...]:
        """`GET /api/v1/blueprints`, as many pages as `limit` takes."""
        found: list[BlueprintRecord] = []
        cursor: str | None = None
        while len(found) < limit:
            params = {"limit": min(limit - len(found), _PAGE), "status_filter": status_filter, "cursor": cursor}
            given = {name: value for name, value in params.items() if value is not None}
            answer = await self._transport.request("GET", "/api/v1/blueprints", params=given)
            items, cursor = self._page(BlueprintRecord, answer)
            found += items
            if cursor is None:
                break
        return tuple(found)

    async def recompile(self, blueprint_id: str, signers: Collection[str] = ()) -> BlueprintRecord:
        """`POST /api/v1/blueprints/{id}/recompile`. Again is harmless: what is not finished is left as it is."""
        answer = await self._post(_blueprint(_API, blueprint_id, "recompile"), {"signers": sorted(signers)})
        return self._read(BlueprintRecord, answer)

    async def forget(self, blueprint_id: str) -> None:
        """`DELETE /api/v1/blueprints/{id}`."""
        await self._transport.request("DELETE", _blueprint(_API, blueprint_id), repeatable=False)

    # -- kernels -------------------------------------------------------------------------------------------------------

    async def kernel(self, reference: str) -> CompiledKernelArtifact:
        """`GET /api/v1/kernels/{reference}`: by full id, prefix or name."""
        path = f"{_API}/kernels/{references.kernel_reference(reference)}"
        return self._read(CompiledKernelArtifact, await self._transport.request("GET", path))

    async def content(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]]:
        """`GET /api/v1/kernels/{id}/content`: the artifact, its hash checked, and its signatures, not checked."""
        path = _kernel(_API, artifact_id, "content")
        answer = await self._transport.download(path, artifact_id, Limits().max_bytes)
        return answer.body, self._signatures(answer)

    async def attachment(
        self, artifact_id: str, target_key: str, known: bytes | None = None, signers: Collection[str] = ()
    ) -> bytes | None:
        """`GET /api/v1/kernels/{id}/attachments/{target}`: packed, its signature not checked; None if there is none.

        Of several, one by a key whose id is among `signers`, if there is such a one. `known` is what is there already,
        and is returned if Urza has the same.
        """
        headers = {} if known is None else {"If-None-Match": f'"{hashlib.sha256(known).hexdigest()}"'}
        try:
            path = _kernel(_API, artifact_id, "attachments", references.target_key(target_key))
            path += "?" * bool(signers) + "&".join(f"signer={each}" for each in sorted(signers)[:_MOST_SIGNERS])
            answer = await self._transport.download(path, None, _MAX_BYTES, headers)
        except (UnknownAttachmentError, UnknownKernelReferenceError):
            return None
        return known if answer.status == httpx.codes.NOT_MODIFIED else answer.body

    async def query(self, query: KernelQuery) -> tuple[CompiledKernelArtifact, ...]:
        """`POST /api/v1/kernels/query`."""
        body = query.model_dump(mode="json")
        return tuple(self._page(CompiledKernelArtifact, await self._post("/api/v1/kernels/query", body))[0])

    # -- for workers ---------------------------------------------------------------------------------------------------

    async def claim(
        self, worker: str, *, lease_seconds: float = LEASE_SECONDS, blueprint_id: str | None = None
    ) -> Claim | None:
        """`POST /internal/v1/blueprints/claim`. One whose answer is lost runs out by itself."""
        wanted = None if blueprint_id is None else references.blueprint_id(blueprint_id)
        body = {"worker": worker, "lease_seconds": lease_seconds, "blueprint_id": wanted}
        answer = await self._post("/internal/v1/blueprints/claim", body, repeatable=False)
        return None if answer.status == httpx.codes.NO_CONTENT else self._read(Claim, answer)

    async def renew(self, claim: Claim, *, lease_seconds: float = LEASE_SECONDS) -> Claim:
        """`POST /internal/v1/blueprints/{id}/renew`."""
        body = {
            "token": claim.token, "worker": claim.worker, "attempt": claim.attempt, "lease_seconds": lease_seconds,
        }  # fmt: skip
        return self._read(Claim, await self._post(_blueprint(_INTERNAL, claim.blueprint_id, "renew"), body))

    async def release(self, claim: Claim) -> None:
        """`POST /internal/v1/blueprints/{id}/release`."""
        await self._post(_blueprint(_INTERNAL, claim.blueprint_id, "release"), {"token": claim.token})

    async def set_status(
        self,
        blueprint_id: str,
        status: BlueprintStatus,
        *,
        token: str,
        reason: str = "",
        report: ValidationReport | None = None,
        artifact_id: str | None = None,
    ) -> BlueprintRecord:
        """`PUT /internal/v1/blueprints/{id}/status`. Repeated after a lost answer, it finds its own work done."""
        body = {
            "status": status, "token": token, "reason": reason, "artifact_id": artifact_id,
            "report": None if report is None else report.model_dump(mode="json"),
        }  # fmt: skip
        path = _blueprint(_INTERNAL, blueprint_id, "status")
        answer = await self._transport.request("PUT", path, accepted=(httpx.codes.CONFLICT,), json=body)
        if answer.status == httpx.codes.CONFLICT and answer.attempts > 1:
            with suppress(ForbiddenError):  # a worker's token need not be a reader's
                record = await self.blueprint(blueprint_id)
                if (record.status, record.report) == (status, report) and artifact_id in (None, record.artifact_id):
                    return record
        return self._read(BlueprintRecord, self._transport.checked(answer))

    async def add_kernel(
        self,
        data: bytes,
        signature: Signature | None,
        *,
        blueprint_id: str,
        metadata: KernelMetadata,
        report: ValidationReport,
    ) -> CompiledKernelArtifact:
        """`POST /internal/v1/kernels`."""
        record = {
            "blueprint_id": blueprint_id, "metadata": metadata.model_dump(mode="json"),
            "report": report.model_dump(mode="json"),
            "signature": None if signature is None else json.loads(signature.to_json()),
        }  # fmt: skip
        parts = {
            "record": ("record.json", json.dumps(record).encode(), "application/json"),
            "content": ("artifact.safetensors", data, "application/octet-stream"),
        }
        answer = await self._transport.request("POST", "/internal/v1/kernels", files=parts)
        return self._read(CompiledKernelArtifact, answer)

    async def add_attachment(self, attachment: Attachment) -> None:
        """`PUT /internal/v1/kernels/{id}/attachments/{target}`."""
        path = _kernel(_INTERNAL, attachment.artifact_id, "attachments", references.target_key(attachment.target.key))
        headers = {"Content-Type": "application/octet-stream"}
        await self._transport.request("PUT", path, content=attachment.pack(), headers=headers)

    async def set_kernel_status(self, artifact_id: str, status: KernelStatus) -> CompiledKernelArtifact:
        """`PUT /internal/v1/kernels/{id}/status`."""
        path = _kernel(_INTERNAL, artifact_id, "status")
        return self._read(CompiledKernelArtifact, await self._transport.request("PUT", path, json={"status": status}))

    async def next_lease_end(self) -> float | None:
        """`GET /internal/v1/blueprints/next-lease-end`: in seconds."""
        answer = await self._transport.request("GET", "/internal/v1/blueprints/next-lease-end")
        return self._read(_LeaseEnd, answer).seconds

    async def stats(self) -> StoreStats:
        """`GET /internal/v1/database/stats`."""
        return self._read(StoreStats, await self._transport.request("GET", "/internal/v1/database/stats"))

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _post(self, path: str, body: Mapping[str, Any], *, repeatable: bool = True) -> Answer:
        return await self._transport.request("POST", path, repeatable=repeatable, json=body)

    def _json(self, answer: Answer) -> Any:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            raise self._transport.not_understood(kind or "something without a content type")
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError) as cause:
            raise self._transport.not_understood("what is not JSON, or nested too deeply") from cause
        if not isinstance(document, dict):
            raise self._transport.not_understood(f"a {type(document).__name__}")
        return document

    def _read(self, kind: type[_Document], answer: Answer) -> _Document:
        return self._validated(kind, self._json(answer))

    def _validated(self, kind: type[_Document], document: object) -> _Document:
        try:
            return kind.model_validate(document)
        except ValidationError as cause:
            raise self._transport.not_understood(f"a {kind.__name__} with {cause.error_count()} errors") from cause

    def _page(self, kind: type[_Document], answer: Answer) -> tuple[list[_Document], str | None]:
        page = self._json(answer)
        items, cursor = page.get("items"), page.get("next_cursor")
        if not isinstance(items, list):
            raise self._transport.not_understood("a page without items")
        if cursor is not None and not (isinstance(cursor, str) and items):
            raise self._transport.not_understood("a page after which there is no next one, and which has one")
        return [self._validated(kind, item) for item in items], cursor

    def _signatures(self, answer: Answer) -> tuple[Signature, ...]:
        given = answer.headers.get(_SIGNATURE_HEADER, "")
        try:
            return tuple(Signature.from_json(base64.urlsafe_b64decode(each)) for each in given.split(",") if each)
        except (ValueError, UntrustedArtifactError) as cause:
            raise self._transport.not_understood("a signature that cannot be read") from cause


# What stands in a path is looked at first: `..`, or a name with a slash, would be another path.


def _blueprint(root: str, text: str, *rest: str) -> str:
    return "/".join((root, "blueprints", references.blueprint_id(text), *rest))


def _kernel(root: str, text: str, *rest: str) -> str:
    return "/".join((root, "kernels", references.kernel_id(text), *rest))
