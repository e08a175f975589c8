"""Bad input: every answer is a problem document that says what was wrong, and none is a failure of the server's."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from esper.artifacts import Artifact, Attachment, SigningKey, Target, build_artifact
from esper.errors import EsperError
from esper.services.problems import PROBLEMS, ProblemDocument, error_of, problem_of
from esper.services.urza import UrzaStore
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza, assert_problem, raw_connection
from tests.services.urza_server_calls import add_kernel, claim, record_of, submission, submit, upload

TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")
ID = "0" * 64
STATUS = f"/internal/v1/blueprints/{ID}/status"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(any_urza: RunningUrza) -> Iterator[httpx.Client]:
    with any_urza.client() as client:
        yield client


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def untouched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an empty store, which is to stay that way whatever is sent to it."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        store = UrzaStore.in_folder(folder)
    else:
        store = UrzaStore(request.getfixturevalue("postgres").new_database(), folder / "blobs")
    with store, RunningUrza(store) as urza, urza.client() as client:
        yield client
        stats = store.stats()
        assert (sum(stats.blueprints.values()), stats.kernels, stats.attachments) == (0, 0, 0)
        assert list(store.blobs.stored()) == []


class TestTable:
    def test_both_sides_agree_on_every_kind(self) -> None:
        for problem in PROBLEMS:
            document = ProblemDocument(
                type=f"urn:esper:problem:{problem.slug}",
                title=problem.title,
                status=problem.status,
                detail="why",
                instance="urn:esper:request:1",
            )
            error = error_of(document)
            assert type(error) is problem.error
            assert str(error) == "why"
            assert problem_of(error).error is problem.error

    def test_an_unknown_kind_is_a_plain_error_of_the_store(self) -> None:
        for kind in ("urn:esper:problem:from-the-future", "about:blank"):
            document = ProblemDocument(type=kind, title="?", status=418, detail="why", instance="")
            assert isinstance(error_of(document), EsperError)
            assert str(error_of(document)) == "why"

    def test_slugs_are_unique(self) -> None:
        assert len({each.slug for each in PROBLEMS}) == len(PROBLEMS)


class TestPaths:
    @pytest.mark.parametrize("path", ["/", "/api", "/api/v1/nothing", "/internal/v1/", "/docs", "//health", "/health/"])
    def test_nothing_there(self, untouched: httpx.Client, path: str) -> None:
        assert_problem(untouched.get(f"{str(untouched.base_url).rstrip('/')}{path}"), 404, "not-found")

    @pytest.mark.parametrize(
        ("method", "path"), [("PUT", "/health"), ("DELETE", "/api/v1/kernels/x"), ("PATCH", STATUS), ("GET", STATUS)]
    )
    def test_not_with_this_method(self, untouched: httpx.Client, method: str, path: str) -> None:
        response = untouched.request(method, path)
        assert_problem(response, 405, "method-not-allowed", method)
        assert response.headers["allow"]

    TRICKS = (
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "%00",
        "a%00b",
        "%ff%fe",
        "'%20OR%201=1--",
        "%25s%25n",
        "x" * 5000,
        ID.upper()[:-1] + "%0a",
        ID + "%0a",
        "%F0%9F%92%A3",
        "-rf",
        "CON",
        "a..b",
        "*",
    )

    @pytest.mark.parametrize("trick", TRICKS)
    def test_ids_that_are_none_are_unknown(self, untouched: httpx.Client, trick: str) -> None:
        kernel, target = ("unknown-kernel",), ("unknown-attachment", "unknown-kernel")
        asked: list[tuple[str, str, Any, tuple[str, ...]]] = [
            ("GET", f"/api/v1/blueprints/{trick}", None, ("unknown-blueprint",)),
            ("GET", f"/api/v1/blueprints/{trick}/document", None, ("unknown-blueprint",)),
            ("DELETE", f"/api/v1/blueprints/{trick}", None, ("unknown-blueprint",)),
            ("GET", f"/api/v1/kernels/{trick}", None, kernel),
            ("GET", f"/api/v1/kernels/{trick}/content", None, kernel),
            ("GET", f"/api/v1/kernels/{trick}/attachments/{TARGET.key}", None, target),
            ("GET", f"/api/v1/kernels/{ID}/attachments/{trick}", None, target),
            ("PUT", f"/internal/v1/kernels/{ID}/attachments/{trick}", b"x", target),
            ("PUT", f"/internal/v1/kernels/{trick}/attachments/{TARGET.key}", b"x", target),
        ]
        for method, path, content, slugs in asked:
            response = untouched.request(method, path, content=content)
            slug = response.json()["type"].rpartition(":")[2]
            assert slug in (*slugs, "not-found", "invalid-attachment"), (method, path, response.text)
            assert_problem(response, 422 if slug == "invalid-attachment" else 404, slug)

    def test_a_path_as_it_comes_off_the_wire_stays_in_the_store(self, urza: RunningUrza, folder: Path) -> None:
        (folder / "secret").write_text("secret")
        for path in ("/api/v1/kernels/../../../secret", "/../secret", "/api/v1/blueprints/..%2Fsecret/document"):
            with raw_connection(urza.port) as connection:
                request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode())
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert b"application/problem+json" in answer


class TestSubmissions:
    @pytest.mark.parametrize(
        ("body", "slug"),
        [
            (b"", "invalid-request"),
            (b"{", "invalid-request"),
            (b"[]", "invalid-request"),
            (b"null", "invalid-request"),
            (b'"blueprint"', "invalid-request"),
            (b"\xff\xfe", "invalid-request"),
            (b"[" * 100_000, "invalid-request"),
            (b'{"blueprint": {"a": ' * 20_000, "invalid-request"),
            (b'{"blueprint": NaN}', "invalid-request"),
            (b'{"blueprint": {}, "blueprint": {}}', "invalid-request"),
            (b'{"blueprint": {}, "more": 1}', "invalid-request"),
            (b'{"blueprint": {}, "name": 1}', "invalid-request"),
            (b'{"blueprint": []}', "invalid-request"),
            (b'{"name": "x"}', "invalid-request"),
            (b'{"blueprint": {}}', "invalid-blueprint"),
            (b'{"blueprint": {"schema": 1, "family": "what"}}', "invalid-blueprint"),
            (b'{"blueprint": {"schema": 1e999}}', "invalid-request"),
            (b'{"blueprint": {"schema": ' + b"9" * 5000 + b"}}", "invalid-request"),
            (b'{"blueprint": {"schema": 1, "family": "\\ud800"}}', "invalid-blueprint"),
        ],
    )
    def test_what_is_no_blueprint(self, untouched: httpx.Client, body: bytes, slug: str) -> None:
        assert_problem(untouched.post("/api/v1/blueprints", content=body, headers=JSON), 422, slug)

    def test_a_blueprint_beyond_the_limits(self, untouched: httpx.Client) -> None:
        document = json.loads(blueprint().to_json())
        huge = {**document, **{key: 2**40 for key, value in document.items() if key != "schema" and type(value) is int}}
        assert_problem(untouched.post("/api/v1/blueprints", json={"blueprint": huge}), 422, "invalid-blueprint")

    @pytest.mark.parametrize(
        "name", ["", "..", "a/b", "a b", "\x00", "0" * 64, "deadbeefdeadbeef", "x" * 101, "é", "a\n"]
    )
    def test_names_that_are_none(self, untouched: httpx.Client, name: str) -> None:
        assert_problem(submit(untouched, blueprint(), name), 422, "invalid-name")

    def test_a_taken_name(self, client: httpx.Client) -> None:
        submit(client, blueprint(1), "mine")
        assert_problem(submit(client, blueprint(2), "mine"), 409, "name-taken", "mine")
        assert [each["id"] for each in client.get("/api/v1/blueprints").json()["items"]] == [blueprint(1).id]

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_what_a_web_page_could_send_is_refused(self, untouched: httpx.Client, kind: str | None) -> None:
        body = json.dumps(submission(blueprint())).encode()
        headers = {} if kind is None else {"Content-Type": kind}
        response = untouched.post("/api/v1/blueprints", content=body, headers=headers)
        assert_problem(response, 422, "invalid-request", "application/json")


class TestParameters:
    @pytest.mark.parametrize(
        "query",
        [
            "limit=0",
            "limit=1001",
            "limit=x",
            "limit=1e9",
            "status_filter=no",
            "cursor=x",
            "cursor=",
            "cursor=W10",
            f"cursor={'A' * 300}",
        ],
    )
    def test_lists(self, untouched: httpx.Client, query: str) -> None:
        assert_problem(untouched.get(f"/api/v1/blueprints?{query}"), 422, "invalid-request")

    @pytest.mark.parametrize("position", ['["NaN","0"]', f'[NaN,"{ID}"]', f'[1,"{ID}"]', '[1.5,"x"]', "[" * 120, "1"])
    def test_cursors_that_no_page_came_with(self, untouched: httpx.Client, position: str) -> None:
        cursor = base64.urlsafe_b64encode(position.encode()).decode()
        for response in (
            untouched.get("/api/v1/blueprints", params={"cursor": cursor}),
            untouched.post("/api/v1/kernels/query", json={"cursor": cursor}),
        ):
            assert_problem(response, 422, "invalid-request", "cursor")

    @pytest.mark.parametrize(
        "query",
        [
            {"in_features": 0},
            {"in_features": 10**30},
            {"max_size_bytes": 2**63},
            {"limit": 1001},
            {"limit": True, "dtype": 3},
            {"dtype": "\x00"},
            {"max_latency_us": -1},
            {"unknown": 1},
            {"status": "compiling"},
            [],
            None,
        ],
    )
    def test_queries(self, untouched: httpx.Client, query: Any) -> None:
        assert_problem(untouched.post("/api/v1/kernels/query", json=query), 422, "invalid-request")

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
    def test_numbers_that_are_none(self, untouched: httpx.Client, number: bytes) -> None:
        body = b'{"max_latency_us": ' + number + b"}"
        assert_problem(untouched.post("/api/v1/kernels/query", content=body, headers=JSON), 422, "invalid-request")
        body = b'{"worker": "w", "lease_seconds": ' + number + b"}"
        response = untouched.post("/internal/v1/blueprints/claim", content=body, headers=JSON)
        assert_problem(response, 422, "invalid-request", "lease_seconds")

    def test_claims(self, client: httpx.Client) -> None:
        submit(client, blueprint())
        wrong: tuple[dict[str, Any], ...] = (
            {"worker": ""},
            {"worker": "a\x00b"},
            {"worker": "x" * 201},
            {"lease_seconds": 0},
            {"lease_seconds": -1},
            {"lease_seconds": 10**6},
            {"blueprint_id": "x"},
            {"blueprint_id": ID + "\n"},
            {"more": 1},
        )
        for fields in wrong:
            assert_problem(claim(client, **fields), 422, "invalid-request")
        assert claim(client).status_code == 200, "nothing was claimed by that"

    @pytest.mark.parametrize(
        "change",
        [
            {"status": "done", "token": "0" * 32},
            {"status": "invalid", "token": "x"},
            {"status": "invalid", "token": "0" * 32, "reason": "\x00"},
            {"status": "invalid", "token": "0" * 32, "report": {"passed": 1}},
            {"status": "validated", "token": "0" * 32, "artifact_id": "../x"},
            {"status": "invalid"},
        ],
    )
    def test_status_changes(self, untouched: httpx.Client, change: dict[str, Any]) -> None:
        assert_problem(untouched.put(STATUS, json=change), 422, "invalid-request")

    def test_what_was_sent_is_not_repeated(self, untouched: httpx.Client) -> None:
        body = {"status": "invalid", "token": "a secret that is none of the log's"}
        detail = assert_problem(untouched.put(STATUS, json=body), 422, "invalid-request", "body.token")
        assert "secret" not in detail

    def test_requests_about_blueprints_that_are_not_there(self, untouched: httpx.Client) -> None:
        change = {"status": "invalid", "token": "0" * 32}
        assert_problem(untouched.put(STATUS, json=change), 404, "unknown-blueprint")
        renewal = {"token": "0" * 32, "worker": "w", "attempt": 1}
        response = untouched.post(f"/internal/v1/blueprints/{ID}/renew", json=renewal)
        assert_problem(response, 404, "unknown-blueprint")
        assert claim(untouched, blueprint_id=ID).status_code == 204


class TestUploads:
    @pytest.fixture
    def artifact(self, client: httpx.Client) -> Artifact:
        submit(client, blueprint(1))
        return build_artifact(blueprint(1))

    def nothing_is_stored(self, client: httpx.Client) -> bool:
        return bool(client.get("/internal/v1/database/stats").json()["kernels"] == 0)

    def test_content_that_is_no_artifact(self, client: httpx.Client, artifact: Artifact) -> None:
        for damaged in (b"", b"x", b"\x00" * 100, artifact.data[:-1], artifact.data + b"x"):
            assert_problem(upload(client, record_of(artifact), damaged), 422, "invalid-artifact")
        assert self.nothing_is_stored(client)

    def test_a_record_of_something_else(self, client: httpx.Client, artifact: Artifact) -> None:
        for part, field, value in (
            ("metadata", "in_features", 5),
            ("metadata", "in_features", 10**30),
            ("metadata", "uses_host", True),
            ("metadata", "graph_digest", ID),
            ("report", "artifact_id", ID),
            ("report", "blueprint_id", ID),
            ("report", "passed", False),
        ):
            record = record_of(artifact)
            record[part][field] = value
            assert_problem(upload(client, record, artifact.data), 422, "invalid-artifact", part)
        assert self.nothing_is_stored(client)

    def test_another_blueprints_artifact(self, client: httpx.Client, artifact: Artifact) -> None:
        submit(client, blueprint(2))
        record = record_of(artifact) | {"blueprint_id": blueprint(2).id}
        assert_problem(upload(client, record, artifact.data), 422, "invalid-artifact", "blueprint_id")

    def test_an_artifact_whose_blueprint_was_not_submitted(self, client: httpx.Client) -> None:
        other = build_artifact(blueprint(3))
        assert_problem(upload(client, record_of(other), other.data), 404, "unknown-blueprint", "submit it first")

    def test_a_record_that_is_none(self, client: httpx.Client, artifact: Artifact) -> None:
        for record in ("", "{", "[]", "null", "{}", '{"blueprint_id": "../x"}', "\x00", "[" * 10_000):
            assert_problem(upload(client, record, artifact.data), 422, "invalid-request")

    def test_a_signature_that_is_none(self, client: httpx.Client, artifact: Artifact) -> None:
        for signature in ({}, {"key_id": ID, "value": "!"}, {"key_id": "x", "value": "AAAA"}, {"value": "\ud800"}):
            record = record_of(artifact) | {"signature": signature}
            response = upload(client, record, artifact.data)
            assert response.status_code == 422, response.text
        assert self.nothing_is_stored(client)

    def test_bodies_that_are_no_form_or_not_this_one(self, client: httpx.Client, artifact: Artifact) -> None:
        path = "/internal/v1/kernels"
        record = json.dumps(record_of(artifact))
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        content = ("kernel", artifact.data)
        for response in (
            client.post(path, json={}),
            client.post(path, content=b"x" * 1000, headers=form),
            client.post(path, content=b"--x\r\n" * 1000, headers=form),
            client.post(path, content=b"", headers={"Content-Type": "multipart/form-data"}),
            client.post(path, files={"record": (None, record)}),
            client.post(path, files={"content": content}),
            client.post(path, files={"record": (None, record), "content": (None, "text")}),
            client.post(path, files=[("record", (None, record)), *[("content", content)] * 3]),
            client.post(path, files={"record": (None, "x" * 5_000_000), "content": content}),
        ):
            assert_problem(response, 422, "invalid-request")

    def test_attachments_of_something_else(self, client: httpx.Client) -> None:
        artifact = add_kernel(client, blueprint(1))
        key = SigningKey.generate()
        attachment = Attachment.create(artifact.id, TARGET, b"code", key)
        path = f"/internal/v1/kernels/{artifact.id}/attachments"
        assert_problem(client.put(f"{path}/other", content=attachment.pack()), 422, "invalid-attachment", "target")
        other = Attachment.create(ID, TARGET, b"code", key)
        assert_problem(client.put(f"{path}/{TARGET.key}", content=other.pack()), 422, "invalid-attachment", "kernel")
        response = client.put(f"/internal/v1/kernels/{ID}/attachments/{TARGET.key}", content=other.pack())
        assert_problem(response, 404, "unknown-kernel")
        for damaged in (b"", b"x", attachment.pack()[:-1], attachment.pack() + b"x"):
            assert_problem(client.put(f"{path}/{TARGET.key}", content=damaged), 422, "invalid-attachment")
        assert client.get(f"/api/v1/kernels/{artifact.id}").json()["attachments"] == []
