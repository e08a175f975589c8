"""Errors on the wire: `application/problem+json` (RFC 9457), and the one table that both sides of it use.

The server looks up what it raised by class, the client looks up what it received by slug, so both raise the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from esper.artifacts import ArtifactError, AttachmentError, BlueprintError
from esper.errors import EsperError
from esper.services.errors import (
    AmbiguousPrefixError,
    ClaimLostError,
    ForbiddenError,
    IllegalTransitionError,
    InvalidNameError,
    InvalidRequestError,
    NameTakenError,
    RateLimitedError,
    RequestTooLargeError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreSchemaError,
    StoreTimeoutError,
    TooManySignaturesError,
    UnauthorisedError,
    UnknownAttachmentError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
    UnknownRouteError,
)

__all__ = [
    "MEDIA_TYPE",
    "PROBLEMS",
    "REQUEST_PREFIX",
    "TYPE_PREFIX",
    "Problem",
    "ProblemDocument",
    "error_of",
    "problem_by_slug",
    "problem_of",
]

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:esper:problem:"
"""Begins `type`; the rest is the slug."""
REQUEST_PREFIX = "urn:esper:request:"
"""Begins `instance`; the rest is the request's id, which is in the server's log."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of error on the wire."""

    slug: str
    status: int
    """The HTTP status."""
    title: str
    error: type[EsperError]
    """What the store raises on the server, and the client in its user's process."""
    retry_after: int | None = None
    """Seconds after which the same request may succeed."""
    detail: str | None = None
    """What clients are told in place of the error's own message, which names folders and databases of the server."""


_LOG = "the server's log says more under the request's id"

PROBLEMS: tuple[Problem, ...] = (
    Problem("invalid-request", 422, "The request cannot be understood", InvalidRequestError),
    Problem("invalid-blueprint", 422, "Not a blueprint", BlueprintError),
    Problem("invalid-artifact", 422, "Not an artifact, or not the one that its record describes", ArtifactError),
    Problem("invalid-attachment", 422, "Not an attachment, or of another kernel or target", AttachmentError),
    Problem("invalid-name", 422, "Not a name", InvalidNameError),
    Problem("unknown-blueprint", 404, "No such blueprint", UnknownBlueprintError),
    Problem("unknown-kernel", 404, "No such kernel", UnknownKernelReferenceError),
    Problem("unknown-attachment", 404, "No such attachment", UnknownAttachmentError),
    Problem("not-found", 404, "Nothing at this path", UnknownRouteError),
    Problem("method-not-allowed", 405, "Not with this method", InvalidRequestError),
    Problem("range-not-satisfiable", 416, "No such bytes", InvalidRequestError),
    Problem("name-taken", 409, "The name stands for another blueprint", NameTakenError),
    Problem("ambiguous-prefix", 409, "Several kernels begin like this", AmbiguousPrefixError),
    Problem("illegal-transition", 409, "The status cannot change like this", IllegalTransitionError),
    Problem("too-many-signatures", 409, "Too many keys have signed it", TooManySignaturesError),
    Problem("claim-lost", 409, "The blueprint is another worker's", ClaimLostError),
    Problem("too-large", 413, "The request is too large", RequestTooLargeError),
    Problem("unauthorised", 401, "Who are you?", UnauthorisedError),
    Problem("forbidden", 403, "Not with this token", ForbiddenError),
    Problem("rate-limited", 429, "Too many requests", RateLimitedError, retry_after=1),
    Problem("timeout", 503, "The request took too long", StoreTimeoutError, retry_after=1),
    Problem(
        "store-busy",
        503,
        "The store is busy",
        StoreBusyError,
        retry_after=1,
        detail=f"others hold the store's database, or it cannot be reached; try again ({_LOG})",
    ),
    Problem(
        "store-full",
        507,
        "The store is full",
        StoreFullError,
        detail=f"the store has no room left, and nothing was stored; free some space on the server ({_LOG})",
    ),
    Problem(
        "store-read-only",
        503,
        "The store cannot be written",
        StoreReadOnlyError,
        detail=f"the store cannot be written; make its folder or database writable on the server ({_LOG})",
    ),
    Problem(
        "store-corrupt",
        500,
        "The store is damaged",
        StoreCorruptError,
        detail=f"what was read is not what was stored; restore it on the server from a copy ({_LOG})",
    ),
    Problem(
        "store-schema",
        500,
        "The store is of another version",
        StoreSchemaError,
        detail=f"the database is not of the server's version of Esper ({_LOG})",
    ),
    Problem("service-error", 500, "The server failed", StoreError, detail=f"the server failed; {_LOG}"),
)
"""Every kind. Where several have one class, the first is what the server makes of it."""

_BY_SLUG = {each.slug: each for each in PROBLEMS}
_BY_CLASS = {each.error: each for each in reversed(PROBLEMS)}


class ProblemDocument(BaseModel):
    """The body of every answer that is an error."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str
    """`urn:esper:problem:` and a slug."""
    title: str
    status: int = Field(ge=100, le=599)
    detail: str
    """What was refused, and what to do."""
    instance: str
    """`urn:esper:request:` and the request's id."""

    @property
    def slug(self) -> str | None:
        """The kind of error, or None if it is not one of Esper's."""
        return self.type.removeprefix(TYPE_PREFIX) if self.type.startswith(TYPE_PREFIX) else None


def problem_by_slug(slug: str) -> Problem:
    """Raises ``KeyError`` if there is no such kind."""
    return _BY_SLUG[slug]


def problem_of(error: BaseException) -> Problem:
    """The kind of `error` by its class or the nearest base class; `service-error` for what has none."""
    for each in type(error).__mro__:
        if each in _BY_CLASS:
            return _BY_CLASS[each]
    return _BY_SLUG["service-error"]


def error_of(document: ProblemDocument) -> EsperError:
    """What the server raised: the same class with the same message. A plain ``StoreError`` for an unknown kind."""
    problem = None if document.slug is None else _BY_SLUG.get(document.slug)
    return (StoreError if problem is None else problem.error)(document.detail)
