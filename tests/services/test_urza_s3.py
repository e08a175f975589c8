"""A store whose tables are in PostgreSQL and whose blobs are in S3."""

from __future__ import annotations

from pathlib import Path

import boto3  # type: ignore[import-untyped]  # boto3 ships no types
import pytest

from esper.artifacts import Attachment, SigningKey, Target
from esper.services.contracts import KernelStatus
from esper.services.errors import StoreBusyError, StoreCorruptError, StoreReadOnlyError
from esper.services.urza import UrzaStore
from esper.services.urza.storage import retention
from esper.services.urza.storage.blobs import BlobStore
from esper.services.urza.storage.retention import collect
from tests.services.s3_server import s3_server
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, assert_problem
from tests.services.urza_server_calls import add_kernel as add_kernel_over_http
from tests.services.urza_server_calls import submit

TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")


def test_everything_that_is_stored_comes_back(s3_store: UrzaStore) -> None:
    with RunningUrza(s3_store) as urza, urza.client() as client:
        artifact = add_kernel_over_http(client, blueprint(1), "mine")
        attachment = Attachment.create(artifact.id, TARGET, b"machine code", SigningKey.generate())
        path = f"kernels/{artifact.id}/attachments/{TARGET.key}"
        assert client.put(f"/internal/v1/{path}", content=attachment.pack()).status_code == 204
        assert client.get(f"/api/v1/{path}").content == attachment.pack()
        content = client.get(f"/api/v1/kernels/{artifact.id}/content", headers={"Range": "bytes=10-"})
        assert (content.status_code, content.content) == (206, artifact.data[10:])
        document = client.get(f"/api/v1/blueprints/{blueprint(1).id}/document")
        assert document.content == blueprint(1).to_json().encode()
    stored = {each.digest: each.size_bytes for each in s3_store.blobs.stored()}
    assert len(stored) == 3
    assert stored[artifact.id] == len(artifact.data)


def test_a_blob_that_another_store_wrote_or_removed_is_noticed(s3_store: UrzaStore) -> None:
    digest = s3_store.blobs.put(b"one")
    assert s3_store.blobs.exists(digest)
    assert [each.digest for each in s3_store.blobs.stored()] == [digest]
    other = BlobStore(f"s3://{s3_store.blobs.root}")
    second = other.put(b"two")
    other.remove(digest)
    other.remove(digest)
    assert not s3_store.blobs.exists(digest)
    assert [each.digest for each in s3_store.blobs.stored()] == [second]
    with pytest.raises(StoreCorruptError, match="missing"):
        s3_store.blobs.get(digest)


def test_a_damaged_blob_is_not_handed_out_and_mended_by_the_next_upload(s3_store: UrzaStore) -> None:
    artifact, _ = add_kernel(s3_store, blueprint(1))
    bucket, _, folder = s3_store.blobs.root.partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{folder}/{artifact.id[:2]}/{artifact.id[2:]}", Body=b"damage")
    with pytest.raises(StoreCorruptError, match="other content"):
        s3_store.kernels.content(artifact.id)
    s3_store.blobs.put(artifact.data)
    assert s3_store.kernels.content(artifact.id)[0] == artifact.data


def test_what_nobody_needs_is_collected(s3_store: UrzaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, _ = add_kernel(s3_store, blueprint(1))
    kept, _ = add_kernel(s3_store, blueprint(2))
    s3_store.kernels.set_status(gone.id, KernelStatus.RETIRED)
    stray = s3_store.blobs.put(b"stray")
    assert collect(s3_store, keep_days=1).blobs == 0, "all of it was written lately"
    monkeypatch.setattr(retention, "_HOUR", -1.0)
    report = collect(s3_store, keep_days=0)
    assert (report.kernels, report.blobs) == ((gone.id,), 3)
    assert not s3_store.blobs.exists(stray)
    assert s3_store.kernels.content(kept.id)[0] == kept.data


@pytest.mark.slow
def test_an_s3_that_cannot_be_reached_is_told_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as environment:
        for name, value in environment.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore; s3fs tries again by itself
        store = UrzaStore(f"sqlite:///{folder / 'esper.db'}", environment["ESPER_STORE__URL"])
        submitted = store.blueprints.submit(blueprint(1))
    with store, RunningUrza(store) as urza, urza.client() as client:
        with pytest.raises(StoreBusyError, match="see that it can be reached"):
            store.blueprints.document(submitted.id)
        detail = assert_problem(submit(client, blueprint(2)), 503, "store-busy")
        assert "kernels/" not in detail
        assert [each["id"] for each in client.get("/api/v1/blueprints").json()["items"]] == [submitted.id]


def test_a_bucket_that_is_not_there(s3: str, folder: Path) -> None:
    with UrzaStore(f"sqlite:///{folder / 'esper.db'}", "s3://no-such-bucket/x") as store:
        with pytest.raises(StoreReadOnlyError, match="no-such-bucket/x does not exist"):
            store.blueprints.submit(blueprint(1))
        assert store.blueprints.list() == ()
