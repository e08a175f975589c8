"""The file that holds one compiled variant.

A header of fixed size, then the factors of the variant's key as JSON (for people who look for the reason of a miss),
then the payload. The header has magic bytes, the version of this format, the key, the SHA-256 of everything that
follows, and two lengths. Nothing is believed: whatever is not exactly as it was written is a :class:`VariantFileError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from esper.compiler.variant_key import VariantKey
from esper.errors import EsperError
from esper.regular_files import open_regular

__all__ = ["MOST_BYTES", "VariantFileError", "read_factors", "read_variant", "variant_parts"]

MOST_BYTES = 2**30
"""Of a file: much more than any variant takes."""
_MAGIC = b"ESPERVAR"
_VERSION = 1
_HEADER = struct.Struct(">8sI32s32sQQ")  # magic, version, key, digest, length of the factors, length of the payload
_LONGEST_FACTORS = 1 << 20


class VariantFileError(EsperError):
    """A file that is not the variant it should be.

    `reason` is one of a few fixed texts. `is_damaged` says that it was one, or claims to be one and is not: it is of no
    use to anybody.
    """

    def __init__(self, reason: str, *, is_damaged: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_damaged = is_damaged


def variant_parts(key: VariantKey, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """What the file that holds `payload` consists of, in this order."""
    factors = json.dumps(dict(key.factors), sort_keys=True).encode()
    digest = hashlib.sha256(factors)
    digest.update(payload)
    header = _HEADER.pack(_MAGIC, _VERSION, bytes.fromhex(key.digest), digest.digest(), len(factors), len(payload))
    return header, factors, payload


def read_variant(path: Path, key: VariantKey) -> bytes:
    """The payload stored at `path` for `key`. Raises :class:`VariantFileError`, or `OSError` if it cannot be read."""
    with _opened(path) as file:
        digest, factors_length, payload_length = _read_header(file, key)
        content = hashlib.sha256(_exactly(file, factors_length))
        payload = _exactly(file, payload_length)
    content.update(payload)
    if content.digest() != digest:
        raise VariantFileError("its content is not what its checksum says", is_damaged=True)
    return payload


def read_factors(path: Path) -> Mapping[str, str]:
    """What went into the key of the variant stored at `path`, unverified. Raises as :func:`read_variant`."""
    with _opened(path) as file:
        _, factors_length, _ = _read_header(file, None)
        try:
            factors = json.loads(_exactly(file, factors_length))
        except ValueError as error:
            raise VariantFileError("its content is not what its checksum says", is_damaged=True) from error
    if not isinstance(factors, dict) or not all(isinstance(value, str) for value in factors.values()):
        raise VariantFileError("its content is not what its checksum says", is_damaged=True)
    return factors


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path, MOST_BYTES)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise VariantFileError("it is not a file", is_damaged=False) from error
        if error.errno == errno.EFBIG:
            raise VariantFileError("it is too large", is_damaged=True) from error
        raise


def _read_header(file: BinaryIO, key: VariantKey | None) -> tuple[bytes, int, int]:
    """Digest, length of the factors, length of the payload: as long as the file is."""
    size = os.fstat(file.fileno()).st_size
    if size < _HEADER.size:
        raise VariantFileError("it is truncated", is_damaged=True)
    magic, version, written_key, digest, factors, payload = _HEADER.unpack(_exactly(file, _HEADER.size))
    if magic != _MAGIC:
        raise VariantFileError("it is not a file of Esper's", is_damaged=True)
    if version != _VERSION:  # another version of Esper uses the same folder, and may need it
        raise VariantFileError(f"its format has version {version}, not {_VERSION}", is_damaged=False)
    if key is not None and written_key != bytes.fromhex(key.digest):
        raise VariantFileError("it was written for another key", is_damaged=True)
    wanted = _HEADER.size + factors + payload
    if size != wanted or factors > _LONGEST_FACTORS:
        raise VariantFileError("it is truncated" if size < wanted else "it is too long", is_damaged=True)
    return digest, factors, payload


def _exactly(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise VariantFileError("it is truncated", is_damaged=True)
    return content
