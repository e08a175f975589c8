"""Kernels that differ from an earlier one in weights only: its compiled code and its measurements are theirs too.

What compiling and measuring found out holds for a structure; what depends on the weights is checked for each kernel.
Nothing here traces or compiles, so it may run on a thread of a process that trains.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from esper.artifacts import (
    Artifact,
    ArtifactError,
    Attachment,
    Blueprint,
    SigningKey,
    Target,
    TrustStore,
    build_artifact,
    load_artifact,
)
from esper.artifacts.weights import ordinary_tensors
from esper.contracts.validation import ValidationCheck, ValidationReport
from esper.services.contracts import KernelMetadata, KernelQuery
from esper.services.stores import Store
from esper.services.tezzeret.limits import PIPELINES
from esper.services.tezzeret.validation import check_eager

__all__ = ["KnownStructures", "LikeAnother"]

_log = logging.getLogger(__name__)
_DEVICE = "cpu"
_MOST_PARAMETERS = 2**22  # drawing and checking more takes too long beside a training thread
_MOST_STRUCTURES = 32
_CANDIDATES = 8


@dataclass(frozen=True)
class LikeAnother:
    """A kernel that needed no compiling, ready to be stored."""

    artifact: Artifact
    metadata: KernelMetadata
    report: ValidationReport
    attachment: Attachment


@dataclass(frozen=True)
class _Known:
    report: ValidationReport
    target: Target
    payload: bytes = field(repr=False)


class KnownStructures:
    """What one worker has compiled and signed with its key, by structure. For the thread of that worker."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    @ordinary_tensors()
    def compile(self, document: bytes, store: Store, key: SigningKey, pipeline: str) -> LikeAnother | None:
        """The kernel of a blueprint, without compiling it; None if that has to be done, or if a check does not hold.

        It has the code of a kernel in `store` of the same structure, for this machine, that `key` has signed. Raises
        ``StoreError``.
        """
        started = time.perf_counter()
        try:
            blueprint = Blueprint.from_json(document)
            if sum(spec.elements for spec in blueprint.graph.tensors) > _MOST_PARAMETERS:
                return None
            target = Target.current(_DEVICE)
            known = self._find(blueprint.graph.digest, target, store, key, pipeline)
            if known is None:
                return None
            artifact = build_artifact(blueprint)
            checks = check_eager(artifact.graph, artifact.tensors, PIPELINES[pipeline].leading[-1:])
        except (ArtifactError, RuntimeError, MemoryError):  # a process of its own finds out, and reports it
            _log.debug("a blueprint of a known structure is compiled in a process of its own", exc_info=True)
            return None
        if not all(check.passed for check in checks):
            return None
        like = ValidationCheck(
            name="structure", passed=True, detail=f"that of kernel {known.report.artifact_id}, whose code it has"
        )
        compiled = known.report.attachment
        report = known.report.model_copy(
            update={
                "blueprint_id": blueprint.id,
                "artifact_id": artifact.id,
                "checks": (like, *checks),
                "attachment": compiled and compiled.model_copy(update={"compile_seconds": 0.0}),
                "seconds": time.perf_counter() - started,
            }
        )
        attachment = Attachment.create(artifact.id, target, known.payload, key)
        return LikeAnother(artifact, KernelMetadata.of(artifact.graph), report, attachment)

    def _find(self, digest: str, target: Target, store: Store, key: SigningKey, pipeline: str) -> _Known | None:
        known = self._known.get(digest)
        if known is None or (known.target, known.report.pipeline) != (target, pipeline):
            known = _look(digest, target, store, key, pipeline)
            if known is None:
                return None
            self._known[digest] = known
        self._known.move_to_end(digest)
        while len(self._known) > _MOST_STRUCTURES:
            self._known.popitem(last=False)
        return known


def _look(digest: str, target: Target, store: Store, key: SigningKey, pipeline: str) -> _Known | None:
    """A store is not believed: the code has to be signed by `key`, for an artifact that has this structure indeed."""
    trust = TrustStore([key.public_bytes])
    query = KernelQuery(graph_digest=digest, target_key=target.key, limit=_CANDIDATES)
    for kernel in store.kernels.query(query):
        report = kernel.report
        if not report.passed or report.pipeline != pipeline or report.artifact_id != kernel.id:
            continue
        packed = store.kernels.attachment(kernel.id, target.key, trust.key_ids)
        try:
            if packed is None:
                continue
            attachment = Attachment.unpack(packed)
            attachment.verify(trust)
            artifact = load_artifact(store.kernels.content(kernel.id)[0], expected_id=kernel.id)
        except ArtifactError:
            continue
        if (attachment.artifact_id, attachment.target, artifact.graph.digest) == (kernel.id, target, digest):
            return _Known(report, target, attachment.payload)
    return None
