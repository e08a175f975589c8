"""Folders that cannot be used and databases that are not ours: a clear error, and nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.services.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreSchemaError,
)
from esper.services.urza import UrzaStore
from tests.services.programs import forked, obey_permissions
from tests.services.shelf import add_kernel, blueprint

needs_posix = pytest.mark.skipif(os.name != "posix", reason="permissions, resource limits and mounts as on POSIX")


def open_unprivileged(folder: Path) -> None:
    obey_permissions()
    UrzaStore.in_folder(folder)


def submit_unprivileged(folder: Path) -> None:
    obey_permissions()
    UrzaStore.in_folder(folder).blueprints.submit(blueprint(1), "mine")


def submit_with_file_limit(folder: Path, limit: int) -> None:
    import resource

    opened = UrzaStore.in_folder(folder) if (folder / "esper.db").exists() else None
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    (opened or UrzaStore.in_folder(folder)).blueprints.submit(blueprint(1), "too-much")


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestSchema:
    def test_a_newer_schema_is_refused_and_nothing_touched(self, folder: Path) -> None:
        with UrzaStore.in_folder(folder) as store:
            add_kernel(store, blueprint())
        with sqlite3.connect(folder / "esper.db") as database:
            database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.close()
        before = contents(folder)
        with pytest.raises(StoreSchemaError, match=r"has schema 9999.*update esper-fx"):
            UrzaStore.in_folder(folder)
        assert contents(folder) == before

    def test_a_database_of_something_else_is_refused_and_nothing_touched(self, folder: Path) -> None:
        folder.mkdir()
        with sqlite3.connect(folder / "esper.db") as database:
            database.execute("CREATE TABLE photographs (id INTEGER)")
        database.close()
        before = contents(folder)
        with pytest.raises(StoreSchemaError, match="photographs"):
            UrzaStore.in_folder(folder)
        assert contents(folder) == before

    def test_a_file_that_is_no_database_is_refused_and_nothing_touched(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "esper.db").write_bytes(b"not a database, and long enough to be looked at as one" * 100)
        before = contents(folder)
        with pytest.raises(StoreCorruptError, match="not an SQLite database"):
            UrzaStore.in_folder(folder)
        assert contents(folder) == before

    def test_a_database_that_no_migration_has_finished_is_completed(self, folder: Path) -> None:
        folder.mkdir()
        sqlite3.connect(folder / "esper.db").close()
        (folder / "esper.db").touch()
        with UrzaStore.in_folder(folder) as store:
            assert store.blueprints.submit(blueprint()).id == blueprint().id

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "no url at all"])
    def test_a_url_that_cannot_be_shared_or_read_is_refused(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(StoreError, match="sqlite:////folder"):
            UrzaStore(url, tmp_path)

    def test_the_tables_of_the_migrations_are_those_of_the_models(self, folder: Path) -> None:
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext
        from sqlalchemy import create_engine

        from esper.services.urza.storage.models import Base

        UrzaStore.in_folder(folder).close()
        engine = create_engine(f"sqlite:///{folder / 'esper.db'}")
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        engine.dispose()


class TestReadOnly:
    def test_a_folder_below_a_file_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("I am a file")
        with pytest.raises(StoreReadOnlyError, match="choose another root"):
            UrzaStore.in_folder(tmp_path / "file" / "store")
        assert contents(tmp_path) == {"file": hashlib.sha256(b"I am a file").hexdigest()}

    @needs_posix
    @pytest.mark.parametrize("existing", [False, True])
    def test_a_read_only_folder_is_named_and_nothing_changed(self, folder: Path, existing: bool) -> None:
        folder.mkdir()
        if existing:
            UrzaStore.in_folder(folder).close()
        before = contents(folder)
        folder.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)
        try:
            with pytest.raises(StoreReadOnlyError, match="choose another root") as caught:
                forked(open_unprivileged, folder)
        finally:
            folder.chmod(0o755)
        assert str(folder / "esper.db") in str(caught.value)
        assert contents(folder) == before

    @needs_posix
    def test_read_only_blobs_refuse_a_submission_whole(self, folder: Path) -> None:
        UrzaStore.in_folder(folder).close()
        (folder / "blobs").mkdir(mode=0o555)
        with pytest.raises(StoreReadOnlyError, match="cannot be written"):
            forked(submit_unprivileged, folder)
        with UrzaStore.in_folder(folder) as store:
            assert store.blueprints.list() == ()


@needs_posix
class TestFull:
    """A limit on the size of files stands in for a disk that is full: the write fails half way, as root too."""

    def test_a_store_that_cannot_be_made_is_made_later(self, folder: Path) -> None:
        with pytest.raises(StoreFullError, match="free space"):
            forked(submit_with_file_limit, folder, 8192)
        with UrzaStore.in_folder(folder) as store:
            assert store.blueprints.submit(blueprint(1), "too-much").names == ("too-much",)

    @pytest.mark.parametrize("limit", [64, 4096], ids=["blob", "database"])
    def test_a_submission_that_does_not_fit_leaves_no_trace(self, folder: Path, limit: int) -> None:
        with UrzaStore.in_folder(folder) as store:
            artifact, _ = add_kernel(store, blueprint(0), "mine")
            before = store.stats()
        with pytest.raises(StoreFullError, match="free"):
            forked(submit_with_file_limit, folder, limit)
        with UrzaStore.in_folder(folder) as store:
            assert store.stats() == before
            assert store.kernels.content(store.kernels.resolve("mine"))[0] == artifact.data
            assert not [name for name in contents(folder) if "/." in name], "unfinished files were left"
            assert store.blueprints.submit(blueprint(1), "too-much").names == ("too-much",)

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user cannot mount a file system")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    def test_a_disk_that_fills_up_says_so_and_keeps_what_it_has(self, small_disk: Path) -> None:
        with UrzaStore.in_folder(small_disk / "store") as store:
            artifact, _ = add_kernel(store, blueprint(0))
            ballast = small_disk / "ballast"
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            with pytest.raises(StoreFullError):
                store.blueprints.submit(blueprint(1))
            assert [each.id for each in store.blueprints.list()] == [blueprint(0).id]
            assert store.kernels.content(artifact.id)[0] == artifact.data
            ballast.unlink()
            assert store.blueprints.submit(blueprint(1)).id == blueprint(1).id


def test_a_database_that_stays_locked_is_an_error_after_the_busy_time(folder: Path) -> None:
    UrzaStore.in_folder(folder).close()
    holder = sqlite3.connect(folder / "esper.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with UrzaStore(f"sqlite:///{folder / 'esper.db'}", folder / "blobs", busy_seconds=0.1) as store:
        assert store.blueprints.list() == (), "readers are not held up"
        with pytest.raises(StoreBusyError, match="try again"):
            store.blueprints.submit(blueprint())
        holder.execute("ROLLBACK")
        assert store.blueprints.submit(blueprint()).id == blueprint().id
    holder.close()
