"""What is removed, what is kept, and that nothing is lost to those who upload meanwhile."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from esper.artifacts import Artifact, Attachment, SigningKey, Target, build_artifact
from esper.services.contracts import KernelStatus
from esper.services.errors import UnknownBlueprintError, UnknownKernelReferenceError
from esper.services.urza import UrzaStore
from esper.services.urza.storage.models import KernelRow
from esper.services.urza.storage.retention import collect
from tests.services.older_schema import as_left_by
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza
from tests.services.urza_server_calls import record_of, submit, upload

TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")
DAY = 86_400.0


@pytest.fixture
def store(any_store: UrzaStore) -> UrzaStore:
    """In place of the one over SQLite alone."""
    return any_store


def retire(store: UrzaStore, artifact: Artifact, days_ago: float = 0.0) -> None:
    store.kernels.set_status(artifact.id, KernelStatus.RETIRED)
    with store.database.writing() as session:
        since = time.time() - days_ago * DAY
        session.execute(update(KernelRow).where(KernelRow.id == artifact.id).values(retired_at=since))


def age(folder: Path, hours: float = 2.0) -> None:
    """Have every file look as if it had been written that long ago."""
    for path in (folder / "blobs").rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - hours * 3600,) * 2)


def files(folder: Path) -> set[str]:
    return {path.parent.name + path.name for path in (folder / "blobs").rglob("*") if path.is_file()}


class TestKernels:
    def test_one_retired_long_ago_goes_with_all_that_is_its_own(self, store: UrzaStore, folder: Path) -> None:
        gone, _ = add_kernel(store, blueprint(1))
        kept, _ = add_kernel(store, blueprint(2))
        key = SigningKey.generate()
        store.kernels.add_attachment(Attachment.create(gone.id, TARGET, b"code", key))
        retire(store, gone, days_ago=40)
        age(folder)
        report = collect(store, keep_days=30)
        assert (report.kernels, report.blueprints) == ((gone.id,), (blueprint(1).id,))
        assert (report.attachments, report.blobs, report.dry_run) == (1, 3, False)
        with pytest.raises(UnknownKernelReferenceError):
            store.kernels.get(gone.id)
        with pytest.raises(UnknownBlueprintError):
            store.blueprints.get(blueprint(1).id)
        assert store.kernels.content(kept.id)[0] == kept.data
        assert len(files(folder)) == 2

    def test_what_it_was_made_from_can_be_submitted_and_compiled_anew(self, store: UrzaStore, folder: Path) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        retire(store, artifact, days_ago=1)
        age(folder)
        assert collect(store, keep_days=0).kernels == (artifact.id,)
        again, _ = add_kernel(store, blueprint(1))
        assert store.kernels.content(again.id)[0] == artifact.data

    @pytest.mark.parametrize("why", ["in use", "retired lately", "named", "brought back"])
    def test_others_are_kept(self, store: UrzaStore, folder: Path, why: str) -> None:
        artifact, _ = add_kernel(store, blueprint(1), "mine" if why == "named" else None)
        if why != "in use":
            retire(store, artifact, days_ago=29 if why == "retired lately" else 1000)
        if why == "brought back":
            store.kernels.set_status(artifact.id, KernelStatus.VALIDATED)
        age(folder, hours=1e5)
        before = store.stats()
        report = collect(store, keep_days=30)
        assert (report.kernels, report.blobs, report.bytes) == ((), 0, 0)
        assert store.stats() == before
        assert store.kernels.content(artifact.id)[0] == artifact.data

    def test_the_time_is_counted_from_the_last_retirement(self, store: UrzaStore, folder: Path) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        retire(store, artifact, days_ago=100)
        store.kernels.set_status(artifact.id, KernelStatus.RETIRED)  # already is: the time stays
        assert collect(store, keep_days=30, dry_run=True).kernels == (artifact.id,)
        store.kernels.set_status(artifact.id, KernelStatus.VALIDATED)
        store.kernels.set_status(artifact.id, KernelStatus.RETIRED)
        assert collect(store, keep_days=30, dry_run=True).kernels == ()

    def test_a_blueprints_own_kernel_goes_after_its_others(self, store: UrzaStore, folder: Path) -> None:
        main, kernel = add_kernel(store, blueprint(1))
        other = build_artifact(blueprint(1), toolchain={"torch": "9.9"})
        report = kernel.report.model_copy(update={"artifact_id": other.id})
        store.kernels.add(other.data, None, blueprint_id=blueprint(1).id, metadata=kernel.metadata, report=report)
        retire(store, main, days_ago=2)
        assert collect(store, keep_days=1).kernels == (), "its blueprint has a kernel in use"
        retire(store, other, days_ago=2)
        assert collect(store, keep_days=1).kernels == (other.id,)
        assert collect(store, keep_days=1).kernels == (main.id,)
        assert store.stats().kernels == 0

    def test_a_dry_run_says_what_would_go_and_changes_nothing(self, store: UrzaStore, folder: Path) -> None:
        gone, _ = add_kernel(store, blueprint(1))
        add_kernel(store, blueprint(2))
        retire(store, gone, days_ago=2)
        store.blobs.put(b"nobody's")
        age(folder)
        before, there = store.stats(), files(folder)
        foretold = collect(store, keep_days=1, dry_run=True)
        assert (store.stats(), files(folder)) == (before, there)
        assert foretold.dry_run
        assert collect(store, keep_days=1) == foretold.model_copy(update={"dry_run": False})
        assert len(there - files(folder)) == foretold.blobs == 3

    @pytest.mark.parametrize("days", [-1.0, float("nan")])
    def test_nonsense_is_refused(self, store: UrzaStore, days: float) -> None:
        with pytest.raises(ValueError, match="keep_days"):
            collect(store, keep_days=days)


class TestFiles:
    def test_old_ones_that_nothing_refers_to_go(self, store: UrzaStore, folder: Path) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        stray = store.blobs.put(b"stray")
        unfinished = folder / "blobs" / "ab" / f".{'0' * 16}.{'1' * 16}"
        unfinished.parent.mkdir(exist_ok=True)
        unfinished.write_bytes(b"half")
        foreign = folder / "blobs" / "README"
        foreign.write_text("not ours")
        age(folder)
        fresh = store.blobs.put(b"fresh")
        report = collect(store, keep_days=0)
        assert (report.blobs, report.bytes) == (2, len(b"stray") + len(b"half"))
        left = files(folder)
        assert fresh in left
        assert stray not in left
        assert artifact.id in left
        assert not unfinished.exists()
        assert foreign.exists()
        age(folder)
        assert collect(store, keep_days=0).blobs == 1, "after an hour it goes, too"

    def test_an_empty_store(self, store: UrzaStore) -> None:
        assert collect(store, keep_days=0).blobs == 0

    def test_many(self, store: UrzaStore, folder: Path) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        for number in range(450):
            store.blobs.put(str(number).encode())
        age(folder)
        assert collect(store, keep_days=0).blobs == 450
        assert files(folder) >= {artifact.id}


@pytest.mark.slow
def test_uploads_that_race_with_the_collection_are_whole(store: UrzaStore, folder: Path) -> None:
    """Artifacts lie there unreferenced and old, as an upload that failed leaves them, when they are uploaded again."""
    artifacts = [build_artifact(blueprint(seed)) for seed in range(40)]
    for artifact in artifacts:
        store.blobs.put(artifact.data)
    age(folder)
    done = threading.Event()

    def collecting() -> None:
        while not done.is_set():
            collect(store, keep_days=0)

    collector = threading.Thread(target=collecting)
    with RunningUrza(store) as urza, urza.client() as client:
        collector.start()
        try:
            for seed, artifact in enumerate(artifacts):
                submit(client, blueprint(seed))
                assert upload(client, record_of(artifact), artifact.data).status_code == 201
                age(folder)
        finally:
            done.set()
            collector.join(60)
        for seed, artifact in enumerate(artifacts):
            assert client.get(f"/api/v1/kernels/{artifact.id}/content").content == artifact.data
            assert client.get(f"/api/v1/blueprints/{blueprint(seed).id}/document").status_code == 200


def test_kernels_retired_before_their_time_was_noted_are_kept_from_the_update_on(folder: Path) -> None:
    with UrzaStore.in_folder(folder) as store:
        artifact, _ = add_kernel(store, blueprint(1))
        retire(store, artifact)
        as_left_by("0001", store)
    with UrzaStore.in_folder(folder) as store:
        assert store.schema_version == "0003"
        assert collect(store, keep_days=1, dry_run=True).kernels == ()
        assert collect(store, keep_days=0, dry_run=True).kernels == (artifact.id,)
