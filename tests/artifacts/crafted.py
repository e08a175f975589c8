"""Containers made by hand, so that they can be wrong in one place."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import torch

from esper.artifacts import Blueprint, build_artifact

BLUEPRINT = Blueprint.bottleneck(8, 6, 3, start="kaiming")
ARTIFACT = build_artifact(BLUEPRINT, toolchain={"test": "1"})


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a container."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A container of any header, which may be text already."""
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + body


def with_manifest(change: Any, data: bytes = ARTIFACT.data) -> bytes:
    """`data` with its manifest changed by the function `change`, or replaced by the text `change`."""
    header, body = split(data)
    if callable(change):
        manifest = json.loads(header["__metadata__"]["esper"])
        result = change(manifest)
        text = json.dumps(result if isinstance(result, list) else manifest)
    else:
        text = change
    header["__metadata__"]["esper"] = text
    return join(header, body)


def with_header(change: Any, body: bytes | None = None) -> bytes:
    """The artifact with its header changed by the function `change`."""
    header, rest = split(ARTIFACT.data)
    change(header)
    return join(header, rest if body is None else body)


def with_weights(values: dict[str, torch.Tensor]) -> bytes:
    """The artifact with some weights of the same shape replaced."""
    header, body = split(ARTIFACT.data)
    changed = bytearray(body)
    for name, tensor in values.items():
        begin, end = header[name]["data_offsets"]
        changed[begin:end] = tensor.contiguous().numpy().tobytes()
    return join(header, bytes(changed))


GRAPH_BLUEPRINT = {
    "family": "graph",
    "graph": {
        "in_features": 4,
        "out_features": 2,
        "dtype": "float32",
        "tensors": [{"name": "w", "shape": [2, 4]}, {"name": "b", "shape": [2]}],
        "nodes": [{"name": "y", "op": "linear", "inputs": ["x", "w", "b"]}],
        "output": "y",
    },
    "tensors": {
        "w": {"init": "kaiming"},
        "b": {"base64": base64.b64encode(torch.tensor([1.0, -2.0]).numpy().tobytes()).decode()},
    },
    "seed": 4,
}


def node(index: int, **changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["graph"]["nodes"][index].update(changes)


def graph(**changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["graph"].update(changes)


def top(**changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest.update(changes)
