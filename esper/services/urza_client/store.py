"""A store that is elsewhere: `esper.services.stores.Store` over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection
from contextlib import suppress

import httpx
from pydantic import BaseModel

from esper.artifacts import Attachment, Blueprint, Limits, Signature, UntrustedArtifactError
from esper.configs import UrzaConfig
from esper.contracts.validation import ValidationReport
from esper.services import ids
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
from esper.services.urza_client.connection import UrzaConnection
from esper.services.urza_client.transport import Answer

__all__ = ["RemoteStore"]

_SIGNATURE_HEADER = "Esper-Signature"
_PAGE = 1000
_MOST_SIGNERS = 100  # that Urza takes in one question
_MAX_BYTES = 256 * 2**20  # of a blueprint or an attachment
_API, _INTERNAL = "/api/v1", "/internal/v1"


class _LeaseEnd(BaseModel):
    seconds: float | None


class RemoteStore:
    """Urza at `settings.url`. Blocking; for any thread but an event loop's, and for forked children.

    Every method raises what the store's method of that name does (see `esper.services.stores`), and
    :class:`~esper.services.errors.UrzaUnavailableError` and ``UrzaProtocolError``. Requests that can be repeated are,
    as `settings.client` says; a claim is not, since nobody would know of the first. Connects at the first question.
    With `settings.client.offline` every question raises ``UrzaUnavailableError``.
    """

    def __init__(self, settings: UrzaConfig) -> None:
        self.settings = settings
        urza = UrzaConnection(settings)
        self._urza = urza
        self.blueprints = RemoteBlueprints(urza)
        self.kernels = RemoteKernels(urza)

    def stats(self) -> StoreStats:
        """`GET /internal/v1/database/stats`: counts and sizes; for a worker's token."""
        return self._urza.ask(StoreStats, "GET", "/internal/v1/database/stats")

    def close(self) -> None:
        """Close the connections. What others ask just then fails; another question connects anew."""
        self._urza.close()


