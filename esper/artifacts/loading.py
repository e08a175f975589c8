"""Loading artifacts: every byte is suspect until it was checked.

The order is fixed: size cap, hash, signature, parse, schema, limits, names and shapes, finite weights, shapes on the
meta device. Nothing in an artifact is executed: opcodes are looked up in a closed table, and no name leads anywhere
else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

from esper.artifacts import safetensors_file
from esper.artifacts.container import ID_PATTERN, MANIFEST_KEY, SCHEMA, Artifact, artifact_id
from esper.artifacts.document import Json, JsonReader, canonical_json, parse_json
from esper.artifacts.errors import ArtifactCorruptError, ArtifactGraphError, UntrustedArtifactError
from esper.artifacts.graph import KernelGraph
from esper.artifacts.limits import Limits
from esper.artifacts.shapes import LEADING, check_shapes
from esper.artifacts.signing import Signature, TrustStore, artifact_message
from esper.artifacts.weights import check_finite, ordinary_tensors

__all__ = ["Limits", "load_artifact"]

_MAX_TOOLS = 32
_LONGEST_KNOWN = 2**15  # characters of a graph that is remembered: 128 of these take a few megabytes


@ordinary_tensors()
def load_artifact(
    data: bytes,
    *,
    expected_id: str | None = None,
    signature: Signature | None = None,
    trust: TrustStore | None = None,
    limits: Limits | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Artifact:
    """Checks `data` and returns the artifact, with its weights on the CPU.

    With `expected_id`, the hash must be that. With `trust`, a signature by a trusted key is required; without, none is
    looked at. Raises :class:`ArtifactCorruptError`, ``UntrustedArtifactError``, ``ArtifactLimitError`` or
    ``ArtifactGraphError``, and nothing else, whatever the bytes. `pause` is called between pieces of the work.
    """
    limits = limits or Limits()
    limits.check_count("the artifact's size in bytes", len(data), "max_bytes")
    identity = artifact_id(data)
    if expected_id is not None and identity != expected_id:
        raise ArtifactCorruptError(f"the artifact's bytes hash to {identity}, not to {expected_id}; fetch it again")
    if trust is not None:
        if signature is None:
            raise UntrustedArtifactError(
                f"artifact {identity} is not signed; sign it, or load it without a trust store"
            )
        trust.verify(artifact_message(identity), signature)
    pause()
    header = safetensors_file.read_header(data, limits)
    manifest, graph = _read_manifest(header, limits)
    _check_declarations(graph, header)
    tensors = safetensors_file.read_tensors(data)
    graph.check_tensors(tensors)
    tensors = {name: tensors[name] for name in graph.tensor_names}
    pause()
    check_finite(tensors)
    pause()
    check_shapes(graph, LEADING, limits, pause)
    return Artifact(identity, data, graph, MappingProxyType(tensors), MappingProxyType(manifest))


def _read_manifest(header: safetensors_file.Header, limits: Limits) -> tuple[dict[str, Json], KernelGraph]:
    if set(header.metadata) != {MANIFEST_KEY}:
        raise ArtifactCorruptError(
            f"the container's metadata is {sorted(header.metadata)[:8]}; an artifact has exactly {MANIFEST_KEY!r}"
        )
    fields = parse_json(header.metadata[MANIFEST_KEY], "the manifest", ArtifactCorruptError)
    reader = JsonReader(fields, "manifest", ArtifactCorruptError)
    schema = reader.integer("schema", 1)
    if schema != SCHEMA:
        raise ArtifactCorruptError(f"manifest.schema is {schema}, this version reads {SCHEMA}; update esper")
    provenance = _read_provenance(reader.object("provenance"))
    graph = _read_graph(reader.value("graph"), limits)
    reader.finish()
    return {"schema": schema, "graph": graph.to_json(), "provenance": provenance}, graph


def _read_graph(value: object, limits: Limits) -> KernelGraph:
    """The graph; artifacts that declare the same one share it, and with it what is made of it."""
    try:
        text = canonical_json(value)  # type: ignore[arg-type]  # it was parsed from JSON
    except RecursionError:
        text = ""
    if not 0 < len(text) <= _LONGEST_KNOWN:
        return KernelGraph.from_json(value, "manifest.graph", limits)
    return _known_graph(text, limits)


@functools.lru_cache(maxsize=128)
def _known_graph(text: str, limits: Limits) -> KernelGraph:
    return KernelGraph.from_json(json.loads(text), "manifest.graph", limits)


def _read_provenance(reader: JsonReader) -> Mapping[str, Json]:
    blueprint = reader.text("blueprint", ID_PATTERN)
    parent = None if reader.value("parent") is None else reader.text("parent", ID_PATTERN)
    tools = reader.object("toolchain")
    reader.finish()
    if len(tools.keys) > _MAX_TOOLS:
        raise ArtifactCorruptError(f"manifest.provenance.toolchain has {len(tools.keys)} entries; at most {_MAX_TOOLS}")
    return MappingProxyType(
        {
            "blueprint": blueprint,
            "parent": parent,
            "toolchain": MappingProxyType({name: tools.text(name) for name in tools.keys}),
        }
    )


def _check_declarations(graph: KernelGraph, header: safetensors_file.Header) -> None:
    """The container declares exactly the tensors that the graph needs."""
    missing = sorted(set(graph.tensor_names) - set(header.tensors))
    extra = sorted(set(header.tensors) - set(graph.tensor_names))
    if missing or extra:
        raise ArtifactGraphError(
            f"the artifact's tensors do not fit its graph: missing {missing[:8]}, extra {extra[:8]}"
        )
    for spec in graph.tensors:
        declared = header.tensors[spec.name]
        if declared != spec:
            raise ArtifactGraphError(
                f"tensor {spec.name!r} is {declared.dtype} of shape {declared.shape}, its graph needs {spec.dtype} of "
                f"shape {spec.shape}"
            )
