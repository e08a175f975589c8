"""Blueprints in the store: submission, names, claims and status."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from esper.artifacts import Blueprint
from esper.contracts.validation import ValidationReport
from esper.services import ids
from esper.services.contracts import BlueprintRecord, BlueprintStatus, Claim
from esper.services.errors import (
    ClaimLostError,
    IllegalTransitionError,
    NameTakenError,
    StoreBusyError,
    UnknownBlueprintError,
)
from esper.services.ids import check_name
from esper.services.stores import LEASE_SECONDS
from esper.services.urza.storage.blob_references import keep_blob
from esper.services.urza.storage.blobs import BlobStore
from esper.services.urza.storage.database import Database
from esper.services.urza.storage.models import BlueprintRow, KernelRow, NameRow, SignatureRow
from esper.services.urza.storage.paging import Cursor, Page

__all__ = ["BlueprintRecords", "Submission", "as_datetime"]

_MAX_ATTEMPTS = 3
"""A blueprint whose worker vanished this many times is invalid: it probably takes its worker down."""

_LEGAL = {
    BlueprintStatus.UNVALIDATED: (BlueprintStatus.COMPILING,),
    BlueprintStatus.COMPILING: (BlueprintStatus.VALIDATED, BlueprintStatus.INVALID),
}


def as_datetime(seconds: float) -> datetime:
    """Seconds since 1970 as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


class Submission(NamedTuple):
    """A submitted blueprint, and whether it is there for the first time."""

    record: BlueprintRecord
    is_new: bool


