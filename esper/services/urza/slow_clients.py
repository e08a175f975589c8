"""The HTTP protocol of the server: uvicorn's over h11, which does not wait forever for slow or silent clients."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from esper.services.problems import MEDIA_TYPE, REQUEST_PREFIX, TYPE_PREFIX, ProblemDocument, problem_by_slug

__all__ = ["MAX_HEAD_BYTES", "PatientProtocol"]

MAX_HEAD_BYTES = 32 * 1024
"""Of a request's line and headers together."""

_HEAD_SECONDS = 10.0
"""For a request's line and headers to arrive, from its first byte or from the connection on."""
_STALL_SECONDS = 30.0
"""For a client to take what was sent to it: one piece, and what the system buffers."""


class _BoundedHeads(h11.Connection):
    """h11 counts what it keeps for later; a head that arrives whole may have any size."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        event = super().next_event()
        if isinstance(event, h11.Request):
            taken = before - len(self.trailing_data[0])
        elif isinstance(event, h11.EndOfMessage):  # headers may follow a body in chunks too
            taken = sum(len(name) + len(value) for name, value in event.headers)
        else:
            return event
        if taken > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return event


class PatientProtocol(H11Protocol):
    """Ends connections whose request does not arrive or whose answer is not taken. Bodies have the app's own limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _BoundedHeads(h11.SERVER, MAX_HEAD_BYTES)

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._head = self.loop.call_later(_HEAD_SECONDS, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(_HEAD_SECONDS, self._end)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None:
            self._forget_head()  # from here on the keep-alive timer watches

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(_STALL_SECONDS, self._end)

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for the client to take it
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or has a head that is too large. A problem document like every other error."""
        del msg  # uvicorn's
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way already
            self.transport.close()
            return
        problem = problem_by_slug("invalid-request")
        body = ProblemDocument(
            type=TYPE_PREFIX + problem.slug,
            title=problem.title,
            status=400,
            detail=f"this is not an HTTP/1.1 request with a head of at most {MAX_HEAD_BYTES} bytes",
            instance=REQUEST_PREFIX + uuid.uuid4().hex,
        ).model_dump_json()
        headers = [("Content-Type", MEDIA_TYPE), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body.encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _end(self) -> None:
        self.transport.abort()

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
