"""Kernels for the execution side, out of a store that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from esper.artifacts import Signature, SigningKeyError, TrustStore, artifact_message
from esper.execution.sources import (
    AmbiguousKernelError,
    FetchedKernel,
    KernelSourceError,
    UnknownKernelError,
)
from esper.services.errors import AmbiguousPrefixError, ServiceError, UnknownKernelReferenceError
from esper.services.stores import KernelFile, ManyKernels, Store

__all__ = ["StoreKernelSource", "best_signature", "source_errors"]


class StoreKernelSource:
    """A :class:`~esper.execution.sources.KernelSource` over a store, which is opened at the first question."""

    def __init__(self, store: Callable[[], Store], trust: Callable[[], TrustStore]) -> None:
        self._store = store
        self._trust = trust
        self._expected: dict[str, KernelFile] = {}  # to be fetched in a moment, and found already

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copied model finds its kernels where the original does

    def resolve(self, reference: str) -> str:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            return self._store().kernels.resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            trust, kernels, found = self._trust(), self._store().kernels, self._expected.pop(artifact_id, None)
            if found is not None and isinstance(kernels, ManyKernels):
                data, signatures = kernels.read(artifact_id, found), found.signatures
            else:
                data, signatures = kernels.content(artifact_id)
            return FetchedKernel(data, best_signature(trust, artifact_id, signatures))

    def expect(self, artifact_ids: Sequence[str]) -> None:
        """See :class:`~esper.execution.sources.ExpectingSource`."""
        with source_errors():
            kernels = self._store().kernels
            if isinstance(kernels, ManyKernels):
                self._expected = kernels.files(artifact_ids)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with source_errors():
            return self._store().kernels.attachment(artifact_id, target_key, self._trust().key_ids)

    def trust(self) -> TrustStore:
        """The platform's trusted keys."""
        with source_errors():
            return self._trust()


def best_signature(trust: TrustStore, artifact_id: str, signatures: Sequence[Signature]) -> Signature | None:
    """The one that `trust` takes; if there is none, any other, for whoever loads the kernel to say what is wrong."""
    if len(signatures) == 1:
        return signatures[0]  # whoever loads the kernel verifies it
    return trust.choose(artifact_message(artifact_id), signatures) or next(iter(signatures), None)


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
