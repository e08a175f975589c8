"""Artifacts of blueprints: a kernel's graph, starting weights and provenance, checked and packed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from esper.artifacts import safetensors_file
from esper.artifacts.blueprint import Blueprint
from esper.artifacts.container import MANIFEST_KEY, SCHEMA, Artifact
from esper.artifacts.document import Json, canonical_json
from esper.artifacts.limits import Limits
from esper.artifacts.loading import load_artifact
from esper.artifacts.shapes import check_shapes
from esper.artifacts.weights import check_finite, ordinary_tensors
from esper.version import __version__

__all__ = ["build_artifact"]


@ordinary_tensors()
def build_artifact(
    blueprint: Blueprint,
    *,
    toolchain: Mapping[str, str] | None = None,
    parent: str | None = None,
    limits: Limits | None = None,
) -> Artifact:
    """Builds, checks and packs `blueprint`'s kernel.

    `toolchain` says what built it (default: the versions of esper and torch, without torch's build suffix) and `parent`
    is the id of the artifact that this one grew from; both become provenance, hence part of the id. The same arguments
    give the same bytes in any process. Raises :class:`ArtifactError`.
    """
    graph, tensors = blueprint.build()
    check_finite(tensors)
    check_shapes(graph, limits=limits)
    manifest: dict[str, Json] = {
        "schema": SCHEMA,
        "graph": graph.to_json(),
        "provenance": {
            "blueprint": blueprint.id,
            "parent": parent,
            "toolchain": dict(sorted((toolchain if toolchain is not None else _toolchain()).items())),
        },
    }
    data = safetensors_file.write(tensors, {MANIFEST_KEY: canonical_json(manifest)})
    return load_artifact(data, limits=limits)


def _toolchain() -> Mapping[str, str]:
    return MappingProxyType({"esper": __version__, "torch": torch.__version__.split("+")[0]})
