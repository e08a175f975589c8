"""Weights as bytes: little-endian, row-major, and base64 of that in JSON."""

from __future__ import annotations

import base64
import binascii
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from esper.artifacts.errors import ArtifactError, ArtifactGraphError
from esper.artifacts.graph import DTYPES, TensorSpec

__all__ = [
    "byte_length",
    "check_finite",
    "decode_base64",
    "encode_base64",
    "encode_bytes",
    "ordinary_tensors",
]

_ITEM_SIZES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made here can be trained, though the caller be in inference mode. Touches this thread only.

    The caller's default device is kept out by naming the device in each call: torch's own switch for it is a global
    that compiled code guards on, so flipping it here would make another thread recompile.
    """
    with torch.inference_mode(False):
        yield


def byte_length(spec: TensorSpec) -> int:
    """The number of bytes of a tensor of `spec`."""
    return spec.elements * _ITEM_SIZES[spec.dtype]


def encode_bytes(tensor: Tensor) -> bytes:
    """The tensor's elements, little-endian, row-major."""
    _require_little_endian()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _decode_bytes(data: bytes | bytearray | memoryview, spec: TensorSpec) -> Tensor:
    """The tensor of `spec` from exactly :func:`byte_length` bytes, in memory of its own."""
    _require_little_endian()
    return torch.frombuffer(bytearray(data), dtype=DTYPES[spec.dtype]).reshape(spec.shape)


def encode_base64(tensor: Tensor) -> str:
    """Base64 of :func:`encode_bytes`."""
    return base64.b64encode(encode_bytes(tensor)).decode("ascii")


def decode_base64(text: str, spec: TensorSpec, path: str, error: type[ArtifactError]) -> Tensor:
    """Reads :func:`encode_base64`; the length is checked before anything is decoded. Raises `error` at `path`."""
    length = byte_length(spec)
    characters = 4 * -(-length // 3)
    if len(text) != characters:
        raise error(
            f"{path} holds {len(text)} characters of base64; {spec.dtype} of shape {spec.shape} has {characters}"
        )
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise error(f"{path} is not base64: {cause}") from cause
    if len(data) != length or base64.b64encode(data).decode("ascii") != text:
        raise error(
            f"{path} is not canonical base64 of {length} bytes; encode it with the standard alphabet and padding"
        )
    return _decode_bytes(data, spec)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`ArtifactGraphError` naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor.detach())
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ArtifactGraphError(f"tensor {name!r} holds NaN or infinity; a kernel starts from finite weights")


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise ArtifactError("artifacts are little-endian and this machine is not; run on a little-endian machine")
