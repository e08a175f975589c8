"""The safetensors container, written canonically and bounded before it is read.

Format: 8 bytes little-endian length n, n bytes of JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). The writer is our own so that the bytes, and with them an
artifact's id, do not depend on the library's version; the reader hands the file to the library once the header is
known to be sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import safetensors
import safetensors.torch
from torch import Tensor

from esper.artifacts.document import Json, JsonReader, canonical_json, parse_json
from esper.artifacts.errors import ArtifactCorruptError
from esper.artifacts.graph import DTYPES, TensorSpec
from esper.artifacts.limits import Limits
from esper.artifacts.weights import byte_length, encode_bytes

__all__ = ["Header", "read_header", "read_tensors", "write"]

_CODES: Mapping[str, str] = MappingProxyType({"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"})
_DTYPES: Mapping[str, str] = MappingProxyType({code: dtype for dtype, code in _CODES.items()})
_ALIGNMENT = 8
_MAX_OFFSET = 2**62


@dataclass(frozen=True, slots=True)
class Header:
    """What a container declares: its tensors by name, and its metadata."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The container of `tensors` and `metadata`: header keys and data sorted by name, header padded to 8 bytes."""
    header: dict[str, Json] = {"__metadata__": dict(metadata)}
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = next(name for name, value in DTYPES.items() if value == tensor.dtype)
        chunks.append(encode_bytes(tensor))
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": (offset, offset + len(chunks[-1])),
        }
        offset += len(chunks[-1])
    encoded = canonical_json(header).encode("ascii")
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *chunks])


def read_header(data: bytes, limits: Limits) -> Header:
    """The header of `data`, with every offset accounted for; allocates nothing of a declared size.

    Raises :class:`ArtifactCorruptError` or ``ArtifactLimitError``.
    """
    if len(data) < 8:
        raise ArtifactCorruptError(f"the artifact has {len(data)} bytes, fewer than its 8-byte prefix; fetch it again")
    length = int.from_bytes(data[:8], "little")
    limits.check_count("the artifact's header length", length, "max_header_bytes")
    if 8 + length > len(data):
        raise ArtifactCorruptError(
            f"the artifact's header has {length} bytes, but only {len(data) - 8} follow; fetch it again"
        )
    fields = parse_json(data[8 : 8 + length], "the artifact's header", ArtifactCorruptError)
    reader = JsonReader(fields, "header", ArtifactCorruptError)
    metadata = {}
    if "__metadata__" in reader:
        entries = reader.object("__metadata__")
        metadata = {key: entries.text(key, max_length=limits.max_header_bytes) for key in entries.keys}
    names = [key for key in reader.keys if key != "__metadata__"]
    limits.check_count("the number of tensors", len(names), "max_tensors")
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name in names:
        specs[name], span = _read_entry(reader, name, limits)
        spans.append((*span, name))
    limits.check_shapes({name: spec.shape for name, spec in specs.items()})
    _check_spans(spans, specs, len(data) - 8 - length)
    return Header(MappingProxyType(specs), MappingProxyType(metadata))


def _read_entry(header: JsonReader, name: str, limits: Limits) -> tuple[TensorSpec, tuple[int, int]]:
    entry = header.object(name)
    code = entry.choice("dtype", _DTYPES)
    shape = entry.integers("shape", 1, _MAX_OFFSET, 64)
    limits.check_count(f"the rank of tensor {name[:80]!r}", len(shape), "max_rank")
    offsets = entry.integers("data_offsets", 0, _MAX_OFFSET, 2)
    entry.finish()
    if len(offsets) != 2:
        raise ArtifactCorruptError(f"header.{name[:80]}.data_offsets must be two integers; fetch the artifact again")
    return TensorSpec(name, shape, _DTYPES[code]), (offsets[0], offsets[1])


def _check_spans(spans: list[tuple[int, int, str]], specs: Mapping[str, TensorSpec], available: int) -> None:
    """Tensors follow each other without gap or overlap, have the size of their shape, and end where the file ends."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise ArtifactCorruptError(f"tensor {name[:80]!r} at offset {begin} {what}, which ends at {position}")
        needed = byte_length(specs[name])
        if end - begin != needed:
            raise ArtifactCorruptError(
                f"tensor {name[:80]!r} has {end - begin} bytes, its shape {specs[name].shape} needs {needed}"
            )
        position = end
    if position != available:
        raise ArtifactCorruptError(
            f"the artifact's tensors end at byte {position} of its data, which has {available} bytes; fetch it again"
        )


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a container that passed :func:`read_header`."""
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as cause:
        raise ArtifactCorruptError(f"the artifact is not a safetensors container: {cause}") from cause
