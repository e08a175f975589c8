"""Removal of what the store no longer needs: kernels retired long ago, and files that nothing refers to."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict
from sqlalchemy import ColumnElement, and_, exists, func, select
from sqlalchemy.orm import Session, aliased

from esper.services.contracts import KernelStatus
from esper.services.urza.storage.blob_references import lock_blobs, referenced
from esper.services.urza.storage.blobs import BlobStore, StoredBlob
from esper.services.urza.storage.database import Database
from esper.services.urza.storage.models import AttachmentRow, BlueprintRow, KernelRow, NameRow
from esper.services.urza.storage.store import UrzaStore

__all__ = ["CollectionReport", "collect"]

_DAY = 86_400.0
_HOUR = 3_600.0
_BATCH = 200
"""Rows or files that are removed in one transaction: others wait for it."""

_Item = TypeVar("_Item")


class CollectionReport(BaseModel):
    """What was removed, or would be."""

    model_config = ConfigDict(frozen=True)

    dry_run: bool
    kernels: tuple[str, ...]
    """Ids."""
    blueprints: tuple[str, ...]
    """Ids of those whose kernel was removed: submitted again, they are compiled again."""
    attachments: int
    blobs: int
    """Files: artifacts, attachments and documents, also those that were left unfinished."""
    bytes: int
    """Of these files."""

    def __str__(self) -> str:
        return (
            f"{len(self.kernels)} kernels, {len(self.blueprints)} blueprints, {self.attachments} attachments; "
            f"{self.blobs} files of {self.bytes / 2**20:.1f} MiB"
        )


def collect(store: UrzaStore, *, keep_days: float, dry_run: bool = False) -> CollectionReport:
    """Remove what nobody can want any more.

    These are kernels that have been retired for `keep_days` days and have no name, with their attachments and, when it
    has no other kernel, their blueprint; and files older than an hour that nothing refers to. Safe while others use the
    store, also while they upload the same content. Raises ``ValueError`` if `keep_days` is negative, and
    :class:`~esper.services.errors.StoreError`; what was removed until then stays removed, and nothing is left half so.
    """
    if not keep_days >= 0:
        raise ValueError(f"keep_days is {keep_days}; use 0 or more")
    database, blobs = store.database, store.blobs
    before = time.time() - keep_days * _DAY
    found = _removable(database, before)
    removed: list[_Removable] = []
    for batch in _batches(found):
        removed += batch if dry_run else _remove_kernels(database, [each.kernel for each in batch], before)
    freed = {digest for each in removed for digest in each.blobs} if dry_run else set()
    count = size = 0
    for stored in _batches(each for each in blobs.stored() if each.age_seconds > _HOUR):
        for blob in _remove_blobs(database, blobs, stored, freed, dry_run):
            count += 1
            size += blob.size_bytes
    return CollectionReport(
        dry_run=dry_run,
        kernels=tuple(each.kernel for each in removed),
        blueprints=tuple(each.blueprint for each in removed if each.blueprint is not None),
        attachments=sum(each.attachments for each in removed),
        blobs=count,
        bytes=size,
    )


@dataclass(frozen=True, slots=True)
class _Removable:
    kernel: str
    blueprint: str | None
    attachments: int
    blobs: tuple[str, ...]
    """Which nothing else may refer to once the rows are gone."""


def _may_go(before: float) -> ColumnElement[bool]:
    other = aliased(KernelRow)
    is_named = exists().where(NameRow.blueprint_id == KernelRow.blueprint_id)
    is_main = exists().where(BlueprintRow.id == KernelRow.blueprint_id, BlueprintRow.artifact_id == KernelRow.id)
    has_others = exists().where(other.blueprint_id == KernelRow.blueprint_id, other.id != KernelRow.id)
    return and_(
        KernelRow.status == KernelStatus.RETIRED,
        KernelRow.retired_at <= before,
        ~is_named,
        ~and_(is_main, has_others),  # a blueprint's own kernel goes last, and the blueprint with it
    )


def _removable(database: Database, before: float) -> list[_Removable]:
    with database.reading() as session:
        rows = session.scalars(select(KernelRow).where(_may_go(before)).order_by(KernelRow.id)).all()
        return [_describe(row) for row in rows]


def _describe(row: KernelRow) -> _Removable:
    goes_too = row.blueprint.artifact_id == row.id
    documents = [row.id, *(each.document for each in row.attachments)]
    return _Removable(
        kernel=row.id,
        blueprint=row.blueprint_id if goes_too else None,
        attachments=len(row.attachments),
        blobs=(*documents, row.blueprint.document) if goes_too else tuple(documents),
    )


def _remove_kernels(database: Database, kernels: list[str], before: float) -> list[_Removable]:
    removed = []
    with database.writing() as session:
        lock_blobs(session)
        chosen = select(KernelRow).where(KernelRow.id.in_(kernels), _may_go(before))  # somebody may have come for it
        for row in session.scalars(chosen.with_for_update(of=KernelRow)).all():
            description, blueprint = _describe(row), row.blueprint
            session.delete(row)
            session.flush()
            if description.blueprint is not None:
                session.delete(blueprint)
                session.flush()
            removed.append(description)
    return removed


def _remove_blobs(
    database: Database, blobs: BlobStore, stored: list[StoredBlob], freed: set[str], dry_run: bool
) -> list[StoredBlob]:
    """Those of `stored` that nothing refers to, counting the rows that name what is in `freed` as gone."""
    digests = [each.digest for each in stored if each.digest is not None]
    with database.reading() if dry_run else database.writing() as session:
        if not dry_run:
            lock_blobs(session)
        used = referenced(session, digests) - _unshared(session, freed & set(digests))
        unused = [each for each in stored if each.digest is None or each.digest not in used]
        if not dry_run:
            for blob in unused:
                if blob.digest is None:
                    blobs.remove_unfinished(blob)
                else:
                    blobs.remove(blob.digest)
    return unused


def _unshared(session: Session, digests: set[str]) -> set[str]:
    """Those of `digests` that rows of one kernel name at most. Equal attachments of two kernels are one blob."""
    count = select(AttachmentRow.document).where(AttachmentRow.document.in_(digests)).group_by(AttachmentRow.document)
    return digests - set(session.scalars(count.having(func.count(AttachmentRow.artifact_id.distinct()) > 1)))


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch
