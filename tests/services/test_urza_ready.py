"""Urza says that it listens when nothing is left to be made for the first request; and waits for no bus."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from torch import nn

from esper import Blueprint
from esper.services.urza import UrzaStore, warm_up
from tests.golden.deployment import Deployment, deployment
from tests.services.shelf import blueprint
from tests.services.urza_server import RunningUrza
from tests.services.urza_server_calls import add_kernel, claim, submit

_SAYS = "Urza listens at"


@pytest.fixture
def black_hole() -> Iterator[socket.socket]:
    """A server that takes every connection and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        yield listening


@pytest.fixture
def beside_a_black_hole(tmp_path: Path, black_hole: socket.socket) -> Iterator[Deployment]:
    """An `esper urza` whose bus is one, and whose log has what Python imports."""
    bus = f"redis://127.0.0.1:{black_hole.getsockname()[1]}/0"
    settings = {"PYTHONPROFILEIMPORTTIME": "1", "ESPER_REDIS__SOCKET_TIMEOUT": "600"}
    with deployment(tmp_path, bus, settings) as team:
        team.start("urza", "urza", "--port", team.url.rpartition(":")[2])
        team.wait_for(lambda: _SAYS in team.log("urza").read_text(), "Urza says where it listens")
        yield team
        black_hole.close()  # so that nothing is waited for at the end


@pytest.mark.slow
def test_the_first_requests_import_nothing_and_wait_for_no_bus(
    beside_a_black_hole: Deployment, black_hole: socket.socket
) -> None:
    own = Blueprint.from_module(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)), 8)
    with beside_a_black_hole.client() as client:
        assert submit(client, own, "own").status_code == httpx.codes.CREATED
        bus, _ = black_hole.accept()
        with bus:
            assert bus.recv(65536), "the submission is announced"
            artifact = add_kernel(client, Blueprint.bottleneck(8, 8, 2), "first")
            assert claim(client).status_code == httpx.codes.OK
            for path in (
                "/health", "/health/ready", "/metrics", "/api/v1/blueprints", f"/api/v1/blueprints/{own.id}",
                f"/api/v1/blueprints/{own.id}/document", "/api/v1/kernels/first",
                f"/api/v1/kernels/{artifact.id}/content",
            ):  # fmt: skip
                assert client.get(path).status_code == httpx.codes.OK, path
            assert client.post("/api/v1/kernels/query", json={}).status_code == httpx.codes.OK
            assert client.get("/api/v1/kernels/none").status_code == httpx.codes.NOT_FOUND
            bus.setblocking(False)
            with pytest.raises(BlockingIOError):  # Urza still waits for the bus
                bus.recv(65536)
    before, _, after = beside_a_black_hole.log("urza").read_text().partition(_SAYS)
    assert "import time:" in before, "the log has what is imported"
    assert [line for line in after.splitlines() if line.startswith("import time:")] == []


def test_urza_reaches_its_blobs_before_it_is_asked_for_one_and_starts_without(
    folder: Path, black_hole: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{black_hole.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(warm_up, "_PATIENCE", 1.0)
    folder.mkdir()
    with (
        UrzaStore(f"sqlite:///{folder}/esper.db", "s3://kernels/blobs") as store,
        caplog.at_level(logging.WARNING, "esper.services.urza"),
        RunningUrza(store) as urza,
        black_hole.accept()[0] as blobs,
        urza.client() as client,
    ):
        assert blobs.recv(65536).startswith(b"HEAD /kernels/blobs/")
        assert client.get("/health/ready").status_code == httpx.codes.OK
        assert client.get(f"/api/v1/blueprints/{blueprint().id}").status_code == httpx.codes.NOT_FOUND
        black_hole.close()
    for thread in threading.enumerate():
        if thread.name == "esper-urza-blobs":
            thread.join(60)
    assert "have not answered" in caplog.text
