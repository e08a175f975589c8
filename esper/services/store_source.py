"""Kernels for the execution side, out of a store that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from esper.artifacts import SigningKeyError, TrustStore
from esper.execution.sources import (
    AmbiguousKernelError,
    FetchedKernel,
    KernelSourceError,
    UnknownKernelError,
)
from esper.services.errors import AmbiguousPrefixError, ServiceError, UnknownKernelReferenceError
from esper.services.stores import Store

__all__ = ["StoreKernelSource", "source_errors"]


class StoreKernelSource:
    """A :class:`~esper.execution.sources.KernelSource` over a store, which is opened at the first question."""

    def __init__(self, store: Callable[[], Store], trust: Callable[[], TrustStore]) -> None:
        self._store = store
        self._trust = trust

    def __deepcopy__(self, memo: object) -> StoreKernelSource:
        return self  # a copied model finds its kernels where the original does

    def resolve(self, reference: str) -> str:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            return self._store().kernels.resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            return FetchedKernel(*self._store().kernels.content(artifact_id))

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            return self._store().kernels.attachment(artifact_id, target_key)

    def trust(self) -> TrustStore:
        """The platform's trusted keys."""
        with source_errors():
            return self._trust()


@contextmanager
def source_errors() -> Iterator[None]:
    """Turn the services' errors into those that the execution side knows."""
    try:
        yield
    except UnknownKernelReferenceError as error:
        raise UnknownKernelError(str(error)) from error
    except AmbiguousPrefixError as error:
        raise AmbiguousKernelError(str(error)) from error
    except (ServiceError, SigningKeyError) as error:
        raise KernelSourceError(str(error)) from error
