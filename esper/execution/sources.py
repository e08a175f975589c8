"""Kernel sources: the protocol between the execution side and whatever stores artifacts.

Execution knows a source only through this protocol. The embedded store and the HTTP client implement it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from esper.errors import EsperError

if TYPE_CHECKING:
    from esper.artifacts.signing import Signature, TrustStore

__all__ = [
    "AmbiguousKernelError",
    "ExpectingSource",
    "FetchedKernel",
    "KernelSource",
    "KernelSourceError",
    "UnknownKernelError",
]


class KernelSourceError(EsperError):
    """A source could not answer: the store is unreachable, unreadable or damaged. Asking again later may help."""


class UnknownKernelError(KernelSourceError, KeyError):
    """No kernel has this id, prefix or name."""


class AmbiguousKernelError(KernelSourceError, ValueError):
    """More than one kernel's id starts with this prefix. Remedy: give more digits."""


@dataclass(frozen=True, slots=True)
class FetchedKernel:
    """What a source returns for an artifact: its bytes, not yet checked, and the detached signature over its id."""

    data: bytes = field(repr=False)
    signature: Signature | None


@runtime_checkable
class KernelSource(Protocol):
    """Finds and fetches artifacts. Called on background threads only, from several at once; may block."""

    def resolve(self, reference: str) -> str:
        """The artifact id, 64 hex digits, of `reference`: an id, a unique prefix of at least 12 digits, or a name.

        Raises :class:`UnknownKernelError`, :class:`AmbiguousKernelError`, or another :class:`KernelSourceError`.
        """
        ...

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """The artifact with this full id. Raises :class:`UnknownKernelError` or another :class:`KernelSourceError`.

        The caller verifies hash and signature; a source need not be trusted.
        """
        ...

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """The packed attachment of an artifact for one target (`esper.artifacts.Target.key`), or None if there is none.

        The caller verifies the signature before using it.
        """
        ...

    def trust(self) -> TrustStore | None:
        """The keys whose signatures count, or None where signatures are not asked for."""
        ...


@runtime_checkable
class ExpectingSource(KernelSource, Protocol):
    """A source that finds many kernels in one go faster than one by one."""

    def expect(self, artifact_ids: Sequence[str]) -> None:
        """These are about to be fetched, as far as they exist: look for them now. Called on background threads only.

        Raises a :class:`KernelSourceError` if that is not possible; each fetch says then what is wrong.
        """
        ...
