"""Kernels in the store: artifacts, their attachments, and how to find them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, bindparam, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from esper.artifacts import Attachment, Signature, artifact_message
from esper.contracts.validation import LatencyMeasurement, ValidationReport
from esper.services.contracts import (
    CompiledKernelArtifact,
    KernelMetadata,
    KernelQuery,
    KernelSignature,
    KernelStatus,
)
from esper.services.errors import (
    AmbiguousPrefixError,
    StoreBusyError,
    TooManySignaturesError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)
from esper.services.ids import MIN_PREFIX, is_full_id, is_id_prefix
from esper.services.stores import KernelFile
from esper.services.urza.storage.blob_references import keep_blob
from esper.services.urza.storage.blobs import BlobStore
from esper.services.urza.storage.blueprints import as_datetime
from esper.services.urza.storage.database import Database
from esper.services.urza.storage.models import AttachmentRow, BlueprintRow, KernelRow, NameRow, SignatureRow
from esper.services.urza.storage.paging import Cursor, Page

__all__ = ["SIGNATURES_OF_ALL", "SIGNATURES_OF_ONE", "KernelRecords", "representative_latency"]

SIGNATURES_OF_ONE = 8
"""How many keys' signatures of a kernel, or attachments for a target, one token may store."""
SIGNATURES_OF_ALL = 32
"""How many all tokens together may; what carries them has to fit into the head of an answer."""
_TYPICAL_ROWS = 32
_MOST_AT_ONCE = 256  # ids in one question


def representative_latency(measurements: Sequence[LatencyMeasurement]) -> float | None:
    """One number of many, in microseconds; see `CompiledKernelArtifact.latency_us`."""
    if not measurements:
        return None
    enough = [each for each in measurements if each.rows >= _TYPICAL_ROWS]
    chosen = min(enough, key=lambda each: each.rows) if enough else max(measurements, key=lambda each: each.rows)
    return chosen.graph_us if chosen.attachment_us is None else chosen.attachment_us


class KernelRecords:
    """The part of the store that kernels are loaded from. Safe for threads and processes."""

    def __init__(self, database: Database, blobs: BlobStore, trusted: Collection[str] = ()) -> None:
        """`trusted` are ids of keys whose signatures are kept however many there are."""
        self._database = database
        self._blobs = blobs
        self._trusted = frozenset(trusted)

    def add(
        self,
        data: bytes,
        signature: Signature | None,
        *,
        blueprint_id: str,
        metadata: KernelMetadata,
        report: ValidationReport,
        added_by: str = "",
    ) -> CompiledKernelArtifact:
        """Store a validated artifact under the SHA-256 of `data`. To one that is there already, add `signature`.

        Of each key one signature is kept: one that comes with the public key that it verifies by, if there is such a
        one. Whether it is worth anything is for those to say who load the kernel. Raises ``UnknownBlueprintError`` if
        the blueprint is not in the store, and ``TooManySignaturesError``: `added_by`, the name of a token, may add
        :data:`SIGNATURES_OF_ONE` for a kernel, and all together :data:`SIGNATURES_OF_ALL`. None is ever thrown out.
        """
        artifact_id = hashlib.sha256(data).hexdigest()
        self._blobs.put(data)
        for _ in range(3):  # the second time it is there: another worker was faster
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
                            report=report.model_dump(mode="json"),
                            latency_us=representative_latency(report.latencies),
                            created_at=time.time(),
                            signatures=[],
                            attachments=[],
                        )
                        session.add(row)
                    if signature is not None:
                        self._sign(row, signature, added_by)
                    session.flush()
                    return _kernel(row)
            except IntegrityError:
                continue
        raise StoreBusyError(f"kernel {artifact_id} is being stored by others; try again")

    def _sign(self, row: KernelRow, signature: Signature, added_by: str) -> None:
        fits = signature.fits(artifact_message(row.id))
        known = next((each for each in row.signatures if each.key_id == signature.key_id), None)
        if known is None:
            self._check_room(row.signatures, signature.key_id, added_by, f"signatures of kernel {row.id[:12]}")
            known = SignatureRow(key_id=signature.key_id, fits=False, created_at=time.time())
            row.signatures.append(known)
        elif known.fits or not fits:
            return
        known.document, known.fits, known.added_by = signature.to_json(), fits, added_by

    def _check_room(self, rows: Sequence[SignatureRow | AttachmentRow], signer: str, added_by: str, what: str) -> None:
        mine = sum(each.added_by == added_by for each in rows)
        if signer not in self._trusted and (mine >= SIGNATURES_OF_ONE or len(rows) >= SIGNATURES_OF_ALL):
            raise TooManySignaturesError(
                f"there are {len(rows)} {what} by different keys, {mine} of them from this token; at most "
                f"{SIGNATURES_OF_ALL} are kept, and {SIGNATURES_OF_ONE} of a token, except of the keys that Urza's own "
                f"platform.trusted_keys has: put the key {signer[:12]} there"
            )

    def add_attachment(self, attachment: Attachment, *, added_by: str = "") -> None:
        """Store compiled code beside its artifact, in place of the same signer's for the same target.

        One that comes with the public key that its signature verifies by gives way to such a one only. Raises
        :class:`UnknownKernelReferenceError` if the artifact is not in the store, and ``TooManySignaturesError``.
        """
        signer, fits = attachment.signature.key_id, attachment.signature.fits(attachment.message)
        data = attachment.pack()
        digest = self._blobs.put(data)
        for _ in range(3):  # where two workers insert the same row at once (PostgreSQL), the slower looks again
            try:
                with self._database.writing() as session:
                    others = [
                        each
                        for each in _row(session, attachment.artifact_id).attachments
                        if each.target_key == attachment.target.key
                    ]
                    known = next((each for each in others if each.key_id == signer), None)
                    if known is None:
                        self._check_room(others, signer, added_by, f"attachments for {attachment.target.key}")
                    elif known.fits and not fits:
                        return
                    keep_blob(session, self._blobs, digest, data)
                    session.merge(
                        AttachmentRow(
                            artifact_id=attachment.artifact_id,
                            target_key=attachment.target.key,
                            key_id=signer,
                            fits=fits,
                            added_by=added_by,
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

    def content(self, artifact_id: str) -> tuple[bytes, tuple[Signature, ...]]:
        """The artifact's file, its hash checked, and its signatures, not checked.

        Raises :class:`UnknownKernelReferenceError` or ``StoreCorruptError``.
        """
        with self._database.reading() as session:
            file = _file(session, artifact_id)
        return self.read(artifact_id, file), file.signatures

    def files(self, artifact_ids: Sequence[str]) -> dict[str, KernelFile]:
        """What :meth:`read` wants to know of artifacts, by their ids; without those that are not in the store."""
        found: dict[str, KernelFile] = {}
        with self._database.reading() as session:
            for start in range(0, len(artifact_ids), _MOST_AT_ONCE):
                found |= _files(session, artifact_ids[start : start + _MOST_AT_ONCE])
        return found

    def read(self, artifact_id: str, file: KernelFile) -> bytes:
        """The artifact's file, its hash checked. Raises ``StoreCorruptError``."""
        return self._blobs.get(artifact_id, file.size)

    def signatures(self, artifact_id: str) -> tuple[Signature, ...]:
        """The artifact's signatures, one of each key, not checked. Raises :class:`UnknownKernelReferenceError`."""
        with self._database.reading() as session:
            return _file(session, artifact_id).signatures

    def attachment(self, artifact_id: str, target_key: str, signers: Collection[str] | None = None) -> bytes | None:
        """The packed attachment for a target, its signature not checked; None if there is none.

        Of several, one by a key whose id is among `signers`, if there is such a one; and the one stored last.
        """
        with self._database.reading() as session:
            wanted = {"artifact_id": artifact_id, "target_key": target_key}
            rows = session.connection().execute(_ATTACHED, wanted).all()
        if not rows:
            return None
        trusted = frozenset(signers or ())
        best = max(rows, key=lambda each: (each.key_id in trusted, not each.key_id, each.fits, each.created_at))
        digest, size = best.document, best.size_bytes
        return self._blobs.get(digest, size)

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


_kernels, _signed, _attached = (kind.__table__.c for kind in (KernelRow, SignatureRow, AttachmentRow))
_FILES = (  # of columns, for good: to make it of classes at each call takes twice as long as to ask
    select(_kernels.id, _kernels.size_bytes, _signed.document)
    .select_from(KernelRow.__table__.outerjoin(SignatureRow.__table__))
    .where(_kernels.id.in_(bindparam("artifact_ids", expanding=True)))
    .order_by(_signed.created_at, _signed.key_id)
)
_ATTACHED = select(
    _attached.key_id, _attached.fits, _attached.created_at, _attached.document, _attached.size_bytes
).where(_attached.artifact_id == bindparam("artifact_id"), _attached.target_key == bindparam("target_key"))


def _file(session: Session, artifact_id: str) -> KernelFile:
    """An artifact's size in bytes and its signatures: of a record no more than trainers wait for."""
    found = _files(session, [artifact_id])
    if artifact_id not in found:
        raise _unknown(session, artifact_id)
    return found[artifact_id]


def _files(session: Session, artifact_ids: Sequence[str]) -> dict[str, KernelFile]:
    """Of those that are there."""
    found: dict[str, KernelFile] = {}
    for artifact_id, size, document in session.connection().execute(_FILES, {"artifact_ids": list(artifact_ids)}):
        signed = () if document is None else (Signature.from_json(document),)
        found[artifact_id] = KernelFile(
            size, found[artifact_id].signatures + signed if artifact_id in found else signed
        )
    return found


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


def _signatures(row: KernelRow) -> tuple[Signature, ...]:
    return tuple(Signature.from_json(each.document) for each in row.signatures)


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
        signatures=tuple(KernelSignature.of(each) for each in _signatures(row)),
        attachments=tuple(dict.fromkeys(each.target_key for each in row.attachments)),
    )
