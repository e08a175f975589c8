"""What the routes of Urza send when all goes well, over SQLite and PostgreSQL; what they do, the store's tests show."""

from __future__ import annotations

import base64
import hashlib
import threading
import time

from esper.artifacts import Attachment, Signature, SigningKey, Target, artifact_message
from esper.services.contracts import (
    BlueprintRecord,
    Claim,
    CompiledKernelArtifact,
)
from esper.services.urza import UrzaStore
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza, assert_problem
from tests.services.urza_server_calls import KEY, add_kernel, claim, submit

TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")


class TestBlueprints:
    def test_a_submission_is_stored_once_and_read_back(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            first = submit(client, blueprint(1), "mine")
            again = submit(client, blueprint(1))
            other_name = submit(client, blueprint(1), "mine-too")
            assert [first.status_code, again.status_code, other_name.status_code] == [201, 200, 200]
            record = BlueprintRecord.model_validate(first.json())
            assert (record.id, record.status, record.names) == (blueprint(1).id, "unvalidated", ("mine",))
            found = client.get(f"/api/v1/blueprints/{record.id}")
            assert BlueprintRecord.model_validate(found.json()).names == ("mine", "mine-too")
            assert any_urza.store.blueprints.get(record.id) == BlueprintRecord.model_validate(found.json())

    def test_the_document_is_canonical_and_has_a_tag(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            submit(client, blueprint(1))
            path = f"/api/v1/blueprints/{blueprint(1).id}/document"
            document = client.get(path)
            assert document.content == blueprint(1).to_json().encode()
            assert document.headers["content-type"] == "application/json"
            assert document.headers["etag"] == f'"{hashlib.sha256(document.content).hexdigest()}"'
            known = client.get(path, headers={"If-None-Match": document.headers["etag"]})
            assert (known.status_code, known.content) == (304, b"")

    def test_an_invalid_one_is_forgotten_and_submitted_anew(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            submit(client, blueprint(1), "mine")
            path = f"/api/v1/blueprints/{blueprint(1).id}"
            assert_problem(client.delete(path), 409, "illegal-transition", "only an invalid one")
            token = claim(client).json()["token"]
            ended = client.put(
                f"/internal/v1/blueprints/{blueprint(1).id}/status",
                json={"status": "invalid", "token": token, "reason": "it \u2192 overflows"},
            )
            assert (ended.json()["status"], ended.json()["reason"]) == ("invalid", "it → overflows")
            forgotten = client.delete(path)
            assert (forgotten.status_code, forgotten.content) == (204, b"")
            assert_problem(client.get(path), 404, "unknown-blueprint", blueprint(1).id)
            assert submit(client, blueprint(1), "mine").status_code == 201

    def test_pages_neither_repeat_nor_miss_while_others_submit(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            for seed in range(7):
                submit(client, blueprint(seed))
            seen: list[str] = []
            cursor: str | None = None
            for turn in range(10):
                params = {"limit": 3} if cursor is None else {"limit": 3, "cursor": cursor}
                page = client.get("/api/v1/blueprints", params=params).json()
                seen += [each["id"] for each in page["items"]]
                submit(client, blueprint(100 + turn))
                cursor = page["next_cursor"]
                if cursor is None:
                    break
            assert seen == [blueprint(seed).id for seed in reversed(range(7))]

    def test_who_is_told_of_submissions_hears_of_each_once(self, store: UrzaStore) -> None:
        heard: list[str] = []
        told = threading.Event()

        def on_submit(blueprint_id: str) -> None:
            heard.append(blueprint_id)
            told.set()

        with RunningUrza(store, on_submit=on_submit) as urza, urza.client() as client:
            assert submit(client, blueprint(1)).status_code == 201
            assert submit(client, blueprint(1)).status_code == 200
            assert told.wait(10)
            assert submit(client, blueprint(2)).status_code == 201
            deadline = time.monotonic() + 10
            while len(heard) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert heard == [blueprint(1).id, blueprint(2).id]


class TestClaims:
    def test_claim_renew_release(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            nothing = claim(client)
            assert (nothing.status_code, nothing.content) == (204, b"")
            submit(client, blueprint(1))
            held = Claim.model_validate(claim(client, worker="w1", lease_seconds=60).json())
            assert (held.blueprint_id, held.worker, held.attempt) == (blueprint(1).id, "w1", 1)
            assert claim(client).status_code == 204
            path = f"/internal/v1/blueprints/{held.blueprint_id}"
            renewal = {"token": held.token, "worker": "w1", "attempt": 1, "lease_seconds": 600}
            renewed = Claim.model_validate(client.post(f"{path}/renew", json=renewal).json())
            assert (renewed.token, renewed.worker, renewed.attempt) == (held.token, "w1", 1)
            assert 500 < (renewed.expires_at - held.expires_at).total_seconds() < 600
            assert 500 < client.get("/internal/v1/blueprints/next-lease-end").json()["seconds"] <= 600
            assert client.post(f"{path}/release", json={"token": held.token}).status_code == 204
            assert client.post(f"{path}/release", json={"token": held.token}).status_code == 204, "it can be repeated"
            assert_problem(client.post(f"{path}/renew", json=renewal), 409, "claim-lost")
            assert client.get("/internal/v1/blueprints/next-lease-end").json() == {"seconds": None}
            assert claim(client).json()["attempt"] == 1


class TestKernels:
    def test_a_kernel_goes_up_and_comes_down_unchanged(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            artifact = add_kernel(client, blueprint(1), "mine")
            for reference in (artifact.id, artifact.id[:12], artifact.id[:20].upper(), "mine"):
                kernel = CompiledKernelArtifact.model_validate(client.get(f"/api/v1/kernels/{reference}").json())
                assert (kernel.id, kernel.name, kernel.blueprint_id) == (artifact.id, "mine", blueprint(1).id)
            content = client.get(f"/api/v1/kernels/{artifact.id}/content")
            assert content.content == artifact.data
            assert content.headers["etag"] == f'"{artifact.id}"'
            assert content.headers["content-length"] == str(len(artifact.data))
            signature = Signature.from_json(base64.urlsafe_b64decode(content.headers["esper-signature"]))
            assert signature == KEY.sign(artifact_message(artifact.id))

    def test_attachments(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            artifact = add_kernel(client, blueprint(1))
            attachment = Attachment.create(artifact.id, TARGET, b"machine code" * 1000, SigningKey.generate())
            path = f"kernels/{artifact.id}/attachments/{TARGET.key}"
            assert_problem(client.get(f"/api/v1/{path}"), 404, "unknown-attachment")
            for _ in range(2):
                assert client.put(f"/internal/v1/{path}", content=attachment.pack()).status_code == 204
            found = client.get(f"/api/v1/{path}")
            assert found.content == attachment.pack()
            assert found.headers["etag"] == f'"{hashlib.sha256(attachment.pack()).hexdigest()}"'
            known = client.get(f"/api/v1/{path}", headers={"If-None-Match": found.headers["etag"]})
            assert (known.status_code, known.content) == (304, b"")
            assert client.get(f"/api/v1/kernels/{artifact.id}").json()["attachments"] == [TARGET.key]
            query = client.post("/api/v1/kernels/query", json={"target_key": TARGET.key}).json()
            assert [each["id"] for each in query["items"]] == [artifact.id]

    def test_queries_and_their_pages(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            ids = [add_kernel(client, blueprint(seed, width)).id for seed, width in ((0, 4), (1, 4), (2, 4), (3, 8))]
            found = client.post("/api/v1/kernels/query", json={"in_features": 8}).json()
            assert [each["id"] for each in found["items"]] == [ids[3]]
            first = client.post("/api/v1/kernels/query", json={"in_features": 4, "limit": 2}).json()
            add_kernel(client, blueprint(9, 4))
            rest = client.post(
                "/api/v1/kernels/query", json={"in_features": 4, "limit": 2, "cursor": first["next_cursor"]}
            ).json()
            assert [each["id"] for each in first["items"] + rest["items"]] == [ids[2], ids[1], ids[0]]
            assert rest["next_cursor"] is None


class TestHealth:
    def test_health_of_a_store_that_answers(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            for path in ("/health", "/health/live", "/health/ready"):
                health = client.get(path)
                assert health.status_code == 200
                version = any_urza.store.schema_version
                expected = {"status": "ok", "live": True, "ready": True, "schema_version": version, "detail": ""}
                assert health.json() == expected
