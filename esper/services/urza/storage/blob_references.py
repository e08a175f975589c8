"""Blobs and the rows that name them: a blob is never removed while a row that names it is being written.

Who writes such a row and who removes blobs take turns. On SQLite the write lock sees to that, which every writing
transaction holds from its start; on PostgreSQL an advisory lock does, which writers share.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from esper.services.urza.storage.blobs import BlobStore
from esper.services.urza.storage.models import AttachmentRow, BlueprintRow, KernelRow

__all__ = ["keep_blob", "lock_blobs", "referenced"]

_LOCK = 0x45535045  # "ESPE"; a number that nothing else in this database locks


def keep_blob(session: Session, blobs: BlobStore, digest: str, data: bytes) -> None:
    """Call it in the transaction that writes a row naming the blob: it is there when the transaction ends."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock_shared(:lock)"), {"lock": _LOCK})
    if not blobs.exists(digest):  # it was removed between being put there and here
        blobs.put(data)


def lock_blobs(session: Session) -> None:
    """Until this transaction ends, no other one writes a row that names a blob."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def referenced(session: Session, digests: Iterable[str]) -> set[str]:
    """Those of `digests` that a row names."""
    wanted = list(digests)
    found: set[str] = set()
    for column in (BlueprintRow.document, KernelRow.id, AttachmentRow.document):
        found.update(session.scalars(select(column).where(column.in_(wanted))))
    return found
