"""The store over HTTP does what the store does: every method gives the same, with the same result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from esper.artifacts import Attachment, artifact_message, build_artifact
from esper.contracts.validation import LatencyMeasurement, ValidationReport
from esper.services.contracts import BlueprintStatus, KernelMetadata, KernelQuery, KernelStatus
from esper.services.urza import UrzaStore
from esper.services.urza.storage.models import BlueprintRow
from esper.services.urza_client import RemoteStore
from tests.services.remote_stores import KEY, NOBODY, TARGET, add, claimed, remote_of, report_of
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza


@pytest.fixture
def remote(urza: RunningUrza) -> Iterator[RemoteStore]:
    opened = remote_of(urza)
    yield opened
    opened.close()


class TestBlueprints:
    def test_submissions(self, store: UrzaStore, remote: RemoteStore) -> None:
        first = remote.blueprints.submit(blueprint(1), "mine")
        assert first == store.blueprints.get(blueprint(1).id)
        assert (first.status, first.names) == (BlueprintStatus.UNVALIDATED, ("mine",))
        assert remote.blueprints.submit(blueprint(1)) == first
        again = remote.blueprints.submit(blueprint(1), "mine-too")
        assert again == store.blueprints.get(blueprint(1).id) == remote.blueprints.get(blueprint(1).id)
        assert again.names == ("mine", "mine-too")
        assert (
            remote.blueprints.document(again.id)
            == blueprint(1).to_json().encode()
            == store.blueprints.document(again.id)
        )

    def test_a_claim_is_made_renewed_given_back_and_ended(self, store: UrzaStore, remote: RemoteStore) -> None:
        assert remote.blueprints.claim("nobody's") is None
        assert remote.blueprints.next_lease_end() is None
        first, second = (store.blueprints.submit(blueprint(seed)).id for seed in (1, 2))
        assert remote.blueprints.claim("a worker", blueprint_id=NOBODY) is None
        claim = remote.blueprints.claim("a worker", lease_seconds=50)
        assert claim is not None
        record = store.blueprints.get(first)
        assert (claim.blueprint_id, claim.worker, claim.attempt) == (first, "a worker", 1)
        assert (record.status, record.lease_expires_at) == (BlueprintStatus.COMPILING, claim.expires_at)
        left = remote.blueprints.next_lease_end()
        assert left is not None
        assert 30 < left <= 50

        renewed = remote.blueprints.renew(claim, lease_seconds=500)
        assert renewed.expires_at - claim.expires_at > timedelta(seconds=400)
        assert renewed.model_copy(update={"expires_at": claim.expires_at}) == claim
        assert store.blueprints.get(first).lease_expires_at == renewed.expires_at

        remote.blueprints.release(renewed)
        remote.blueprints.release(renewed)
        assert store.blueprints.get(first).status is BlueprintStatus.UNVALIDATED
        assert store.blueprints.get(first).attempts == 0
        assert claimed(remote, second).blueprint_id == second

    def test_an_invalid_one_is_forgotten(self, store: UrzaStore, remote: RemoteStore) -> None:
        token = claimed(remote, remote.blueprints.submit(blueprint(1)).id).token
        report = ValidationReport(blueprint_id=blueprint(1).id, pipeline="fast", passed=False, reason="it → overflows")
        ended = remote.blueprints.set_status(
            blueprint(1).id, BlueprintStatus.INVALID, token=token, reason="no\nway", report=report
        )
        assert ended == store.blueprints.get(blueprint(1).id)
        assert (ended.status, ended.reason, ended.report) == (BlueprintStatus.INVALID, "no\nway", report)
        remote.blueprints.forget(blueprint(1).id)
        assert store.blueprints.list() == ()

    def test_lists(self, store: UrzaStore, remote: RemoteStore) -> None:
        for seed in range(5):
            store.blueprints.submit(blueprint(seed))
        working = claimed(store, blueprint(3).id).blueprint_id
        assert remote.blueprints.list() == store.blueprints.list()
        assert remote.blueprints.list(limit=2) == store.blueprints.list(limit=2)
        assert [each.id for each in remote.blueprints.list(limit=2)] == [blueprint(4).id, blueprint(3).id]
        assert [each.id for each in remote.blueprints.list(BlueprintStatus.COMPILING)] == [working]
        assert remote.blueprints.list(BlueprintStatus.INVALID) == ()
        assert remote.blueprints.list(limit=0) == store.blueprints.list(limit=0) == ()

    def test_a_list_that_takes_several_pages(self, store: UrzaStore, remote: RemoteStore) -> None:
        fill(store, 2100)
        everything = store.blueprints.list(limit=3000)
        assert len(everything) == 2100
        for limit in (1000, 1001, 2000, 2100, 3000):
            assert remote.blueprints.list(limit=limit) == everything[:limit]


def fill(store: UrzaStore, count: int) -> None:
    """`count` waiting blueprints, written straight into the table; two of each time."""
    now = time.time() - count
    rows = [
        {
            "id": f"{number:064x}", "document": NOBODY, "status": "unvalidated", "reason": "", "attempts": 0,
            "submitted_at": now + number // 2, "updated_at": now,
        }
        for number in range(count)
    ]  # fmt: skip
    with store.database.writing() as session:
        session.execute(insert(BlueprintRow), rows)


class TestKernels:
    def test_a_kernel_is_stored_and_read_back(self, store: UrzaStore, remote: RemoteStore) -> None:
        token = claimed(remote, remote.blueprints.submit(blueprint(1), "mine").id).token
        artifact = build_artifact(blueprint(1))
        signature, report = KEY.sign(artifact_message(artifact.id)), report_of(artifact)
        kernel = add(remote, artifact, signature, report)
        assert kernel == store.kernels.get(artifact.id)
        assert (kernel.report, kernel.metadata) == (report, KernelMetadata.of(artifact.graph))
        ended = remote.blueprints.set_status(
            blueprint(1).id, BlueprintStatus.VALIDATED, token=token, report=report, artifact_id=artifact.id
        )
        assert ended == store.blueprints.get(blueprint(1).id)
        assert (ended.artifact_id, ended.report) == (artifact.id, report)
        assert remote.kernels.get(artifact.id) == store.kernels.get(artifact.id)
        assert remote.kernels.content(artifact.id) == (artifact.data, (signature,))
        assert store.kernels.content(artifact.id) == (artifact.data, (signature,))
        assert remote.stats() == store.stats()

    def test_one_without_a_signature(self, store: UrzaStore, remote: RemoteStore) -> None:
        remote.blueprints.submit(blueprint(1))
        artifact = build_artifact(blueprint(1))
        add(remote, artifact, None, report_of(artifact))
        assert remote.kernels.content(artifact.id) == store.kernels.content(artifact.id) == (artifact.data, ())

    def test_a_large_one(self, store: UrzaStore, remote: RemoteStore) -> None:
        large = blueprint(1, width=2048)
        remote.blueprints.submit(large)
        artifact = build_artifact(large)
        assert len(artifact.data) > 2**14
        add(remote, artifact, None, report_of(artifact))
        assert remote.kernels.content(artifact.id)[0] == artifact.data

    def test_references(self, store: UrzaStore, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1), "mine.v-1")
        for reference in (artifact.id, artifact.id[:12], artifact.id[:40].upper(), "mine.v-1"):
            assert remote.kernels.resolve(reference) == store.kernels.resolve(reference) == artifact.id

    def test_status(self, store: UrzaStore, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        retired = remote.kernels.set_status(artifact.id, KernelStatus.RETIRED)
        assert retired == store.kernels.get(artifact.id)
        assert retired.status is KernelStatus.RETIRED
        assert remote.kernels.set_status(artifact.id, KernelStatus.VALIDATED) == store.kernels.get(artifact.id)

    def test_attachments(self, store: UrzaStore, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        assert remote.kernels.attachment(artifact.id, TARGET.key) is None
        for code in (b"machine code" * 10_000, b"", b"better"):
            attachment = Attachment.create(artifact.id, TARGET, code, KEY)
            remote.kernels.add_attachment(attachment)
            assert remote.kernels.attachment(artifact.id, TARGET.key) == attachment.pack()
            assert store.kernels.attachment(artifact.id, TARGET.key) == attachment.pack()
        assert remote.kernels.get(artifact.id).attachments == (TARGET.key,)

    def test_an_attachment_that_is_there_already_is_not_sent_again(self, store: UrzaStore, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        old, new = (Attachment.create(artifact.id, TARGET, code, KEY) for code in (b"old", b"new"))
        store.kernels.add_attachment(old)
        known = old.pack()
        assert remote.kernels.attachment(artifact.id, TARGET.key, known=known) is known
        store.kernels.add_attachment(new)
        assert remote.kernels.attachment(artifact.id, TARGET.key, known=known) == new.pack()

    @pytest.mark.parametrize(
        "conditions",
        [
            {},
            {"in_features": 8},
            {"out_features": 4, "dtype": "float32"},
            {"dtype": "float64"},
            {"blueprint_id": blueprint(1).id},
            {"graph_digest": build_artifact(blueprint(1)).graph.digest, "limit": 1},
            {"uses_host": True},
            {"uses_host": False},
            {"max_size_bytes": 1},
            {"max_latency_us": 5.5},
            {"target_key": TARGET.key},
            {"status": None},
            {"status": KernelStatus.RETIRED},
        ],
        ids=str,
    )
    def test_queries(self, store: UrzaStore, remote: RemoteStore, conditions: dict[str, Any]) -> None:
        first, _ = add_kernel(store, blueprint(1), latencies=(LatencyMeasurement(rows=32, graph_us=5),))
        second, _ = add_kernel(store, blueprint(2), latencies=(LatencyMeasurement(rows=32, graph_us=6),))
        add_kernel(store, blueprint(3, width=8), "wide")
        store.kernels.set_status(second.id, KernelStatus.RETIRED)
        store.kernels.add_attachment(Attachment.create(first.id, TARGET, b"code", KEY))
        query = KernelQuery(**conditions)
        assert remote.kernels.query(query) == store.kernels.query(query)
