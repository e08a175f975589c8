"""Urza's server: it binds an address, serves until it is told to stop, and finishes what it has begun."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from esper.configs import ConfigError, EsperConfig
from esper.services.urza.app import create_app
from esper.services.urza.http.auth import check_exposure
from esper.services.urza.storage.store import UrzaStore
from esper.services.urza.warm_up import warm_up

__all__ = ["UrzaServer", "listen", "run_server"]

_log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 30
_GRACE_SECONDS = 15
_BACKLOG = 512
_MAX_HEAD_BYTES = 32 * 1024  # of a request's line and headers that arrive in pieces


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. Raises :class:`ConfigError` naming what is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as cause:
        raise ConfigError(f"urza.host {host!r} is no address of this machine ({cause}); choose another") from cause
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as cause:
        bound.close()
        remedy = "urza.port, or 0 for a free one" if cause.errno == errno.EADDRINUSE else "urza.host or urza.port"
        raise ConfigError(f"Urza cannot listen at {host}:{port} ({cause.strerror}); choose another {remedy}") from cause
    return bound


class UrzaServer:
    """A bound server. `run` serves on the calling thread; `stop` may be called from any."""

    def __init__(
        self, config: EsperConfig, store: UrzaStore, *, on_submit: Callable[[str], None] | None = None
    ) -> None:
        """Binds `urza.host` and `urza.port` when all is there that requests need, which takes seconds to import.

        Raises :class:`ConfigError` if it cannot, or must not without tokens.
        """
        check_exposure(config)
        app = create_app(store, config, on_submit=on_submit)
        warm_up(store.blobs)  # before anybody can connect, and take that for an answer
        self._socket = listen(config.urza.host, config.urza.port)
        host, self.port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        """Where it is reached, with the port that it has."""
        self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    def run(self, on_started: Callable[[], None] | None = None) -> None:
        """Serve until :meth:`stop`, SIGTERM or SIGINT; then answer what has begun, for some seconds, and return.

        `on_started` is called once requests are answered. Signals are looked at on the main thread only.
        """
        self._server.on_started = on_started
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Have :meth:`run` end."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """Returns after a signal, where uvicorn sends it to itself again, so that the caller can end in its own way."""

    on_started: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def run_server(
    config: EsperConfig,
    store: UrzaStore,
    *,
    on_submit: Callable[[str], None] | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve `store` until SIGTERM or SIGINT.

    `on_listening` is called with the server's URL once requests are answered; the default prints it. The store stays
    the caller's to close. Raises :class:`ConfigError`.
    """
    server = UrzaServer(config, store, on_submit=on_submit)

    def tell() -> None:
        (on_listening or _print)(server.url)
        _log.info("Urza listens at %s", server.url)

    server.run(tell)
    _log.info("Urza has ended")


def _print(url: str) -> None:
    print(f"Urza listens at {url}", flush=True)
