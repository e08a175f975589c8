"""The id that a request has in answers and in logs."""

from __future__ import annotations

import re
import uuid

from starlette.types import Scope

__all__ = ["HEADER", "given_or_made", "request_id_of"]

HEADER = b"x-request-id"
_WELL_FORMED = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_KEY = "esper.request_id"


def given_or_made(scope: Scope) -> str:
    """The client's id, if it sent one that can stand in a log, or a random one. Remembered with the request."""
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    made = given.decode("ascii") if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex
    scope[_KEY] = made
    return made


def request_id_of(scope: Scope) -> str:
    """The id that :func:`given_or_made` gave this request."""
    return str(scope[_KEY])
