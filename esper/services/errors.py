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
    "IllegalTransitionError",
    "InvalidNameError",
    "NameTakenError",
    "PlatformClosedError",
    "ServiceError",
    "StoreBusyError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "StoreReadOnlyError",
    "StoreSchemaError",
    "UnknownBlueprintError",
    "UnknownKernelReferenceError",
]


class ServiceError(EsperError):
    """Base class of the services' errors."""


class StoreError(ServiceError):
    """The store could not do what was asked; the subclass says why, or the message for what has none."""


class StoreReadOnlyError(StoreError):
    """The store's folder or database cannot be written, or not even created."""


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


class CompilationFailedError(ServiceError):
    """The blueprint is invalid. `report` has what was found, if the compilation came that far."""

    def __init__(self, message: str, blueprint_id: str, report: ValidationReport | None = None) -> None:
        super().__init__(message)
        self.blueprint_id = blueprint_id
        self.report = report


class CompilationTimeoutError(ServiceError, TimeoutError):
    """The blueprint was not finished in the time that the caller was willing to wait. It goes on being compiled."""


class PlatformClosedError(ServiceError, RuntimeError):
    """The platform was closed."""
