"""Artifacts and a source of them."""

from __future__ import annotations

import pytest

from esper.artifacts import Artifact
from tests.execution.kernel_sources import FolderOfArtifacts, make_artifact
from tests.execution.small_kernels import bottleneck


@pytest.fixture(scope="session")
def artifacts() -> list[Artifact]:
    """Six different artifacts of one size."""
    made = [make_artifact(seed) for seed in range(6)]
    assert len({artifact.id for artifact in made}) == 6
    assert len({len(artifact.data) for artifact in made}) == 1
    return made


@pytest.fixture(scope="session")
def large() -> Artifact:
    """An artifact of more bytes than the six together."""
    return make_artifact(99, features=64, rank=32)


@pytest.fixture
def source(artifacts: list[Artifact]) -> FolderOfArtifacts:
    """A source of the six."""
    return FolderOfArtifacts(*artifacts)


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    return bottleneck()


@pytest.fixture(scope="session")
def host_artifact() -> Artifact:
    artifact = bottleneck(start="identity")
    assert artifact.graph.uses_host
    return artifact
