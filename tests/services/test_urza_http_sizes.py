"""Bodies that are too large, whether they say so or not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest

from esper.services.urza import UrzaStore
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza, assert_problem, raw_connection, settings
from tests.services.urza_server_calls import submission

ID = "0" * 64
JSON = {"Content-Type": "application/json"}


class TestSizes:
    @pytest.fixture
    def small(self, store: UrzaStore) -> Iterator[RunningUrza]:
        with RunningUrza(store, settings(max_body_mb=0.01)) as running:
            yield running

    ROUTES = (
        ("POST", "/api/v1/blueprints"),
        ("POST", "/api/v1/kernels/query"),
        ("POST", "/internal/v1/blueprints/claim"),
        ("POST", "/internal/v1/kernels"),
        ("PUT", f"/internal/v1/kernels/{ID}/attachments/target"),
    )

    def test_a_body_that_says_it_is_too_large(self, small: RunningUrza) -> None:
        with small.client() as client:
            for method, path in self.ROUTES:
                response = client.request(method, path, content=b" " * 20_000, headers=JSON)
                assert_problem(response, 413, "too-large", "urza.max_body_mb")
            assert client.get("/health").status_code == 200

    def test_a_chunked_body_that_turns_out_to_be(self, small: RunningUrza) -> None:
        form = b'--x\r\nContent-Disposition: form-data; name="content"; filename="f"\r\n\r\n'
        with small.client() as client:
            for method, path in self.ROUTES:
                is_form = path == "/internal/v1/kernels"
                kind = "multipart/form-data; boundary=x" if is_form else "application/json"
                chunks = iter([form if is_form else b"{", *[b" " * 1000] * 20])
                response = client.request(method, path, content=chunks, headers={"Content-Type": kind})
                assert_problem(response, 413, "too-large", "urza.max_body_mb")
            assert client.get("/health").status_code == 200

    def test_an_endless_body_is_cut_off(self, small: RunningUrza) -> None:
        with raw_connection(small.port) as connection:
            connection.sendall(
                b"PUT /internal/v1/kernels/" + ID.encode() + b"/attachments/t HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            chunks = itertools.repeat(b"10000\r\n" + bytes(0x10000) + b"\r\n", 1000)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                all(connection.sendall(chunk) is None for chunk in chunks)

    def test_what_is_just_small_enough_is_taken(self, store: UrzaStore) -> None:
        body = json.dumps(submission(blueprint())).encode()
        with RunningUrza(store, settings(max_body_mb=len(body) / 2**20)) as urza, urza.client() as client:
            assert client.post("/api/v1/blueprints", content=body, headers=JSON).status_code == 201
            padded = client.post("/api/v1/blueprints", content=body + b" ", headers=JSON)
            assert_problem(padded, 413, "too-large")
