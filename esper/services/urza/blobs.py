"""Bytes under the SHA-256 of their content, in a folder or in any file system that fsspec knows.

A blob is there whole or not at all: it is written under a temporary name, flushed to the disk and renamed. What is read
is hashed again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # fsspec ships no types
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # as above

from esper.services.errors import StoreCorruptError, StoreError, StoreFullError, StoreReadOnlyError

__all__ = ["BlobStore"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class BlobStore:
    """Content-addressed bytes at an fsspec URL, or in a folder. Safe for threads and processes."""

    def __init__(self, url: str | Path) -> None:
        try:
            filesystem, root = (LocalFileSystem(), url) if isinstance(url, Path) else fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as cause:
            raise StoreError(f"the blob store's URL {url!r} cannot be used: {cause}") from cause
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")
        self._is_local = isinstance(filesystem, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Store `data` and return its digest. Raises :class:`StoreFullError` or ``StoreReadOnlyError``."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            if self._holds(path, digest):
                return digest
            if self._is_local:
                _write_local(Path(path), data)
            else:  # object stores show an object when it is complete
                self._filesystem.pipe_file(path, data)
        except OSError as cause:
            raise self._translated(cause, "written") from cause
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes. Raises :class:`StoreCorruptError` if they are missing or not those that were stored."""
        try:
            data: bytes = self._filesystem.cat_file(self._path(digest))
        except FileNotFoundError as cause:
            raise StoreCorruptError(f"blob {digest} is missing from {self._root}; restore it from a copy") from cause
        except OSError as cause:
            raise self._translated(cause, "read") from cause
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreCorruptError(
                f"blob {digest} in {self._root} has other content than was stored; restore it from a copy"
            )
        return data

    def _path(self, digest: str) -> str:
        if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
            raise StoreCorruptError(f"{digest[:80]!r} is not a SHA-256 in hex")
        return f"{self._root}/{digest[:2]}/{digest[2:]}"

    def _holds(self, path: str, digest: str) -> bool:
        try:
            data: bytes = self._filesystem.cat_file(path)
        except FileNotFoundError:
            return False
        return hashlib.sha256(data).hexdigest() == digest

    def _translated(self, error: OSError, done: str) -> StoreError:
        if error.errno in _FULL:
            return StoreFullError(f"the store at {self._root} has no room left ({error.strerror}); free some space")
        if done == "written" and error.errno in _READ_ONLY:
            return StoreReadOnlyError(
                f"the store at {self._root} cannot be written ({error.strerror}); make it writable or choose another"
            )
        return StoreError(f"the store at {self._root} cannot be {done}: {error}")


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where folders can be flushed (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
