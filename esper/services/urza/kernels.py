"""Kernels in the store: artifacts, their attachments, and how to find them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from esper.artifacts import Attachment, Signature
from esper.contracts.validation import LatencyMeasurement, ValidationReport
from esper.services.contracts import CompiledKernelArtifact, KernelMetadata, KernelQuery, KernelStatus
from esper.services.errors import (
    AmbiguousPrefixError,
    StoreBusyError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)
from esper.services.names import MIN_PREFIX, is_full_id, is_id_prefix
from esper.services.urza.blob_references import keep_blob
from esper.services.urza.blobs import BlobStore
from esper.services.urza.blueprints import as_datetime
from esper.services.urza.database import Database
from esper.services.urza.models import AttachmentRow, BlueprintRow, KernelRow, NameRow
from esper.services.urza.paging import Cursor, Page

__all__ = ["KernelRecords", "representative_latency"]

_TYPICAL_ROWS = 32


def representative_latency(measurements: Sequence[LatencyMeasurement]) -> float | None:
    """One number of many, in microseconds; see `CompiledKernelArtifact.latency_us`."""
    if not measurements:
        return None
    enough = [each for each in measurements if each.rows >= _TYPICAL_ROWS]
    chosen = min(enough, key=lambda each: each.rows) if enough else max(measurements, key=lambda each: each.rows)
    return chosen.graph_us if chosen.attachment_us is None else chosen.attachment_us


class KernelRecords:
    """The part of the store that kernels are loaded from. Safe for threads and processes."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs

    def add(
        self,
        data: bytes,
        signature: Signature | None,
        *,
        blueprint_id: str,
        metadata: KernelMetadata,
        report: ValidationReport,
    ) -> CompiledKernelArtifact:
        """Store a validated artifact under the SHA-256 of `data`. One that is there already stays as it is.

        Raises ``UnknownBlueprintError`` if the blueprint is not in the store. Whether `signature` is worth anything is
        for those to check who load it.
        """
        artifact_id = hashlib.sha256(data).hexdigest()
        self._blobs.put(data)
        for _ in range(2):  # the second time it is there: another worker was faster
            try:
                with self._database.writing() as session:
                    keep_blob(session, self._blobs, artifact_id, data)
                    row = session.get(KernelRow, artifact_id)
                    if row is None:
                        row = KernelRow(
                            id=artifact_id,
                            blueprint=_blueprint(session, blueprint_id),
                            status=KernelStatus.VALIDATED,
                            **metadata.model_dump(),
                            size_bytes=len(data),
                            signature=None if signature is None else signature.to_json(),
                            report=report.model_dump(mode="json"),
                            latency_us=representative_latency(report.latencies),
                            created_at=time.time(),
                            attachments=[],
                        )
                        session.add(row)
                    session.flush()
                    return _kernel(row)
            except IntegrityError:
                continue
        raise StoreBusyError(f"kernel {artifact_id} is being stored by others; try again")

    def add_attachment(self, attachment: Attachment) -> None:
        """Store compiled code beside its artifact, in place of what was there for the same target.

        Raises :class:`UnknownKernelReferenceError` if the artifact is not in the store.
        """
        data = attachment.pack()
        digest = self._blobs.put(data)
        for _ in range(3):  # where two workers insert the same row at once (PostgreSQL), the slower looks again
            try:
                with self._database.writing() as session:
                    _row(session, attachment.artifact_id)
                    keep_blob(session, self._blobs, digest, data)
                    session.merge(
                        AttachmentRow(
                            artifact_id=attachment.artifact_id,
                            target_key=attachment.target.key,
                            document=digest,
                            size_bytes=len(data),
                            created_at=time.time(),
                        )
                    )
                return
            except IntegrityError:
                continue
        raise StoreBusyError(f"attachments of kernel {attachment.artifact_id} are being stored by others; try again")

    def get(self, artifact_id: str) -> CompiledKernelArtifact:
        """The record of a kernel by its full id. Raises :class:`UnknownKernelReferenceError`."""
        with self._database.reading() as session:
            return _kernel(_row(session, artifact_id))

    def content(self, artifact_id: str) -> tuple[bytes, Signature | None]:
        """The artifact's file, its hash checked, and its signature, not checked.

        Raises :class:`UnknownKernelReferenceError` or ``StoreCorruptError``.
        """
        signature = self.signature(artifact_id)
        return self._blobs.get(artifact_id), signature

    def signature(self, artifact_id: str) -> Signature | None:
        """The artifact's signature, not checked. Raises :class:`UnknownKernelReferenceError`."""
        with self._database.reading() as session:
            row = session.execute(select(KernelRow.signature).where(KernelRow.id == artifact_id)).one_or_none()
            if row is None:
                raise _unknown(session, artifact_id)
        return None if row.signature is None else Signature.from_json(row.signature)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """The packed attachment for a target, its signature not checked; None if there is none."""
        with self._database.reading() as session:
            row = session.get(AttachmentRow, (artifact_id, target_key))
            digest = None if row is None else row.document
        return None if digest is None else self._blobs.get(digest)

    def set_status(self, artifact_id: str, status: KernelStatus) -> CompiledKernelArtifact:
        """Retire a kernel, or bring it back. Raises :class:`UnknownKernelReferenceError`."""
        with self._database.writing() as session:
            row = _row(session, artifact_id)
            if row.status != status:
                row.status = status
                row.retired_at = time.time() if status is KernelStatus.RETIRED else None
            return _kernel(row)

    def resolve(self, reference: str) -> str:
        """The artifact id of a full id, a unique prefix of at least 12 hex digits, or a name.

        Raises :class:`UnknownKernelReferenceError`, with a hint where there is one, or ``AmbiguousPrefixError``.
        """
        with self._database.reading() as session:
            if is_full_id(reference):
                row = session.get(KernelRow, reference)
                if row is None:
                    raise _unknown(session, reference)
                return row.id
            if is_id_prefix(reference):
                return _by_prefix(session, reference.lower())
            return _by_name(session, reference)

    def query(self, query: KernelQuery) -> tuple[CompiledKernelArtifact, ...]:
        """Kernels that meet every condition, the latest first."""
        return self.page(query).items

    def page(self, query: KernelQuery, cursor: str | None = None) -> Page[CompiledKernelArtifact]:
        """What :meth:`query` returns, from where the page that came with `cursor` ended."""
        same = ("in_features", "out_features", "dtype", "blueprint_id", "graph_digest", "uses_host", "status")
        conditions: list[ColumnElement[bool]] = [
            getattr(KernelRow, name) == wanted for name in same if (wanted := getattr(query, name)) is not None
        ]
        if query.max_size_bytes is not None:
            conditions.append(KernelRow.size_bytes <= query.max_size_bytes)
        if query.max_latency_us is not None:
            conditions.append(KernelRow.latency_us <= query.max_latency_us)
        if query.target_key is not None:
            conditions.append(KernelRow.attachments.any(AttachmentRow.target_key == query.target_key))
        if cursor is not None:
            conditions.append(Cursor.decode(cursor).behind(KernelRow.created_at, KernelRow.id))
        order = (KernelRow.created_at.desc(), KernelRow.id.desc())
        statement = select(KernelRow).where(*conditions).order_by(*order).limit(query.limit + 1)
        with self._database.reading() as session:
            rows = session.scalars(statement).all()
            items = tuple(_kernel(row) for row in rows[: query.limit])
            last = rows[query.limit - 1] if len(rows) > query.limit else None
        return Page(items, None if last is None else Cursor(last.created_at, last.id).encode())


