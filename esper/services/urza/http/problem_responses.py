"""Answers to requests that failed: one document for all of them, whoever noticed the failure."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from esper.errors import EsperError
from esper.services.errors import (
    InvalidRequestError,
    RateLimitedError,
    RequestTooLargeError,
    ServiceError,
    UnknownRouteError,
)
from esper.services.problems import (
    MEDIA_TYPE,
    REQUEST_PREFIX,
    TYPE_PREFIX,
    Problem,
    ProblemDocument,
    problem_by_slug,
    problem_of,
)
from esper.services.urza.http.request_id import request_id_of

__all__ = ["RefusedError", "install_problem_responses", "problem_response"]

_log = logging.getLogger(__name__)
_MAX_ERRORS = 5


class RefusedError(HTTPException):
    """A request that is refused while its body is being read. FastAPI lets this kind of exception through."""

    def __init__(self, cause: EsperError, problem: Problem | None = None) -> None:
        self.cause = cause
        self.problem = problem or problem_of(cause)
        super().__init__(self.problem.status, str(cause))


def problem_response(
    scope: Scope, error: BaseException, problem: Problem | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """What a client is told of `error`. A failure of the server's own is logged, and told without its particulars."""
    problem = problem or problem_of(error)
    request_id = request_id_of(scope)
    if problem.status >= 500 and problem.slug != "timeout":
        unforeseen = not isinstance(error, EsperError)
        _log.error("request %s: %s: %s", request_id, problem.slug, error, exc_info=error if unforeseen else None)
    document = ProblemDocument(
        type=TYPE_PREFIX + problem.slug,
        title=problem.title,
        status=problem.status,
        detail=problem.detail or str(error),
        instance=REQUEST_PREFIX + request_id,
    )
    all_headers = dict(headers or {})
    wait: float | None = problem.retry_after
    if isinstance(error, RateLimitedError) and error.retry_after is not None:
        wait = error.retry_after
    if wait is not None:
        all_headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return Response(document.model_dump_json(), problem.status, all_headers, MEDIA_TYPE)


def install_problem_responses(app: FastAPI) -> None:
    """Have `app` answer with these documents also where FastAPI would answer in a way of its own."""
    app.add_exception_handler(EsperError, _of_error)
    app.add_exception_handler(RequestValidationError, _of_invalid)
    app.add_exception_handler(HTTPException, _of_framework)


def _of_error(request: Request, error: Exception) -> Response:
    return problem_response(request.scope, error)


def _of_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    parts = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found[:_MAX_ERRORS]]
    if len(found) > _MAX_ERRORS:
        parts.append(f"and {len(found) - _MAX_ERRORS} more")
    return problem_response(request.scope, InvalidRequestError("; ".join(parts)))


def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, RefusedError):
        return problem_response(request.scope, error.cause, error.problem, error.headers)
    return problem_response(request.scope, *_refusal(error.status_code, error.detail, request), error.headers)


def _refusal(status: int, detail: str, request: Request) -> tuple[EsperError, Problem]:
    """The error and kind for an HTTP status that the framework chose."""
    if status == 404:
        error: EsperError = UnknownRouteError("there is nothing at this path; see the OpenAPI document")
    elif status == 405:
        error = InvalidRequestError(f"{request.method} is not possible here")
        return error, problem_by_slug("method-not-allowed")
    elif status == 413:
        error = RequestTooLargeError(detail)
    elif status < 500:
        error = InvalidRequestError(detail)
    else:
        error = ServiceError(detail)
    return error, problem_of(error)
