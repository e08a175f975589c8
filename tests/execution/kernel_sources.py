"""Kernels and a source of them for the tests of this folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from esper.artifacts import Artifact, Blueprint, TrustStore, build_artifact
from esper.artifacts.signing import Signature
from esper.execution.kernel_cache import KernelCache
from esper.execution.sources import AmbiguousKernelError, FetchedKernel, UnknownKernelError

MB = 2**20


def make_artifact(seed: int = 0, *, features: int = 8, rank: int = 4, start: str = "kaiming") -> Artifact:
    """A real artifact, different for each `seed`."""
    return build_artifact(Blueprint.bottleneck(features, features, rank, start=start, seed=seed))


class FolderOfArtifacts:
    """A kernel source over artifacts in memory that counts its fetches and can be slow, closed or deaf."""

    def __init__(self, *artifacts: Artifact, trust: TrustStore | None = None) -> None:
        self.data = {artifact.id: artifact.data for artifact in artifacts}
        self.names: dict[str, str] = {}
        self.signatures: dict[str, Signature] = {}
        self.fetches: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Event()
        self.before_fetch: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self._trust = trust

    def resolve(self, reference: str) -> str:
        if reference in self.names:
            return self.names[reference]
        found = [each for each in self.data if len(reference) >= 12 and each.startswith(reference)]
        if not found:
            raise UnknownKernelError(f"no kernel {reference!r}")
        if len(found) > 1:
            raise AmbiguousKernelError(f"{reference!r} fits {len(found)} kernels; give more digits")
        return found[0]

    def fetch(self, artifact_id: str) -> FetchedKernel:
        with self.lock:
            self.fetches[artifact_id] += 1
        self.asked.set()
        self.before_fetch()
        assert self.open.wait(30)
        if artifact_id not in self.data:
            raise UnknownKernelError(f"no kernel {artifact_id!r}")
        return FetchedKernel(self.data[artifact_id], self.signatures.get(artifact_id))

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return None

    def trust(self) -> TrustStore | None:
        return self._trust


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return once `condition` holds; fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.001)


def cache_for(source: FolderOfArtifacts, count: int, artifact: Artifact) -> KernelCache:
    """A cache with room for exactly `count` artifacts of this one's size."""
    return KernelCache((len(artifact.data) * count + 0.5) / MB, source=source)


def counts(cache: KernelCache) -> tuple[int, int, int]:
    """Hits, misses and entries."""
    found = cache.get_cache_stats()
    return found["cache_hits"], found["cache_misses"], found["cache_entries"]
