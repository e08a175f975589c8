"""Urza as it runs in earnest, on a free port of the loopback address: in a thread, or as a process."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from esper.configs import EsperConfig, UrzaConfig
from esper.services.problems import MEDIA_TYPE, TYPE_PREFIX
from esper.services.urza import UrzaStore
from esper.services.urza.server import UrzaServer

__all__ = ["SERVE", "RunningUrza", "assert_problem", "http_client", "locked", "raw_connection", "settings"]


SERVE = """
import sys
from pathlib import Path
from esper.configs import EsperConfig, UrzaConfig
from esper.services.urza import UrzaStore
from esper.services.urza.server import run_server

with UrzaStore.in_folder(Path(sys.argv[1])) as store:
    run_server(EsperConfig(environment="test", urza=UrzaConfig(port=0)), store)
print("closed", flush=True)
"""
"""A program that serves the store in the folder that it is given, says where, and says when it has closed it."""


def settings(**urza: Any) -> EsperConfig:
    """Settings for tests, with these in the section `urza`."""
    return EsperConfig(environment="test", urza=UrzaConfig.model_validate({"port": 0, **urza}))


def http_client(url: str = "", token: str | None = None, timeout: float = 60.0) -> httpx.Client:
    """A client of the server at `url` with time for a machine under load: what is tested is not speed."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)


class RunningUrza:
    """A server over `store` in a thread, until the end of the `with` block."""

    def __init__(
        self, store: UrzaStore, config: EsperConfig | None = None, on_submit: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self._server = UrzaServer(config or settings(), store, on_submit=on_submit)
        self.url = self._server.url
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.run, name="urza")

    def __enter__(self) -> RunningUrza:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, which must not take long."""
        self._server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def begin_to_stop(self) -> None:
        """Have it end without waiting for that."""
        self._server.stop()

    @contextlib.contextmanager
    def client(self, token: str | None = None, timeout: float = 60.0) -> Iterator[httpx.Client]:
        """A client of it, with connections of its own."""
        with http_client(self.url, token, timeout) as client:
            yield client


def assert_problem(response: httpx.Response, status: int, slug: str, detail: str = "") -> str:
    """Check that `response` is this problem, whole; returns its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail", "instance"}
    assert document["type"] == TYPE_PREFIX + slug
    assert document["status"] == status
    assert document["instance"] == "urn:esper:request:" + response.headers["x-request-id"]
    assert detail in document["detail"], document["detail"]
    text: str = document["detail"]
    return text


def raw_connection(port: int) -> socket.socket:
    """A connection to the server, for what no proper client would send."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the SQLite database's write lock; yields what lets it go."""
    holder = sqlite3.connect(folder / "esper.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    released = False

    def release() -> None:
        nonlocal released
        if not released:
            released = True
            holder.execute("ROLLBACK")

    try:
        yield release
    finally:
        release()
        holder.close()
