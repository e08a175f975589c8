"""Urza as a process and as a server: starting, ending, slow clients, trouble below, logs and metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper.configs import ConfigError
from esper.services.urza import UrzaStore
from esper.services.urza.server import UrzaServer
from tests.services.programs import Program
from tests.services.shelf import blueprint
from tests.services.urza_server import SERVE, RunningUrza, http_client, locked, raw_connection, settings
from tests.services.urza_server_calls import claim, submission, submit


class TestProcess:
    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_it_says_where_it_listens_and_ends_when_told(self, folder: Path, number: int) -> None:
        program = Program(SERVE, folder)
        found = re.fullmatch(r"Urza listens at (http://127\.0\.0\.1:\d+)", program.read_line())
        assert found is not None
        with http_client(found[1]) as client:
            assert client.get("/health").status_code == 200
        with socket.create_connection(("127.0.0.1", int(found[1].rpartition(":")[2]))):  # idle: not waited for
            program.process.send_signal(number)
            assert program.finish(timeout=20) == ["closed"], "what comes after the server is run"

    def test_a_taken_port_is_named(self, urza: RunningUrza) -> None:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{urza.port} .*choose another urza\.port"):
            UrzaServer(settings(port=urza.port), urza.store)

    @pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
    def test_an_address_that_is_not_ours_is_named(self, store: UrzaStore, host: str) -> None:
        tokens = [{"name": "t", "token": "0123456789abcdef", "scopes": ["read"]}]
        with pytest.raises(ConfigError, match=re.escape(host)):
            UrzaServer(settings(host=host, tokens=tokens), store)

    def test_ipv6(self, store: UrzaStore) -> None:
        if not socket.has_ipv6:
            pytest.skip("this Python has no IPv6")
        try:
            probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError:
            pytest.skip("this machine has no IPv6 loopback address")
        probe.close()
        with RunningUrza(store, settings(host="::1")) as urza, urza.client() as client:
            assert urza.url.startswith("http://[::1]:")
            assert client.get("/api/v1/blueprints").status_code == 200

    def test_what_has_begun_is_finished(self, folder: Path, store: UrzaStore) -> None:
        urza = RunningUrza(store)
        with urza, urza.client() as client, locked(folder) as release:
            answers: list[httpx.Response] = []
            submitter = threading.Thread(target=lambda: answers.append(submit(client, blueprint(1))))
            submitter.start()
            wait_for_connections(urza, 1)
            time.sleep(0.3)
            urza.begin_to_stop()
            time.sleep(0.3)
            release()
            submitter.join(20)
        assert [each.status_code for each in answers] == [201]
        assert store.blueprints.get(blueprint(1).id).id == blueprint(1).id


def wait_for_connections(urza: RunningUrza, count: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        established = [
            each
            for each in psutil.Process(os.getpid()).net_connections("tcp")
            if each.status == "ESTABLISHED" and each.laddr.port == urza.port
        ]
        if len(established) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("nobody is connected")


def ended(connection: socket.socket) -> bytes:
    """What comes until the server closes, which it must."""
    connection.settimeout(15)
    pieces: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        pieces.extend(iter(lambda: connection.recv(65536), b""))
    return b"".join(pieces)


class TestSlowClients:
    def test_a_body_that_does_not_come_is_given_up(self, store: UrzaStore) -> None:
        with RunningUrza(store, settings(request_timeout=0.5)) as urza, raw_connection(urza.port) as connection:
            connection.sendall(
                b"POST /api/v1/blueprints HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            answer = ended(connection)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"urn:esper:problem:timeout" in answer

    def test_many_slow_clients_hold_nobody_up(self, urza: RunningUrza) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(raw_connection(urza.port)).sendall(b"POST /api/v1/blueprints HTT")
            with urza.client() as client:
                assert submit(client, blueprint(1)).status_code == 201


class TestHeads:
    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"GET /health HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
            b"POST /api/v1/blueprints HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
            b"POST /api/v1/blueprints HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /api/v1/blueprints HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
    )
    def test_what_is_not_http_or_too_large_a_head_is_refused(self, urza: RunningUrza, sent: bytes) -> None:
        with raw_connection(urza.port) as connection:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(sent)
            assert ended(connection).startswith(b"HTTP/1.1 400 ")
        with urza.client() as client:
            assert client.get("/health").status_code == 200


class TestRequestIds:
    def test_a_clients_id_comes_back(self, urza: RunningUrza) -> None:
        with urza.client() as client:
            for path in ("/health", "/nothing"):
                assert (
                    client.get(path, headers={"X-Request-ID": "Job-7.step_9"}).headers["x-request-id"] == "Job-7.step_9"
                )

    @pytest.mark.parametrize("given", [None, "", "a b", "x" * 65, "a\tb", "<script>", "é"])
    def test_others_are_made(self, urza: RunningUrza, given: str | None) -> None:
        headers = {} if given is None else {b"X-Request-ID": given.encode()}
        with urza.client() as client:
            made = [client.get("/health/live", headers=headers).headers.get_list("x-request-id") for _ in range(2)]
            assert all(len(each) == 1 and re.fullmatch("[0-9a-f]{32}", each[0]) for each in made)
            assert made[0] != made[1]


class TestAccessLog:
    def test_each_request_is_a_line_with_fields(self, urza: RunningUrza, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "esper.services.urza.http.request_log")
        with urza.client() as client:
            client.get("/api/v1/kernels/mine", headers={"X-Request-ID": "one"})
            client.get("/api/v1/blueprints?limit=2", headers={"X-Request-ID": "two"})
            client.get("/a%0d%0ab", headers={"X-Request-ID": "three"})
        deadline = time.monotonic() + 10
        lines: dict[str, logging.LogRecord] = {}
        while len(lines) < 3 and time.monotonic() < deadline:  # a line is written after the answer was sent
            lines = {
                each.fields["request_id"]: each  # type: ignore[attr-defined]  # from the log record's extras
                for each in list(caplog.records)
                if each.name == "esper.services.urza.http.request_log"
            }
        one, two, three = (vars(lines[name])["fields"] for name in ("one", "two", "three"))
        assert (one["method"], one["target"], one["status"]) == ("GET", "/api/v1/kernels/mine", 404)
        assert (one["route"], one["caller"], one["address"]) == ("/api/v1/kernels/{reference}", None, "127.0.0.1")
        assert one["bytes"] > 0
        assert "seconds" in one
        assert (two["status"], two["route"]) == (200, "/api/v1/blueprints")
        assert (three["status"], three["route"]) == (404, "unknown")
        assert all("\n" not in each.getMessage() and "\r" not in each.getMessage() for each in lines.values())


class TestMetrics:
    def sample(self, text: str, name: str, **labels: str) -> float:
        found = [
            each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
            if each.name == name and all(each.labels.get(key) == value for key, value in labels.items())
        ]
        return sum(found)

    def test_requests_by_template_and_the_store(self, urza: RunningUrza) -> None:
        with urza.client() as client:
            for seed in range(3):
                submit(client, blueprint(seed))
                client.get(f"/api/v1/blueprints/{blueprint(seed).id}")
            for _ in range(4):
                claim(client)
            client.get("/api/v1/blueprints/nothing")
            client.get("/random/path/1")
            client.request("BREW", "/random/path/2")
            response = client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            text = response.text
        route = "/api/v1/blueprints/{blueprint_id}"
        requests = "esper_urza_requests_total"
        assert self.sample(text, requests, method="GET", route=route, status="200") == 3
        assert self.sample(text, requests, method="GET", route=route, status="404") == 1
        assert self.sample(text, requests, route="unknown") == 2
        assert self.sample(text, requests, method="other") == 1
        assert self.sample(text, "esper_urza_request_seconds_count", method="GET", route=route) == 4
        assert self.sample(text, "esper_urza_claims_total", outcome="claimed") == 3
        assert self.sample(text, "esper_urza_claims_total", outcome="nothing") == 1
        assert self.sample(text, "esper_urza_blueprints", status="compiling") == 3
        assert self.sample(text, "esper_urza_blueprints", status="unvalidated") == 0
        assert self.sample(text, "esper_urza_store_up") == 1
        assert "random" not in text, "paths of strangers make no labels"

    def test_two_servers_in_one_process_count_for_themselves(self, store: UrzaStore) -> None:
        with RunningUrza(store) as first, RunningUrza(store) as second:
            with first.client() as client:
                client.get("/health")
            with second.client() as client:
                text = client.get("/metrics").text
        assert self.sample(text, "esper_urza_requests_total", route="/health") == 0


def test_a_client_that_goes_away_is_no_failure(urza: RunningUrza, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = json.dumps(submission(blueprint(1))).encode()
    for _ in range(20):
        with raw_connection(urza.port) as connection:
            connection.sendall(
                b"POST /api/v1/blueprints HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: " + str(len(body) + 1).encode() + b"\r\n\r\n" + body
            )
    with urza.client() as client:
        deadline = time.monotonic() + 10
        while 'status="499"} 20.0' not in (text := client.get("/metrics").text) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 'status="499"} 20.0' in text
        assert client.get("/api/v1/blueprints").json()["items"] == []
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []
