"""The log of requests: each gets an id, a line and a place in the metrics, and an answer whatever happens inside."""

from __future__ import annotations

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.services.urza.http.metrics import Metrics
from esper.services.urza.http.problem_responses import problem_response
from esper.services.urza.http.request_id import HEADER, given_or_made
from esper.services.urza.http.request_limits import CALLER_KEY

__all__ = ["RequestLog"]

_log = logging.getLogger(__name__)

_GONE = 499
_MAX_TARGET = 300


class RequestLog:
    """The outermost ASGI application of Urza.

    Log records have a text for people and the same as fields for machines: `request_id`, `method`, `target`, `route`,
    `status`, `seconds`, `bytes`, `caller`, `address`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = given_or_made(scope)
        began = time.perf_counter()
        status, sent, complete = 0, 0, False

        async def noticing(message: Message) -> None:
            nonlocal status, sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, request_id.encode("ascii"))]
            else:
                sent += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except ClientDisconnect:
            _log.debug("request %s: the client went away while it was being read", request_id)
        except Exception as error:
            if status:
                raise  # uvicorn logs it and ends the connection: the client sees that the answer is cut off
            await problem_response(scope, error)(scope, receive, noticing)
        finally:
            self._note(scope, request_id, status if complete else status or _GONE, sent, time.perf_counter() - began)

    def _note(self, scope: Scope, request_id: str, status: int, sent: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.request(scope["method"], route, status, seconds)
        fields = {
            "request_id": request_id,
            "method": scope["method"][:20],
            "target": scope.get("raw_path", b"").decode("latin-1")[:_MAX_TARGET],  # percent-encoded: no line breaks
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": sent,
            "caller": scope.get(CALLER_KEY),
            "address": scope["client"][0] if scope.get("client") else None,
        }
        text = "%(method)s %(target)s %(status)d %(bytes)d bytes %(seconds).4f s caller=%(caller)s id=%(request_id)s"
        _log.info(text, fields, extra={"fields": fields})