def _blueprint(session: Session, blueprint_id: str) -> BlueprintRow:
    row = session.get(BlueprintRow, blueprint_id)
    if row is None:
        raise UnknownBlueprintError(f"there is no blueprint {blueprint_id!r} in this store; submit it first")
    return row


def _row(session: Session, artifact_id: str) -> KernelRow:
    row = session.get(KernelRow, artifact_id)
    if row is None:
        raise _unknown(session, artifact_id)
    return row


def _by_prefix(session: Session, prefix: str) -> str:
    within = (KernelRow.id >= prefix, KernelRow.id < prefix + "g")
    found = session.scalars(
        select(KernelRow.id).where(*within, KernelRow.status == KernelStatus.VALIDATED).limit(2)
    ).all()
    if not found:
        raise UnknownKernelReferenceError(f"no kernel's id starts with {prefix!r}")
    if len(found) > 1:
        raise AmbiguousPrefixError(f"the ids of several kernels start with {prefix!r}; give more digits")
    return found[0]


def _by_name(session: Session, name: str) -> str:
    given = session.get(NameRow, name)
    if given is None:
        raise UnknownKernelReferenceError(
            f"no kernel is called {name[:120]!r}; a reference is a full id, its first {MIN_PREFIX} or more hex digits, "
            "or a name that was given at submission"
        )
    blueprint = _blueprint(session, given.blueprint_id)
    kernel = None if blueprint.artifact_id is None else session.get(KernelRow, blueprint.artifact_id)
    if kernel is None:
        raise UnknownKernelReferenceError(f"{name!r} has no kernel to load: its blueprint is {blueprint.status}")
    if kernel.status != KernelStatus.VALIDATED:
        raise UnknownKernelReferenceError(
            f"the kernel called {name!r} is {kernel.status}; use its full id, {kernel.id}"
        )
    return kernel.id


def _unknown(session: Session, artifact_id: str) -> UnknownKernelReferenceError:
    blueprint = session.get(BlueprintRow, artifact_id)
    if blueprint is None:
        return UnknownKernelReferenceError(f"there is no kernel {artifact_id!r} in this store")
    hint = f"its kernel is {blueprint.artifact_id}" if blueprint.artifact_id else f"it is {blueprint.status}"
    return UnknownKernelReferenceError(f"{artifact_id} is the id of a blueprint, not of a kernel; {hint}")


def _kernel(row: KernelRow) -> CompiledKernelArtifact:
    metadata = KernelMetadata.model_validate({name: getattr(row, name) for name in KernelMetadata.model_fields})
    names = row.blueprint.names
    return CompiledKernelArtifact(
        id=row.id,
        blueprint_id=row.blueprint_id,
        name=names[0].name if names else None,
        in_features=row.in_features,
        out_features=row.out_features,
        dtype=row.dtype,
        size_bytes=row.size_bytes,
        status=KernelStatus(row.status),
        created_at=as_datetime(row.created_at),
        metadata=metadata,
        report=ValidationReport.model_validate(row.report),
        latency_us=row.latency_us,
        attachments=tuple(each.target_key for each in row.attachments),
    )
