"""Limits on a request: who makes it and how often, how many bytes it has, how long it takes.

Each is an ASGI application around another one, and answers with a problem document in its place.
"""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.errors import EsperError
from esper.services.errors import RateLimitedError, RequestTooLargeError, StoreTimeoutError, UnauthorisedError
from esper.services.problems import problem_of
from esper.services.urza.http.auth import Access
from esper.services.urza.http.problem_responses import RefusedError, problem_response
from esper.services.urza.http.rate_limit import RateLimit

__all__ = ["CALLER_KEY", "BodyLimit", "Deadline", "Gate"]

CALLER_KEY = "esper.caller"
"""Under this key a request's scope has the name of its token, or None."""

_UPLOADS = re.compile(r"/api/v1/blueprints|/internal/v1/kernels|/internal/v1/kernels/[^/]*/attachments/[^/]*")
_SMALL_BODY = 4 * 2**20
_CLOSE = {"Connection": "close"}  # what is left of the body is not waited for


class Deadline:
    """The answer begins within some seconds, or the request is given up; its end is the connection's concern."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noticing(message: Message) -> None:
            nonlocal begun
            if not begun:
                begun = True
                limit.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._app(scope, receive, noticing)
        except TimeoutError:
            if begun or not limit.expired():
                raise
            error = StoreTimeoutError(
                f"the request was not received and answered within {self._seconds:g} s; it may have been carried out"
            )
            await problem_response(scope, error, headers=_CLOSE)(scope, receive, send)


class Gate:
    """Lets in who may make the request, as often as they may. Decides before the body is read."""

    def __init__(self, app: ASGIApp, access: Access, rate: RateLimit) -> None:
        self._app = app
        self._access = access
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            caller = self._access.caller(scope)
            scope[CALLER_KEY] = None if caller is None else caller.name
            address = scope["client"][0] if scope.get("client") else ""
            try:
                # who shows no token, or guesses one, counts by address; who shows one, by the token too
                wait = self._rate.wait((scope[CALLER_KEY], address))
                if wait:
                    raise RateLimitedError(f"too many requests; try again in {wait:.1f} s", wait)
                self._access.check(scope, caller)
            except EsperError as error:
                headers = dict(_CLOSE)
                if isinstance(error, UnauthorisedError):
                    headers["WWW-Authenticate"] = 'Bearer realm="urza"'
                await problem_response(scope, error, problem_of(error), headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of too many bytes: by what the request declares, and by what arrives, declared or not."""

    def __init__(self, app: ASGIApp, upload_bytes: int) -> None:
        self._app = app
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = _UPLOADS.fullmatch(scope["path"]) is not None
        most = self._upload_bytes if is_upload else min(_SMALL_BODY, self._upload_bytes)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        error = RequestTooLargeError(f"the request has more than {most} bytes; urza.max_body_mb is the limit")
        if int(declared) > most:
            await problem_response(scope, error, headers=_CLOSE)(scope, receive, send)
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                refused = RefusedError(error)
                refused.headers = _CLOSE
                raise refused
            return message

        await self._app(scope, counting, send)
