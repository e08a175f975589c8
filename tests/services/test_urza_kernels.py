"""Storing kernels and attachments, and finding them, in the store itself and over HTTP."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from esper.artifacts import (
    Attachment,
    Blueprint,
    SigningKey,
    Target,
    TrustStore,
    UntrustedArtifactError,
    artifact_message,
    build_artifact,
    load_artifact,
)
from esper.contracts.validation import LatencyMeasurement
from esper.services.contracts import BlueprintStatus, KernelQuery, KernelStatus
from esper.services.errors import (
    AmbiguousPrefixError,
    StoreCorruptError,
    StoreError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)
from esper.services.stores import Store
from esper.services.urza import UrzaStore
from tests.services.remote_stores import add, report_of
from tests.services.shelf import add_kernel, blueprint


def blob_of(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest[:2] / digest[2:]


class TestContent:
    def test_a_kernel_comes_back_as_it_was_stored_and_its_signature_holds(self, either: Store) -> None:
        key = SigningKey.generate()
        artifact, kernel = add_kernel(either, blueprint(), "small", key=key)
        data, (signature,) = either.kernels.content(artifact.id)
        loaded = load_artifact(data, expected_id=artifact.id, signature=signature, trust=TrustStore([key.public_bytes]))
        assert loaded.graph == artifact.graph
        assert kernel == either.kernels.get(artifact.id)
        assert (kernel.id, kernel.blueprint_id, kernel.name) == (artifact.id, blueprint().id, "small")
        assert (kernel.in_features, kernel.out_features, kernel.dtype) == (4, 4, "float32")
        assert kernel.size_bytes == len(artifact.data)
        assert kernel.metadata.graph_digest == artifact.graph.digest

    def test_a_stranger_signature_is_stored_and_refused_by_who_loads_it(self, either: Store) -> None:
        artifact, _ = add_kernel(either, blueprint(), key=SigningKey.generate())
        data, (signature,) = either.kernels.content(artifact.id)
        with pytest.raises(UntrustedArtifactError):
            load_artifact(data, signature=signature, trust=TrustStore([SigningKey.generate().public_bytes]))

    def test_many_are_found_in_one_go_with_all_who_signed_them(self, store: UrzaStore) -> None:
        keys = [SigningKey.generate() for _ in range(2)]
        kernels = [add_kernel(store, blueprint(seed), key=keys[0]) for seed in range(3)]
        artifacts = [artifact for artifact, _ in kernels]
        artifact, record = kernels[1]
        signature = keys[1].sign(artifact_message(artifact.id))
        origin = {"blueprint_id": record.blueprint_id, "metadata": record.metadata, "report": record.report}
        store.kernels.add(artifact.data, signature, **origin)
        found = store.kernels.files([artifacts[1].id, artifacts[0].id, "f" * 64])
        assert found.keys() == {artifacts[0].id, artifacts[1].id}
        for artifact in artifacts[:2]:
            file = found[artifact.id]
            assert (store.kernels.read(artifact.id, file), file.signatures) == store.kernels.content(artifact.id)
        assert [len(found[each.id].signatures) for each in artifacts[:2]] == [1, 2]
        assert store.kernels.files([]) == {}

    def test_storing_a_kernel_again_changes_nothing(self, either: Store) -> None:
        artifact, kernel = add_kernel(either, blueprint())
        again = either.kernels.add(
            artifact.data, None, blueprint_id=blueprint().id, metadata=kernel.metadata, report=kernel.report
        )
        assert again == kernel
        assert len(either.kernels.content(artifact.id)[1]) == 1

    def test_one_without_a_signature(self, either: Store) -> None:
        either.blueprints.submit(blueprint())
        artifact = build_artifact(blueprint())
        add(either, artifact, None, report_of(artifact))
        assert either.kernels.content(artifact.id) == (artifact.data, ())

    @pytest.mark.parametrize("show", [str, repr])
    def test_kernels_and_blueprints_are_printed_as_one_line_with_their_ids(
        self, store: UrzaStore, show: Callable[[object], str]
    ) -> None:
        _, kernel = add_kernel(store, blueprint(), "small")
        record = store.blueprints.get(kernel.blueprint_id)
        assert show(kernel) == f"CompiledKernelArtifact(small, 4 -> 4, float32, validated, id={kernel.id[:12]})"
        assert store.kernels.resolve(kernel.id[:12]) == kernel.id
        ours = f"small, validated, kernel={kernel.id[:12]}, id={record.id[:12]}"
        assert show(record) == f"BlueprintRecord({ours})"

    def test_a_kernel_needs_its_blueprint(self, either: Store) -> None:
        artifact = build_artifact(blueprint())
        with pytest.raises(UnknownBlueprintError, match="submit it first"):
            add(either, artifact, None, report_of(artifact))
        assert either.stats().kernels == 0

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_damaged_content_is_noticed(self, store: UrzaStore, folder: Path, damage: str) -> None:
        artifact, _ = add_kernel(store, blueprint())
        blob = blob_of(folder, artifact.id)
        if damage == "remove":
            blob.unlink()
        else:
            content = bytearray(blob.read_bytes())
            content[len(content) // 2] ^= 1
            blob.write_bytes(content if damage == "flip" else content[:-1])
        with pytest.raises(StoreCorruptError, match="restore it"):
            store.kernels.content(artifact.id)

    def test_storing_damaged_content_again_mends_it(self, store: UrzaStore, folder: Path) -> None:
        artifact, kernel = add_kernel(store, blueprint())
        blob_of(folder, artifact.id).write_bytes(b"")
        store.kernels.add(
            artifact.data, None, blueprint_id=blueprint().id, metadata=kernel.metadata, report=kernel.report
        )
        assert store.kernels.content(artifact.id)[0] == artifact.data

    def test_latency_is_that_of_thirty_two_rows_attachment_first(self, store: UrzaStore) -> None:
        measured = (
            LatencyMeasurement(rows=1, graph_us=5.0),
            LatencyMeasurement(rows=64, graph_us=9.0, attachment_us=4.0),
            LatencyMeasurement(rows=32, graph_us=8.0, attachment_us=3.0),
        )
        assert add_kernel(store, blueprint(0), latencies=measured)[1].latency_us == 3.0
        assert add_kernel(store, blueprint(1), latencies=measured[:1])[1].latency_us == 5.0
        assert add_kernel(store, blueprint(2))[1].latency_us is None


class TestReferences:
    def test_a_kernel_is_found_by_id_prefix_and_name(self, either: Store) -> None:
        artifact, _ = add_kernel(either, blueprint(), "small")
        either.blueprints.submit(blueprint(), "tiny")
        for reference in (artifact.id, artifact.id[:12], artifact.id[:40].upper(), "small", "tiny"):
            assert either.kernels.resolve(reference) == artifact.id

    @pytest.mark.parametrize(
        "reference", ["", "nothing", "0" * 11, "0" * 12, "0" * 64, "0" * 65, "../../etc", "%", "é"]
    )
    def test_an_unknown_reference_is_an_error_that_names_it(self, either: Store, reference: str) -> None:
        add_kernel(either, blueprint(), "small")
        with pytest.raises(UnknownKernelReferenceError) as caught:
            either.kernels.resolve(reference)
        assert repr(reference) in str(caught.value)

    def test_a_short_prefix_is_not_enough(self, either: Store) -> None:
        artifact, _ = add_kernel(either, blueprint())
        with pytest.raises(UnknownKernelReferenceError, match="12 or more"):
            either.kernels.resolve(artifact.id[:11])

    def test_an_ambiguous_prefix_asks_for_more_digits(self, store: UrzaStore, folder: Path) -> None:
        artifact, _ = add_kernel(store, blueprint())
        twin = artifact.id[:20] + ("0" if artifact.id[20] != "0" else "1") + artifact.id[21:]
        with sqlite3.connect(folder / "esper.db") as database:  # nobody can make two artifacts with such ids
            columns = [row[1] for row in database.execute("PRAGMA table_info(kernels)")][1:]
            listed = ", ".join(columns)
            database.execute(f"INSERT INTO kernels (id, {listed}) SELECT ?, {listed} FROM kernels", (twin,))
        database.close()
        with pytest.raises(AmbiguousPrefixError, match="more digits"):
            store.kernels.resolve(artifact.id[:12])
        assert store.kernels.resolve(artifact.id[:21]) == artifact.id
        assert store.kernels.resolve(twin[:21]) == twin

    def test_a_blueprint_id_is_recognised_and_the_kernel_named(self, either: Store) -> None:
        artifact, _ = add_kernel(either, blueprint(0))
        either.blueprints.submit(blueprint(1), "waiting")
        with pytest.raises(UnknownKernelReferenceError, match=artifact.id):
            either.kernels.resolve(blueprint(0).id)
        with pytest.raises(UnknownKernelReferenceError, match="it is unvalidated"):
            either.kernels.resolve(blueprint(1).id)
        with pytest.raises(UnknownKernelReferenceError, match="its blueprint is unvalidated"):
            either.kernels.resolve("waiting")

    def test_a_retired_kernel_is_found_by_its_full_id_only(self, either: Store) -> None:
        artifact, _ = add_kernel(either, blueprint(), "small")
        either.kernels.set_status(artifact.id, KernelStatus.RETIRED)
        assert either.kernels.resolve(artifact.id) == artifact.id
        for reference in (artifact.id[:12], "small"):
            with pytest.raises(UnknownKernelReferenceError):
                either.kernels.resolve(reference)
        assert either.kernels.query(KernelQuery()) == ()
        for status in (KernelStatus.RETIRED, None):
            assert [each.id for each in either.kernels.query(KernelQuery(status=status))] == [artifact.id]
        either.kernels.set_status(artifact.id, KernelStatus.VALIDATED)
        assert either.kernels.resolve("small") == artifact.id


class TestQueries:
    @pytest.mark.parametrize(
        ("condition", "most"),
        [("in_features", 2**31 - 1), ("out_features", 2**31 - 1), ("max_size_bytes", 2**63 - 1), ("limit", 1000)],
    )
    def test_numbers_that_no_database_holds_are_refused(self, either: Store, condition: str, most: int) -> None:
        assert either.kernels.query(KernelQuery.model_validate({condition: most})) == ()
        with pytest.raises(ValidationError, match=f"{condition}\n.*less than or equal to {most}"):
            KernelQuery.model_validate({condition: most + 1})

    def test_text_that_no_database_holds_is_refused(self) -> None:
        for condition in ("dtype", "blueprint_id", "graph_digest", "target_key"):
            with pytest.raises(ValidationError, match=condition):
                KernelQuery.model_validate({condition: "a\0b"})

    def test_conditions_all_hold_and_the_latest_come_first(self, either: Store) -> None:
        fast = (LatencyMeasurement(rows=32, graph_us=5.0),)
        small, _ = add_kernel(either, blueprint(width=4), latencies=fast)
        large, _ = add_kernel(either, blueprint(width=64), latencies=(LatencyMeasurement(rows=32, graph_us=50.0),))
        half, _ = add_kernel(either, Blueprint.low_rank(4, 8, 2, dtype="bfloat16"), latencies=fast)
        host, _ = add_kernel(either, Blueprint.low_rank(4, 4, 2, start="identity"))

        def found(**conditions: object) -> list[str]:
            return [each.id for each in either.kernels.query(KernelQuery.model_validate(conditions))]

        assert found() == [host.id, half.id, large.id, small.id]
        assert found(limit=2) == [host.id, half.id]
        assert found(in_features=4) == [host.id, half.id, small.id]
        assert found(in_features=4, out_features=4, uses_host=False) == [small.id]
        assert found(dtype="bfloat16") == [half.id]
        assert found(max_latency_us=10) == [half.id, small.id]
        assert found(max_size_bytes=len(small.data)) == [host.id, half.id, small.id]
        assert found(graph_digest=large.graph.digest) == [large.id]
        assert found(blueprint_id=small.blueprint_id) == [small.id]
        assert found(in_features=5) == []


class TestAttachments:
    def test_one_per_target_the_last_one_stored(self, either: Store) -> None:
        key = SigningKey.generate()
        artifact, _ = add_kernel(either, blueprint())
        here, elsewhere = Target.current(), Target("9.9", "cpython9", "inductor", "cpu.elsewhere")
        either.kernels.add_attachment(Attachment.create(artifact.id, here, b"old", key))
        either.kernels.add_attachment(Attachment.create(artifact.id, here, b"new", key))
        either.kernels.add_attachment(Attachment.create(artifact.id, elsewhere, b"other", key))
        packed = either.kernels.attachment(artifact.id, here.key)
        assert packed is not None
        attachment = Attachment.unpack(packed)
        attachment.verify(TrustStore([key.public_bytes]))
        assert attachment.payload == b"new"
        assert either.kernels.attachment(artifact.id, "another-target") is None
        assert either.kernels.attachment("0" * 64, here.key) is None
        assert set(either.kernels.get(artifact.id).attachments) == {here.key, elsewhere.key}
        assert [each.id for each in either.kernels.query(KernelQuery(target_key=here.key))] == [artifact.id]
        assert either.kernels.query(KernelQuery(target_key="another-target")) == ()

    def test_an_attachment_needs_its_kernel(self, either: Store) -> None:
        attachment = Attachment.create("0" * 64, Target.current(), b"code", SigningKey.generate())
        with pytest.raises(UnknownKernelReferenceError):
            either.kernels.add_attachment(attachment)


def test_statistics_count_what_is_there(either: Store) -> None:
    artifact, _ = add_kernel(either, blueprint(0))
    either.blueprints.submit(blueprint(1))
    attachment = Attachment.create(artifact.id, Target.current(), b"code", SigningKey.generate())
    either.kernels.add_attachment(attachment)
    stats = either.stats()
    assert stats.blueprints == {
        BlueprintStatus.UNVALIDATED: 1,
        BlueprintStatus.COMPILING: 0,
        BlueprintStatus.VALIDATED: 1,
        BlueprintStatus.INVALID: 0,
    }
    assert (stats.kernels, stats.attachments) == (1, 1)
    assert (stats.artifact_bytes, stats.attachment_bytes) == (len(artifact.data), len(attachment.pack()))


def test_blobs_may_lie_in_any_file_system_that_fsspec_knows(tmp_path: Path) -> None:
    with UrzaStore(f"sqlite:///{tmp_path / 'esper.db'}", "memory://esper-test-blobs") as store:
        artifact, _ = add_kernel(store, blueprint())
        assert store.kernels.content(artifact.id)[0] == artifact.data
    with pytest.raises(StoreError, match="cannot be used"):
        UrzaStore(f"sqlite:///{tmp_path / 'esper.db'}", "nosuchprotocol://x")


def test_a_second_opening_finds_what_the_first_stored(folder: Path) -> None:
    with UrzaStore.in_folder(folder) as store:
        artifact, _ = add_kernel(store, blueprint(), "small")
    with UrzaStore.in_folder(folder) as store:
        assert store.kernels.content(store.kernels.resolve("small"))[0] == artifact.data
