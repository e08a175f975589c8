"""Errors of the services. All are :class:`ServiceError`; a message names the value and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.errors import EsperError

if TYPE_CHECKING:
    from esper.contracts.validation import ValidationReport

__all__ = [
    "AmbiguousPrefixError",
    "ClaimLostError",
    "CompilationFailedError",
    "CompilationTimeoutError",
    "ForbiddenError",
    "IllegalTransitionError",
    "InvalidNameError",
    "InvalidRequestError",
    "KernelNotTrustedError",
    "NameTakenError",
    "PlatformClosedError",
    "QueueUnavailableError",
    "RateLimitedError",
    "RequestTooLargeError",
    "ServiceError",
    "StoreBusyError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "StoreReadOnlyError",
    "StoreSchemaError",
    "StoreTimeoutError",
    "StoreUnsafeError",
    "TooManySignaturesError",
    "UnauthorisedError",
    "UnknownAttachmentError",
    "UnknownBlueprintError",
    "UnknownKernelReferenceError",
    "UnknownRouteError",
    "UrzaProtocolError",
    "UrzaUnavailableError",
]


class ServiceError(EsperError):
    """Base class of the services' errors."""


class StoreError(ServiceError):
    """The store could not do what was asked; the subclass says why, or the message for what has none."""


class StoreReadOnlyError(StoreError):
    """The store's folder or database cannot be written, or not even created."""


class StoreUnsafeError(StoreError):
    """The data folder, or one that it lies in, belongs to another user or can be written to by others."""


class StoreFullError(StoreError):
    """There is no room left, or a quota or file-size limit is reached. Nothing was stored."""


class StoreSchemaError(StoreError):
    """The database's tables are not the ones that this version of Esper reads. Nothing was touched."""


class StoreCorruptError(StoreError):
    """What was read is not what was stored."""


class StoreBusyError(StoreError):
    """Other processes held the database for longer than the busy timeout. Trying again may help."""


class InvalidNameError(StoreError, ValueError):
    """A name that could be taken for an id or a path."""


class NameTakenError(StoreError, ValueError):
    """The name stands for another blueprint already."""


class UnknownBlueprintError(StoreError, KeyError):
    """No blueprint has this id."""


class UnknownKernelReferenceError(StoreError, KeyError):
    """No kernel has this id, prefix or name."""


class AmbiguousPrefixError(StoreError, ValueError):
    """Several kernels' ids start with this prefix."""


class IllegalTransitionError(StoreError, ValueError):
    """A blueprint's status may not change in this way."""


class ClaimLostError(StoreError):
    """The claim's lease ran out and the blueprint is no longer this worker's."""


class UnknownAttachmentError(StoreError, KeyError):
    """There is no compiled code of this kernel for this target."""


class InvalidRequestError(StoreError, ValueError):
    """A request that cannot be understood: not JSON, a field missing, of the wrong type or out of range."""


class RequestTooLargeError(StoreError, ValueError):
    """A request has more bytes than Urza accepts; `urza.max_body_mb` is the limit."""


class RateLimitedError(StoreError):
    """A client sent more requests than Urza answers. `retry_after` is in how many seconds it may ask again."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManySignaturesError(StoreError):
    """So many keys have signed a kernel, or its attachment for a target, that another one's is not kept."""


class UnauthorisedError(StoreError, PermissionError):
    """Urza asks for a token and none was shown, or one that it does not know."""


class ForbiddenError(StoreError, PermissionError):
    """The token does not allow this."""


class StoreTimeoutError(StoreError, TimeoutError):
    """Urza gave the request up after `urza.request_timeout` seconds. It may have been carried out."""


class UnknownRouteError(StoreError, LookupError):
    """Urza has nothing at this path: another version, or not Urza."""


class UrzaUnavailableError(StoreError, ConnectionError):
    """Urza cannot be reached, or answers that it failed; or is left alone for a while because it did. Or: offline."""


class UrzaProtocolError(StoreError):
    """What answers at `urza.url` is not an Urza, or not one of this version."""


class CompilationFailedError(ServiceError):
    """The blueprint is invalid. `report` has what was found, if the compilation came that far."""

    def __init__(self, message: str, blueprint_id: str, report: ValidationReport | None = None) -> None:
        super().__init__(message)
        self.blueprint_id = blueprint_id
        self.report = report


class KernelNotTrustedError(ServiceError):
    """The blueprint was compiled, by workers none of whose keys this platform trusts: no model here would load it."""


class CompilationTimeoutError(ServiceError, TimeoutError):
    """The blueprint was not finished in the time that the caller was willing to wait. It goes on being compiled."""


class PlatformClosedError(ServiceError, RuntimeError):
    """The platform was closed."""


class QueueUnavailableError(ServiceError):
    """Redis, which tells workers what waits, is not set or cannot be reached. What was submitted is not lost."""