class RemoteBlueprints:
    """See :class:`~esper.services.stores.BlueprintStore`."""

    def __init__(self, urza: UrzaConnection) -> None:
        self._urza = urza

    def submit(self, blueprint: Blueprint, name: str | None = None) -> BlueprintRecord:
        """`POST /api/v1/blueprints`."""
        body = {"blueprint": json.loads(blueprint.to_json()), "name": name}
        return self._urza.ask(BlueprintRecord, "POST", "/api/v1/blueprints", json=body)

    def get(self, blueprint_id: str) -> BlueprintRecord:
        """`GET /api/v1/blueprints/{id}`."""
        return self._urza.ask(BlueprintRecord, "GET", _blueprint(_API, blueprint_id))

    def document(self, blueprint_id: str) -> bytes:
        """`GET /api/v1/blueprints/{id}/document`: canonical JSON, its hash checked."""
        path = _blueprint(_API, blueprint_id, "document")
        return self._urza.download(path, blueprint_id, _MAX_BYTES).body

    def list(self, status_filter: BlueprintStatus | None = None, limit: int = 100) -> tuple[BlueprintRecord, ...]:
        """`GET /api/v1/blueprints`, as many pages as `limit` takes."""
        found: list[BlueprintRecord] = []
        cursor: str | None = None
        while len(found) < limit:
            params = {"limit": min(limit - len(found), _PAGE), "status_filter": status_filter, "cursor": cursor}
            given = {name: value for name, value in params.items() if value is not None}
            answer = self._urza.request("GET", "/api/v1/blueprints", params=given)
            items, cursor = self._urza.page(BlueprintRecord, answer)
            found += items
            if cursor is None:
                break
        return tuple(found)

    def claim(
        self, worker: str, *, lease_seconds: float = LEASE_SECONDS, blueprint_id: str | None = None
    ) -> Claim | None:
        """`POST /internal/v1/blueprints/claim`. One whose answer is lost runs out by itself."""
        wanted = None if blueprint_id is None else ids.blueprint_id(blueprint_id)
        body = {"worker": worker, "lease_seconds": lease_seconds, "blueprint_id": wanted}
        answer = self._urza.request("POST", "/internal/v1/blueprints/claim", json=body, repeatable=False)
        return None if answer.status == httpx.codes.NO_CONTENT else self._urza.read(Claim, answer)

    def renew(self, claim: Claim, *, lease_seconds: float = LEASE_SECONDS) -> Claim:
        """`POST /internal/v1/blueprints/{id}/renew`."""
        body = {
            "token": claim.token, "worker": claim.worker, "attempt": claim.attempt, "lease_seconds": lease_seconds,
        }  # fmt: skip
        return self._urza.ask(Claim, "POST", _blueprint(_INTERNAL, claim.blueprint_id, "renew"), json=body)

    def release(self, claim: Claim) -> None:
        """`POST /internal/v1/blueprints/{id}/release`."""
        self._urza.request("POST", _blueprint(_INTERNAL, claim.blueprint_id, "release"), json={"token": claim.token})

    def set_status(
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
        answer = self._urza.request("PUT", path, accepted=(httpx.codes.CONFLICT,), json=body)
        if answer.status == httpx.codes.CONFLICT and answer.attempts > 1:
            with suppress(ForbiddenError):  # a worker's token need not be a reader's
                record = self.get(blueprint_id)
                if (record.status, record.report) == (status, report) and artifact_id in (None, record.artifact_id):
                    return record
        return self._urza.read(BlueprintRecord, self._urza.transport().checked(answer))

    def recompile(self, blueprint_id: str, signers: Collection[str] = ()) -> BlueprintRecord:
        """`POST /api/v1/blueprints/{id}/recompile`. Again is harmless: what is not finished is left as it is."""
        return self._urza.ask(
            BlueprintRecord, "POST", _blueprint(_API, blueprint_id, "recompile"), json={"signers": sorted(signers)}
        )

    def forget(self, blueprint_id: str) -> None:
        """`DELETE /api/v1/blueprints/{id}`."""
        self._urza.request("DELETE", _blueprint(_API, blueprint_id), repeatable=False)

    def next_lease_end(self) -> float | None:
        """`GET /internal/v1/blueprints/next-lease-end`: in seconds."""
        return self._urza.ask(_LeaseEnd, "GET", "/internal/v1/blueprints/next-lease-end").seconds


class RemoteKernels:
    """See :class:`~esper.services.stores.KernelStore`."""

    def __init__(self, urza: UrzaConnection) -> None:
        self._urza = urza

    def get(self, artifact_id: str) -> CompiledKernelArtifact:
        """`GET /api/v1/kernels/{id}`."""
        return self._found(ids.kernel_id(artifact_id))  # the route takes names and prefixes as well

    def resolve(self, reference: str) -> str:
        """`GET /api/v1/kernels/{reference}`: by full id, prefix or name."""
        return self._found(ids.kernel_reference(reference)).id

    def _found(self, reference: str) -> CompiledKernelArtifact:
        return self._urza.ask(CompiledKernelArtifact, "GET", f"{_API}/kernels/{reference}")

    def signatures(self, artifact_id: str) -> tuple[Signature, ...]:
        """Those that :meth:`get` names."""
        return tuple(each.signature() for each in self.get(artifact_id).signatures)

    def add(
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
        return self._urza.ask(CompiledKernelArtifact, "POST", "/internal/v1/kernels", files=parts)

    def add_attachment(self, attachment: Attachment) -> None:
        """`PUT /internal/v1/kernels/{id}/attachments/{target}`."""
        path = _kernel(_INTERNAL, attachment.artifact_id, "attachments", ids.target_key(attachment.target.key))
        headers = {"Content-Type": "application/octet-stream"}
        self._urza.request("PUT", path, content=attachment.pack(), headers=headers)

    def content(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]]:
        """`GET /api/v1/kernels/{id}/content`: the artifact, its hash checked, and its signatures, not checked."""
        path = _kernel(_API, artifact_id, "content")
        answer = self._urza.download(path, artifact_id, Limits().max_bytes)
        return answer.body, self._signatures(answer)

    def attachment(
        self,
        artifact_id: str,
        target_key: str,
        signers: Collection[str] | None = None,
        *,
        known: bytes | None = None,
    ) -> bytes | None:
        """`GET /api/v1/kernels/{id}/attachments/{target}`: packed, its signature not checked; None if there is none.

        Of several, one by a key whose id is among `signers`, if there is such a one. `known` is what is there already,
        and is returned if Urza has the same.
        """
        headers = {} if known is None else {"If-None-Match": f'"{hashlib.sha256(known).hexdigest()}"'}
        try:
            path = _kernel(_API, artifact_id, "attachments", ids.target_key(target_key))
            path += "?" * bool(signers) + "&".join(f"signer={each}" for each in sorted(signers or ())[:_MOST_SIGNERS])
            answer = self._urza.download(path, None, _MAX_BYTES, headers)
        except (UnknownAttachmentError, UnknownKernelReferenceError):
            return None
        return known if answer.status == httpx.codes.NOT_MODIFIED else answer.body

    def set_status(self, artifact_id: str, status: KernelStatus) -> CompiledKernelArtifact:
        """`PUT /internal/v1/kernels/{id}/status`."""
        path = _kernel(_INTERNAL, artifact_id, "status")
        return self._urza.ask(CompiledKernelArtifact, "PUT", path, json={"status": status})

    def query(self, query: KernelQuery) -> tuple[CompiledKernelArtifact, ...]:
        """`POST /api/v1/kernels/query`."""
        body = query.model_dump(mode="json")
        return tuple(
            self._urza.page(CompiledKernelArtifact, self._urza.request("POST", "/api/v1/kernels/query", json=body))[0]
        )

    def _signatures(self, answer: Answer) -> tuple[Signature, ...]:
        given = answer.headers.get(_SIGNATURE_HEADER, "")
        try:
            return tuple(Signature.from_json(base64.urlsafe_b64decode(each)) for each in given.split(",") if each)
        except (ValueError, UntrustedArtifactError) as cause:
            raise self._urza.not_understood("a signature that cannot be read") from cause


# What stands in a path is looked at first: `..`, or a name with a slash, would be another path.


def _blueprint(root: str, text: str, *rest: str) -> str:
    return "/".join((root, "blueprints", ids.blueprint_id(text), *rest))


def _kernel(root: str, text: str, *rest: str) -> str:
    return "/".join((root, "kernels", ids.kernel_id(text), *rest))
