"""Answers with bytes that never change under their name: validators, ranges (RFC 9110), and sent piece by piece."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from esper.services.errors import InvalidRequestError
from esper.services.problems import problem_by_slug
from esper.services.urza.http.problem_responses import problem_response

__all__ = ["FOREVER", "ContentResponse", "matches", "not_modified", "ranged"]

FOREVER = "private, max-age=31536000, immutable"
"""The `Cache-Control` of what never changes under its name."""
_PIECE = 256 * 1024
_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII)
_TAG = re.compile(r'(W/)?"[^"]*"')


class ContentResponse(Response):
    """A response whose body is sent in pieces, so that a slow client holds up the copy of one piece only."""

    def __init__(self, content: memoryview | bytes, status_code: int, headers: Mapping[str, str]) -> None:
        super().__init__(b"", status_code, {**headers, "Content-Length": str(len(content))})
        self._content = memoryview(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive  # all that was asked is known by now
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self._content), _PIECE):
            piece = bytes(self._content[start : start + _PIECE])
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def matches(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` names `etag`: the client has the content already."""
    given = request.headers.get("if-none-match", "")
    return given.strip() == "*" or etag in (each[0].removeprefix("W/") for each in _TAG.finditer(given))


def not_modified(headers: Mapping[str, str]) -> Response:
    """304, with the headers that the content would have come with."""
    return Response(status_code=304, headers=dict(headers))


def ranged(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """`content`, or the one range of its bytes that the request asks for; several ranges are answered with all of it.

    `headers` has the `ETag`; a range with an `If-Range` that is not this tag is not looked at.
    """
    headers = {**headers, "Accept-Ranges": "bytes"}
    span = None
    if request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        span = _span(request.headers.get("range", ""), len(content))
    if span is None:
        return ContentResponse(content, 200, headers)
    start, stop = span
    if start >= stop:
        error = InvalidRequestError(f"there are {len(content)} bytes, and none of them is in the range asked for")
        unsatisfied = {"Content-Range": f"bytes */{len(content)}"}
        return problem_response(request.scope, error, problem_by_slug("range-not-satisfiable"), unsatisfied)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return ContentResponse(memoryview(content)[start:stop], 206, headers)


def _span(header: str, size: int) -> tuple[int, int] | None:
    """Where the range begins and where it ends, exclusively; None for what is not one range, and so not looked at."""
    asked = _RANGE.fullmatch(header)
    if asked is None or not (asked[1] or asked[2]):
        return None
    if not asked[1]:
        return max(0, size - int(asked[2])), size
    start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else size
    return None if asked[2] and stop <= start else (start, min(stop, size))
