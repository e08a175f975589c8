"""An HTTP server that fails in a chosen way, for tests of clients: raw bytes over TCP, on the loopback address."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.configs import UrzaConfig
from esper.services.problems import MEDIA_TYPE, TYPE_PREFIX
from esper.services.urza_client import RemoteStore

__all__ = [
    "GOOD",
    "TOKEN",
    "Behaviour",
    "BrokenServer",
    "Request",
    "answer",
    "ask",
    "broken",
    "client_settings",
    "drip",
    "endless",
    "free_port",
    "hang_up",
    "lose_answer_of",
    "problem",
    "relay",
    "reset",
    "silence",
]


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    raw: bytes = field(repr=False)
    """All of it, as it came."""


Behaviour = Callable[[Request, asyncio.StreamWriter], Awaitable[bool]]
"""Answers a request, or does not; whether the connection may be used for another one."""


class BrokenServer:
    """Treats the n-th request as `script[n]` says, and all further ones like the last, until the `with` block ends."""

    def __init__(self, *script: Behaviour, port: int = 0) -> None:
        self.requests: list[Request] = []
        self._script = script
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="broken-server")
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def asked(self) -> list[str]:
        """Method and path of every request."""
        return [f"{request.method} {request.path}" for request in self.requests]

    def __enter__(self) -> BrokenServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # the client has gone
                while True:
                    request = await _read_request(reader)
                    self.requests.append(request)
                    behaviour = self._script[min(len(self.requests), len(self._script)) - 1]
                    if not await behaviour(request, writer):
                        break
        except asyncio.CancelledError:  # the server is closed, which is no concern of asyncio's server
            pass
        finally:
            self._connections.discard(task)
            writer.close()


def free_port() -> int:
    """A port of the loopback address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def answer(
    status: int = 200,
    body: bytes = b"{}",
    kind: str | None = "application/json",
    *,
    length: int | None = None,
    cut: int | None = None,
    **headers: str,
) -> Behaviour:
    """An answer with `body`, of which the first `cut` bytes are sent, under a `Content-Length` of `length`."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> bool:
        lines = {"Content-Length": str(len(body) if length is None else length)}
        if kind is not None:
            lines["Content-Type"] = kind
        lines.update({name.replace("_", "-"): value for name, value in headers.items()})
        writer.write(_head(status, lines) + body[:cut])
        await writer.drain()
        return cut is None and length is None

    return behave


def problem(status: int, slug: str, detail: str = "for a test", **headers: str) -> Behaviour:
    """A problem document as Urza sends them."""
    document = (
        f'{{"type": "{TYPE_PREFIX}{slug}", "title": "A title", "status": {status}, "detail": "{detail}", '
        '"instance": "urn:esper:request:1"}'
    )
    return answer(status, document.encode(), MEDIA_TYPE, **headers)


async def silence(request: Request, writer: asyncio.StreamWriter) -> bool:
    """Say nothing, and keep the connection."""
    await asyncio.sleep(3600)
    return False


async def hang_up(request: Request, writer: asyncio.StreamWriter) -> bool:
    """Close the connection without an answer."""
    return False


async def reset(request: Request, writer: asyncio.StreamWriter) -> bool:
    """Have the connection reset by peer."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


def endless(kind: str = "application/octet-stream", **headers: str) -> Behaviour:
    """A chunked body that goes on until the client has enough."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> bool:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        writer.write(_head(200, {"Transfer-Encoding": "chunked", "Content-Type": kind, **names}))
        piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
        return False

    return behave


def drip(body: bytes, pause: float, kind: str = "application/json") -> Behaviour:
    """`body` byte by byte."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(_head(200, {"Content-Length": str(len(body)), "Content-Type": kind}))
        for i in range(len(body)):
            writer.write(body[i : i + 1])
            await writer.drain()
            await asyncio.sleep(pause)
        return True

    return behave


def relay(port: int) -> Behaviour:
    """What the server at `port` answers."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(await _ask(port, request))
        await writer.drain()
        return False

    return behave


def lose_answer_of(port: int) -> Behaviour:
    """Have the server at `port` do what is asked, and say nothing of it."""

    async def behave(request: Request, writer: asyncio.StreamWriter) -> bool:
        assert b" 2" in (await _ask(port, request))[:12], "it was not done"
        return False

    return behave


async def _ask(port: int, request: Request) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head, _, body = request.raw.partition(b"\r\n\r\n")
    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:"))
    writer.write(head + b"\r\nConnection: close\r\n\r\n" + body)
    answered = await reader.read(-1)
    writer.close()
    return answered


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Something", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, head + body)


TOKEN = "a-token-that-nobody-must-see"
GOOD = answer(body=b'{"seconds": 2.5}')
"""What :func:`ask` asks for."""


def client_settings(url: str | None, **client: Any) -> UrzaConfig:
    """Settings of a client with little patience, with these in the section `urza.client`."""
    return UrzaConfig.model_validate(
        {"url": url, "token": TOKEN, "client": {"timeout": 0.3, "retry_seconds": 0.01, **client}}
    )


@contextlib.contextmanager
def broken(*script: Behaviour, **client: Any) -> Iterator[tuple[BrokenServer, RemoteStore]]:
    """A server that behaves so, and a store that asks it."""
    with BrokenServer(*script) as server:
        store = RemoteStore(client_settings(server.url, **client))
        try:
            yield server, store
        finally:
            store.close()


def ask(store: RemoteStore) -> float | None:
    """A question that can be repeated; the answer is :data:`GOOD`'s 2.5."""
    return store.blueprints.next_lease_end()
