"""The work of one blueprint: claim, compile in a child process, store, announce.

Nothing here traces or compiles, so it may run on a thread of a process that trains. A kernel that differs from an
earlier one in weights only is not compiled again: see `known_structure`.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from esper.artifacts import Attachment, SigningKey, Target, artifact_message
from esper.contracts.messages import KernelCharacterized, KernelReady, TopicNames
from esper.contracts.validation import ValidationReport
from esper.services.contracts import BlueprintStatus, Claim, KernelMetadata
from esper.services.errors import ClaimLostError, ServiceError, StoreBusyError
from esper.services.oona_client import OonaClient
from esper.services.stores import LEASE_SECONDS, Store
from esper.services.tezzeret.child_process import ChildExit, run_child
from esper.services.tezzeret.known_structure import KnownStructures, LikeAnother
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.protocol import ARTIFACT, ATTACHMENT, BLUEPRINT, RESULT, ChildRequest, ChildResult
from esper.services.tezzeret.watchers import StopSignal

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
_CHILDREN = 2  # a child that dies without a word gets one more try


@dataclass(frozen=True)
class Worker:
    """Everything that compiling needs. Immutable; several may work on one store.

    A child that dies by a signal, twice, makes its blueprint invalid. One that ends with an error of its own, because
    it cannot import PyTorch or has no room for its files, does not: then the worker cannot work, and raises.
    """

    store: Store
    key: SigningKey
    """Signs artifacts and attachments. The child process does not get it."""
    oona: OonaClient
    pipeline: str
    limits: ChildLimits
    lease_seconds: float = LEASE_SECONDS
    known: KnownStructures = field(default_factory=KnownStructures, repr=False, compare=False)

    def compile_next(self, stop: StopSignal, blueprint_id: str | None = None) -> str | None:
        """Compile one blueprint of those that wait, or that one if it waits, and return its id; None if none does.

        Afterwards the blueprint is validated, or invalid with the reason. On `stop` the child is killed and the
        blueprint given back; so it is on an error that is not the blueprint's, which is raised: ``ServiceError``, with
        ``StoreError`` for the store's.
        """
        claim = self.store.blueprints.claim(
            f"{socket.gethostname()}:{os.getpid()}", lease_seconds=self.lease_seconds, blueprint_id=blueprint_id
        )
        if claim is None:
            return None
        done = False
        try:
            done = self._compile(claim, stop)
        except ClaimLostError as lost:
            _log.warning("%s; what was done for it here is thrown away", lost)
            done = True
        finally:
            if not done:
                self.store.blueprints.release(claim)
        return claim.blueprint_id

    def _compile(self, claim: Claim, stop: StopSignal) -> bool:
        """False if it was stopped."""
        document = self.store.blueprints.document(claim.blueprint_id)
        like = self.known.compile(document, self.store, self.key, self.pipeline)
        if like is not None:
            self._store_like(claim, like)
            self._finish(claim, like.report)
            return True
        with tempfile.TemporaryDirectory(prefix="esper-tezzeret-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / BLUEPRINT).write_bytes(document)
            lease = _Lease(self.store, claim, self.lease_seconds)
            for attempt in range(_CHILDREN):
                (folder / RESULT).unlink(missing_ok=True)
                ended = run_child(self._request(folder), self.limits, stop, lease.look)
                if stop.is_set() and ended.killed is not None:
                    return False
                result = _result(folder, ended)
                if result is not None or ended.killed is not None:
                    break
                _log.warning("blueprint %s: attempt %d %s", claim.blueprint_id[:12], attempt + 1, ended)
            if result is None and ended.killed is None and ended.returncode > 0:
                raise ServiceError(f"the process that compiles kernels {ended}: {ended.log_tail}")
            if result is not None and result.report.passed:
                self._store(claim, result, folder)
            report = self._failure(claim, ended) if result is None else result.report
            self._finish(claim, report)
        return True

    def _request(self, folder: Path) -> ChildRequest:
        return ChildRequest.model_validate(
            {
                "folder": str(folder),
                "pipeline": self.pipeline,
                "data_bytes": self.limits.data_bytes,
                "cpu_seconds": self.limits.cpu_seconds,
            }
        )

    def _store(self, claim: Claim, result: ChildResult, folder: Path) -> None:
        report, metadata = result.report, result.metadata
        assert report.artifact_id is not None
        assert metadata is not None
        self._add(claim, (folder / ARTIFACT).read_bytes(), metadata, report)
        if result.target is not None:
            target, payload = Target(**result.target), (folder / ATTACHMENT).read_bytes()
            self.store.kernels.add_attachment(Attachment.create(report.artifact_id, target, payload, self.key))

    def _store_like(self, claim: Claim, like: LikeAnother) -> None:
        self._add(claim, like.artifact.data, like.metadata, like.report)
        self.store.kernels.add_attachment(like.attachment)

    def _add(self, claim: Claim, data: bytes, metadata: KernelMetadata, report: ValidationReport) -> None:
        assert report.artifact_id is not None
        signature = self.key.sign(artifact_message(report.artifact_id))
        self.store.kernels.add(data, signature, blueprint_id=claim.blueprint_id, metadata=metadata, report=report)

    def _failure(self, claim: Claim, ended: ChildExit) -> ValidationReport:
        """The report on a child that left none. Its own exceptions are no such case: they are not the blueprint's."""
        if ended.killed == "time":
            reason = f"it was not compiled within {self.limits.wall_seconds:g} s; raise tezzeret.wall_seconds"
        elif ended.killed == "memory":
            reason = (
                f"compiling it took {ended.peak_bytes / 2**20:.0f} MiB of memory, more than "
                f"{self.limits.memory_bytes / 2**20:.0f} MiB; raise tezzeret.memory_mb"
            )
        else:
            reason = f"the process that compiled it {ended}, {_CHILDREN} times, without a report"
            if ended.log_tail:
                reason += f"; its last words:\n{ended.log_tail}"
        return ValidationReport(
            blueprint_id=claim.blueprint_id,
            pipeline=self.pipeline,
            passed=False,
            reason=reason,
            seconds=ended.seconds,
            peak_memory_mb=ended.peak_bytes / 2**20,
        )

    def _finish(self, claim: Claim, report: ValidationReport) -> None:
        status = BlueprintStatus.VALIDATED if report.passed else BlueprintStatus.INVALID
        record = self.store.blueprints.set_status(
            claim.blueprint_id,
            status,
            token=claim.token,
            reason=report.reason,
            report=report,
            artifact_id=report.artifact_id if report.passed else None,
        )
        if record.artifact_id is not None:
            kernel = self.store.kernels.get(record.artifact_id)
            ready = KernelReady(
                blueprint_id=record.id,
                artifact_id=kernel.id,
                name=kernel.name,
                in_features=kernel.in_features,
                out_features=kernel.out_features,
                dtype=kernel.dtype,
                size_bytes=kernel.size_bytes,
            )
            self.oona.publish(TopicNames.COMPILATION_KERNEL_READY, ready, trace_id=record.id)
        found = KernelCharacterized(blueprint_id=record.id, artifact_id=record.artifact_id, report=report)
        self.oona.publish(TopicNames.VALIDATION_KERNEL_CHARACTERIZED, found, trace_id=record.id)


class _Lease:
    """Keeps a claim while its child runs."""

    def __init__(self, store: Store, claim: Claim, seconds: float) -> None:
        self._store, self._claim, self._seconds = store, claim, seconds
        self._renewed = time.monotonic()

    def look(self) -> None:
        """Renew when a third of the lease is over. Raises ``ClaimLostError``."""
        if time.monotonic() - self._renewed < self._seconds / 3:
            return
        try:
            self._store.blueprints.renew(self._claim, lease_seconds=self._seconds)
        except StoreBusyError as busy:
            _log.warning("a claim could not be renewed yet: %s", busy)
            return
        self._renewed = time.monotonic()


def _result(folder: Path, ended: ChildExit) -> ChildResult | None:
    """What the child left, with what only its parent knows; None if it left nothing whole."""
    try:
        result = ChildResult.model_validate_json((folder / RESULT).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    peak = max(result.report.peak_memory_mb or 0.0, ended.peak_bytes / 2**20)
    report = result.report.model_copy(update={"seconds": ended.seconds, "peak_memory_mb": peak})
    return result.model_copy(update={"report": report})
