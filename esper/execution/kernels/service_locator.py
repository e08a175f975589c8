"""The services that a layer uses by itself when it is given none: set once by the package's top level.

`execution` does not know the platform or the compiler; whoever does puts them here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import BaseModel

from esper.artifacts.signing import TrustStore
from esper.errors import EsperError
from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.execution.sources import ExpectingSource, FetchedKernel, KernelSource

__all__ = [
    "AttachKernel",
    "TelemetrySink",
    "attach_kernel",
    "is_default",
    "kernel_source",
    "set_defaults",
    "telemetry_sink",
]


class TelemetrySink(Protocol):
    """Where reports go. `publish` never blocks and never raises."""

    def publish(self, topic: str, payload: BaseModel) -> None: ...


AttachKernel = Callable[[KernelSource, LoadedKernel], None]
"""Gives a kernel its compiled attachment, if the source has a trusted one for this machine."""

_source: Callable[[], KernelSource] | None = None
_sink: Callable[[], TelemetrySink | None] | None = None
_attach: AttachKernel | None = None


def set_defaults(
    source: Callable[[], KernelSource], sink: Callable[[], TelemetrySink | None], attach: AttachKernel
) -> None:
    """`source` and `sink` are called whenever one is needed. `source` keeps what it makes. `sink` makes nothing, for it
    is called on threads that must not wait: it returns None as long as there is nobody to report to."""
    global _source, _sink, _attach
    _source, _sink, _attach = source, sink, attach


class _DefaultSource:
    """A kernel source that is made when it is first asked."""

    def resolve(self, reference: str) -> str:
        return self._made().resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        return self._made().fetch(artifact_id)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return self._made().attachment(artifact_id, target_key)

    def trust(self) -> TrustStore | None:
        return self._made().trust()

    def expect(self, artifact_ids: Sequence[str]) -> None:
        source = self._made()
        if isinstance(source, ExpectingSource):
            source.expect(artifact_ids)

    @staticmethod
    def _made() -> KernelSource:
        if _source is None:
            raise EsperError("there is no default kernel source: import esper, or pass `source`")
        return _source()


def kernel_source() -> KernelSource:
    """The default kernel source; nothing is opened before the first request."""
    return _DefaultSource()


def is_default(source: KernelSource) -> bool:
    """Whether `source` is the default one, which is opened by being asked."""
    return isinstance(source, _DefaultSource)


class _DefaultSink:
    """Publishes to the default platform's bus, once there is one."""

    def publish(self, topic: str, payload: BaseModel) -> None:
        sink = _sink() if _sink is not None else None
        if sink is not None:
            sink.publish(topic, payload)


def telemetry_sink() -> TelemetrySink:
    """The default telemetry sink."""
    return _DefaultSink()


def attach_kernel() -> AttachKernel | None:
    """The default way to give a kernel its attachment."""
    return _attach
