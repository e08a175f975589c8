"""Urza: the single source of truth about blueprints and kernels."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sqlalchemy import URL, func, select

from esper.services.contracts import BlueprintStatus, StoreStats
from esper.services.urza.storage.blobs import BlobStore
from esper.services.urza.storage.blueprints import BlueprintRecords
from esper.services.urza.storage.database import Database
from esper.services.urza.storage.kernels import KernelRecords
from esper.services.urza.storage.models import AttachmentRow, BlueprintRow, KernelRow
from esper.services.urza.storage.schema import prepare

__all__ = ["UrzaStore"]


class UrzaStore:
    """A database and a blob store. Blocking; safe for threads, for several processes at once, and after a fork.

    SQLite files must lie on a local disk: write-ahead mode does not work over network file systems. Every method raises
    :class:`~esper.services.errors.StoreError` or a subclass.
    """

    def __init__(
        self,
        database_url: str | URL,
        blob_url: str | Path,
        *,
        busy_seconds: float = 30.0,
        trusted_keys: Collection[str] = (),
    ) -> None:
        """`database_url` is SQLAlchemy's, `blob_url` fsspec's, or a folder. Missing tables are made.

        Signatures by `trusted_keys`, ids of keys, are kept however many others there are.

        Raises ``StoreSchemaError`` (newer schema), ``StoreReadOnlyError``, ``StoreFullError``, ``StoreCorruptError``.
        """
        self.database = Database(database_url, busy_seconds=busy_seconds)
        """The tables, for the other parts of Urza."""
        try:
            self.schema_version = prepare(self.database)
        except BaseException:
            self.database.close()
            raise
        self.blobs = BlobStore(blob_url)
        """The files, for the other parts of Urza."""
        self.blueprints = BlueprintRecords(self.database, self.blobs)
        self.kernels = KernelRecords(self.database, self.blobs, trusted_keys)

    @classmethod
    def in_folder(cls, folder: Path) -> UrzaStore:
        """The store in `folder`: `esper.db`, an SQLite database, and `blobs`. Made if missing."""
        folder = folder.absolute()
        return cls(URL.create("sqlite", database=str(folder / "esper.db")), folder / "blobs")

    def __enter__(self) -> UrzaStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections. Using the store again opens new ones."""
        self.database.close()

    def ping(self) -> None:
        """Raises :class:`~esper.services.errors.StoreError` if the database does not answer, or has lost its tables."""
        with self.database.reading() as session:
            session.execute(select(BlueprintRow.id).limit(1))

    def stats(self) -> StoreStats:
        """Counts and sizes."""
        with self.database.reading() as session:
            by_status = session.execute(select(BlueprintRow.status, func.count()).group_by(BlueprintRow.status))
            counts = {BlueprintStatus(status): count for status, count in by_status}
            kernels, artifact_bytes = session.execute(
                select(func.count(), func.coalesce(func.sum(KernelRow.size_bytes), 0))
            ).one()
            attachments, attachment_bytes = session.execute(
                select(func.count(), func.coalesce(func.sum(AttachmentRow.size_bytes), 0))
            ).one()
        return StoreStats(
            schema_version=self.schema_version,
            blueprints={status: counts.get(status, 0) for status in BlueprintStatus},
            kernels=kernels,
            attachments=attachments,
            artifact_bytes=int(artifact_bytes),
            attachment_bytes=int(attachment_bytes),
        )