class BlueprintRecords:
    """The part of the store that workers and submitters change. Safe for threads and processes."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs

    def submit(self, blueprint: Blueprint, name: str | None = None) -> BlueprintRecord:
        """Store `blueprint`, once however often it is submitted, under `name` too if that is given.

        A blueprint may have several names. Raises :class:`NameTakenError` if `name` stands for another blueprint (an
        invalid one loses it), and ``InvalidNameError``; nothing is submitted then.
        """
        return self.put(blueprint, name).record

    def put(self, blueprint: Blueprint, name: str | None = None) -> Submission:
        """What :meth:`submit` does, and whether the blueprint was not there before."""
        if name is not None:
            check_name(name)
        document = blueprint.to_json().encode()
        digest = self._blobs.put(document)
        for _ in range(3):  # where two processes insert the same row at once (PostgreSQL), the slower looks again
            try:
                with self._database.writing() as session:
                    keep_blob(session, self._blobs, digest, document)
                    row = session.get(BlueprintRow, blueprint.id)
                    is_new = row is None
                    if row is None:
                        row = _new_row(session, blueprint.id, digest)
                    if name is not None:
                        _give_name(session, row, name)
                    session.flush()
                    return Submission(_record(row), is_new)
            except IntegrityError:
                continue
        raise StoreBusyError(f"blueprint {blueprint.id} is being submitted by others; try again")

    def get(self, blueprint_id: str) -> BlueprintRecord:
        """Raises :class:`UnknownBlueprintError`."""
        with self._database.reading() as session:
            return _record(_row(session, blueprint_id))

    def document(self, blueprint_id: str) -> bytes:
        """The blueprint's canonical JSON. Raises :class:`UnknownBlueprintError`."""
        with self._database.reading() as session:
            digest = _row(session, blueprint_id).document
        return self._blobs.get(digest)

    def list(self, status_filter: BlueprintStatus | None = None, limit: int = 100) -> tuple[BlueprintRecord, ...]:
        """The `limit` blueprints submitted last, the latest first, of one status or of any."""
        return self.page(status_filter, limit).items

    def page(
        self, status_filter: BlueprintStatus | None = None, limit: int = 100, cursor: str | None = None
    ) -> Page[BlueprintRecord]:
        """What :meth:`list` returns, from where the page that came with `cursor` ended."""
        order = (BlueprintRow.submitted_at.desc(), BlueprintRow.id.desc())
        statement = select(BlueprintRow).order_by(*order).limit(limit + 1)
        if status_filter is not None:
            statement = statement.where(BlueprintRow.status == status_filter)
        if cursor is not None:
            statement = statement.where(Cursor.decode(cursor).behind(BlueprintRow.submitted_at, BlueprintRow.id))
        with self._database.reading() as session:
            rows = session.scalars(statement).all()
            items = tuple(_record(row) for row in rows[:limit])
            last = rows[limit - 1] if len(rows) > limit else None
        return Page(items, None if last is None else Cursor(last.submitted_at, last.id).encode())

    def claim(
        self, worker: str, *, lease_seconds: float = LEASE_SECONDS, blueprint_id: str | None = None
    ) -> Claim | None:
        """Take the blueprint that has waited longest, or the one asked for, if it is free; None if there is none.

        Free is what is being compiled by a worker whose lease ran out, which comes first, and what is unvalidated. No
        two workers get the same one. Leases are counted on the clock of the process that serves this store. Raises
        :class:`UnknownBlueprintError` for what cannot be an id.
        """
        if blueprint_id is not None:
            ids.blueprint_id(blueprint_id)
        with self._database.writing() as session:
            while True:
                now = time.time()
                row = _next_free(session, now, blueprint_id)
                if row is None:
                    return None
                if row.attempts < _MAX_ATTEMPTS:
                    return _claimed(row, worker, now, lease_seconds)
                kernel = session.scalar(select(KernelRow).where(KernelRow.blueprint_id == row.id).limit(1))
                if kernel is not None:  # a worker validated and stored it, and could not say so any more
                    report = ValidationReport.model_validate(kernel.report)
                    _finish(row, BlueprintStatus.VALIDATED, now, report=report, artifact_id=kernel.id)
                else:
                    reason = f"its worker vanished {row.attempts} times while compiling it"
                    _finish(row, BlueprintStatus.INVALID, now, reason=reason)
                session.flush()

    def renew(self, claim: Claim, *, lease_seconds: float = LEASE_SECONDS) -> Claim:
        """Extend the lease, counted from now. Raises :class:`ClaimLostError`."""
        with self._database.writing() as session:
            row = _held(session, claim.blueprint_id, claim.token)
            row.lease_expires_at = time.time() + lease_seconds
            return claim.model_copy(update={"expires_at": as_datetime(row.lease_expires_at)})

    def release(self, claim: Claim) -> None:
        """Give the blueprint back unfinished, as if it had not been claimed. Does nothing if the claim was lost."""
        with self._database.writing() as session:
            row = session.get(BlueprintRow, claim.blueprint_id, with_for_update=True)
            if row is None or row.status != BlueprintStatus.COMPILING or row.claim_token != claim.token:
                return
            row.status = BlueprintStatus.UNVALIDATED
            row.attempts -= 1
            row.claim_token = row.lease_expires_at = None
            row.updated_at = time.time()

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
        """End the compilation of a claimed blueprint; `token` is the claim's.

        Only ``compiling -> validated | invalid`` is legal here (:meth:`claim` makes it compiling), and validated needs
        `artifact_id`, a kernel in the store. Raises :class:`IllegalTransitionError`, ``ClaimLostError``,
        ``UnknownBlueprintError``.
        """
        with self._database.writing() as session:
            row = _row(session, blueprint_id, lock=True)
            current = BlueprintStatus(row.status)
            if status not in _LEGAL.get(current, ()):
                raise IllegalTransitionError(
                    f"blueprint {blueprint_id} is {current}; it cannot become {status} "
                    "(legal: unvalidated -> compiling -> validated | invalid)"
                )
            if status is BlueprintStatus.COMPILING:
                raise IllegalTransitionError(f"blueprint {blueprint_id} becomes compiling by a claim; call claim()")
            if status is BlueprintStatus.VALIDATED and (
                artifact_id is None or session.get(KernelRow, artifact_id) is None
            ):
                raise IllegalTransitionError(
                    f"blueprint {blueprint_id} cannot become validated without its kernel; store {artifact_id} first"
                )
            _held(session, blueprint_id, token)
            _finish(row, status, time.time(), reason=reason, report=report, artifact_id=artifact_id)
            return _record(row)

    def recompile(self, blueprint_id: str, signers: Collection[str] = ()) -> BlueprintRecord:
        """Have a finished blueprint compiled again, unless its kernel is signed by one of `signers` by now.

        For readers who trust none of those that signed it, such as after a key was lost: `signers` are the ids of the
        keys that they do trust. The kernel that is there stays, under its names too, also if compiling it fails. What
        is not finished is left as it is. Raises :class:`UnknownBlueprintError`.
        """
        with self._database.writing() as session:
            row = _row(session, blueprint_id, lock=True)
            signed = select(SignatureRow.key_id).where(
                SignatureRow.artifact_id == row.artifact_id, SignatureRow.fits, SignatureRow.key_id.in_(signers)
            )
            if BlueprintStatus(row.status).is_final and session.scalar(signed.limit(1)) is None:
                _finish(row, BlueprintStatus.UNVALIDATED, time.time())
                row.attempts = 0
            return _record(row)

    def forget(self, blueprint_id: str) -> None:
        """Remove an invalid blueprint and its names, so that it may be submitted and compiled anew.

        For those that failed for lack of time or memory. A kernel that a worker stored before it vanished goes too.
        Raises :class:`IllegalTransitionError` if it is not invalid.
        """
        with self._database.writing() as session:
            row = _row(session, blueprint_id, lock=True)
            if row.status != BlueprintStatus.INVALID:
                raise IllegalTransitionError(
                    f"blueprint {blueprint_id} is {row.status}; only an invalid one is removed"
                )
            for kernel in session.scalars(select(KernelRow).where(KernelRow.blueprint_id == blueprint_id)):
                session.delete(kernel)
            session.flush()
            session.delete(row)

    def waiting(self, limit: int) -> tuple[str, ...]:
        """Ids of the `limit` blueprints that have waited longest and that :meth:`claim` would hand out."""
        statement = select(BlueprintRow.id).where(_claimable(time.time()))
        ordered = statement.order_by(BlueprintRow.submitted_at, BlueprintRow.id).limit(limit)
        with self._database.reading() as session:
            return tuple(session.scalars(ordered))

    def next_lease_end(self) -> float | None:
        """Seconds from now until the first lease of a blueprint in work runs out; None if none is in work."""
        statement = select(func.min(BlueprintRow.lease_expires_at)).where(
            BlueprintRow.status == BlueprintStatus.COMPILING
        )
        with self._database.reading() as session:
            earliest = session.scalar(statement)
        return None if earliest is None else max(0.0, earliest - time.time())


def _claimable(now: float) -> ColumnElement[bool]:
    return or_(BlueprintRow.status == BlueprintStatus.UNVALIDATED, _lease_ran_out(now))


def _lease_ran_out(now: float) -> ColumnElement[bool]:
    return and_(BlueprintRow.status == BlueprintStatus.COMPILING, BlueprintRow.lease_expires_at <= now)


def _next_free(session: Session, now: float, blueprint_id: str | None) -> BlueprintRow | None:
    """Two questions that an index answers, however many blueprints wait; one with an OR would sort them all."""
    for free in (_lease_ran_out(now), BlueprintRow.status == BlueprintStatus.UNVALIDATED):
        oldest = select(BlueprintRow).where(free).order_by(BlueprintRow.submitted_at, BlueprintRow.id).limit(1)
        if blueprint_id is not None:
            oldest = oldest.where(BlueprintRow.id == blueprint_id)
        row = session.scalar(oldest.with_for_update(skip_locked=True))
        if row is not None:
            return row
    return None


def _claimed(row: BlueprintRow, worker: str, now: float, lease_seconds: float) -> Claim:
    row.status = BlueprintStatus.COMPILING
    row.attempts += 1
    row.claim_token = secrets.token_hex(16)
    row.lease_expires_at = now + lease_seconds
    row.updated_at = now
    return Claim(
        blueprint_id=row.id,
        token=row.claim_token,
        worker=worker,
        attempt=row.attempts,
        expires_at=as_datetime(row.lease_expires_at),
    )


def _row(session: Session, blueprint_id: str, *, lock: bool = False) -> BlueprintRow:
    row = session.get(BlueprintRow, blueprint_id, with_for_update=True if lock else None)
    if row is None:
        raise UnknownBlueprintError(f"there is no blueprint {blueprint_id!r} in this store; submit it")
    return row


def _held(session: Session, blueprint_id: str, token: str) -> BlueprintRow:
    row = _row(session, blueprint_id, lock=True)
    if row.status != BlueprintStatus.COMPILING or row.claim_token != token:
        raise ClaimLostError(f"the lease on blueprint {blueprint_id} ran out and it is no longer this worker's")
    return row


def _new_row(session: Session, blueprint_id: str, document: str) -> BlueprintRow:
    now = time.time()
    row = BlueprintRow(
        id=blueprint_id,
        document=document,
        status=BlueprintStatus.UNVALIDATED,
        reason="",
        attempts=0,
        submitted_at=now,
        updated_at=now,
        names=[],
    )
    session.add(row)
    return row


def _give_name(session: Session, row: BlueprintRow, name: str) -> None:
    taken = session.get(NameRow, name, with_for_update=True)
    if taken is not None and taken.blueprint_id == row.id:
        return
    if taken is not None:
        owner = _row(session, taken.blueprint_id)
        if owner.status != BlueprintStatus.INVALID or owner.artifact_id is not None:
            raise NameTakenError(f"the name {name!r} stands for blueprint {owner.id[:12]} already; choose another name")
        owner.names.remove(taken)  # nothing can be loaded under the name of an invalid blueprint
        session.flush()
    row.names.append(NameRow(name=name, created_at=time.time()))


def _finish(
    row: BlueprintRow,
    status: BlueprintStatus,
    now: float,
    *,
    reason: str = "",
    report: ValidationReport | None = None,
    artifact_id: str | None = None,
) -> None:
    row.status = status
    row.reason = reason
    row.report = None if report is None else report.model_dump(mode="json")
    row.artifact_id = artifact_id or row.artifact_id  # of an earlier compilation
    row.claim_token = row.lease_expires_at = None
    row.updated_at = now


def _record(row: BlueprintRow) -> BlueprintRecord:
    return BlueprintRecord(
        id=row.id,
        names=tuple(each.name for each in row.names),
        status=BlueprintStatus(row.status),
        reason=row.reason,
        report=None if row.report is None else ValidationReport.model_validate(row.report),
        artifact_id=row.artifact_id,
        attempts=row.attempts,
        lease_expires_at=None if row.lease_expires_at is None else as_datetime(row.lease_expires_at),
        submitted_at=as_datetime(row.submitted_at),
        updated_at=as_datetime(row.updated_at),
    )
