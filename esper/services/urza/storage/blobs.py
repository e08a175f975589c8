"""Bytes under the SHA-256 of their content, in a folder or in any file system that fsspec knows.

A blob is there whole or not at all: it is written under a temporary name, flushed to the disk and renamed. What is read
is hashed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # fsspec ships no types
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # as above

from esper.file_store import UNFINISHED, write_whole
from esper.regular_files import read_regular
from esper.services.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)

__all__ = ["MOST_BYTES", "BlobStore", "StoredBlob"]

MOST_BYTES = 2**30
"""Of a blob whose size nobody knows: more than any artifact, attachment or blueprint may have."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A file of a blob store."""

    path: str
    digest: str | None
    """None for one that was not finished."""
    size_bytes: int
    age_seconds: float
    """Since it was written."""


class BlobStore:
    """Content-addressed bytes at an fsspec URL, or in a folder. Safe for threads and processes."""

    def __init__(self, url: str | Path) -> None:
        try:
            filesystem, root = (LocalFileSystem(), url) if isinstance(url, Path) else _filesystem_of(url)
        except (ValueError, ImportError) as cause:
            raise StoreError(f"the blob store's URL {url!r} cannot be used: {cause}") from cause
        self._filesystem: Any = filesystem
        self.root = str(root).rstrip("/")
        """The folder, or the bucket and what its names begin with."""
        self._is_local = isinstance(filesystem, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Store `data` and return its digest. Raises :class:`StoreFullError` or ``StoreReadOnlyError``."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            with self._errors("written"):
                if self._holds(path, digest, len(data)):
                    return digest
                if self._is_local:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    write_whole(Path(path), data, durable=True)
                else:  # object stores show an object when it is complete
                    self._filesystem.pipe_file(path, data)
        except FileNotFoundError as cause:  # no such bucket, for example
            raise StoreReadOnlyError(
                f"the store at {self.root} does not exist ({cause}); make it, or choose another"
            ) from cause
        return digest

    def get(self, digest: str, size: int | None = None) -> bytes:
        """The bytes, of which there must be `size` if that is known.

        Raises :class:`StoreCorruptError` if they are missing or not those that were stored. What is there and is no
        file, or of another size, is not read.
        """
        path = self._path(digest)
        try:
            with self._errors("read"):
                data = self._read(path, MOST_BYTES if size is None else size)
        except FileNotFoundError as cause:
            raise StoreCorruptError(f"blob {digest} is missing from {self.root}; restore it from a copy") from cause
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise StoreCorruptError(
                f"blob {digest} in {self.root} has other content than was stored; restore it from a copy"
            )
        return data

    def exists(self, digest: str) -> bool:
        """Whether there is a blob of this digest. Its content is not looked at."""
        with self._errors("read"):
            return bool(self._filesystem.exists(self._path(digest)))

    def remove(self, digest: str) -> None:
        """Remove a blob; none is none. Whether something refers to it is for the caller to know."""
        self._remove(self._path(digest))

    def stored(self) -> Iterator[StoredBlob]:
        """Every blob with its size and age, and the unfinished files that writers who were killed left behind."""
        try:
            with self._errors("read"):
                found = self._filesystem.find(self.root, detail=True)
        except FileNotFoundError:
            return
        for path, details in found.items():
            folder, name = path.rsplit("/", 2)[-2:]
            digest = folder + name if _DIGEST.fullmatch(folder + name) else None
            if digest is None and not UNFINISHED.fullmatch(name):
                continue
            try:
                with self._errors("read"):
                    age = max(0.0, time.time() - self._filesystem.modified(path).timestamp())
            except FileNotFoundError:  # its writer has finished it, or removed it, since it was listed
                continue
            yield StoredBlob(path, digest, int(details["size"]), age)

    def remove_unfinished(self, blob: StoredBlob) -> None:
        """Remove what :meth:`stored` listed without a digest."""
        self._remove(blob.path)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors("written"):
            self._filesystem.rm_file(path)

    def _path(self, digest: str) -> str:
        if _DIGEST.fullmatch(digest) is None:
            raise StoreCorruptError(f"{digest[:80]!r} is not a SHA-256 in hex")
        return f"{self.root}/{digest[:2]}/{digest[2:]}"

    def _read(self, path: str, most: int) -> bytes | None:
        """What is at `path`; None if that is no file, or one of more than `most` bytes."""
        if not self._is_local:
            if self._filesystem.size(path) > most:
                return None
            content: bytes = self._filesystem.cat_file(path)
            return content
        try:
            return read_regular(path, most)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EFBIG):
                return None
            raise

    def _holds(self, path: str, digest: str, size: int) -> bool:
        try:
            data = self._read(path, size)
        except FileNotFoundError:
            return False
        return data is not None and hashlib.sha256(data).hexdigest() == digest

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Raises errors of the store in place of the file system's, except for ``FileNotFoundError``."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except OSError as cause:
            raise self._translated(cause, done) from cause
        except Exception as cause:
            if self._is_local:
                raise
            # object stores are reached through libraries with exceptions of their own
            raise StoreBusyError(
                f"the store at {self.root} cannot be {done} ({type(cause).__name__}: {cause}); see that it can be "
                "reached, and try again"
            ) from cause

    def _translated(self, error: OSError, done: str) -> StoreError:
        if error.errno in _FULL:
            return StoreFullError(f"the store at {self.root} has no room left ({error.strerror}); free some space")
        if done == "written" and error.errno in _READ_ONLY:
            return StoreReadOnlyError(
                f"the store at {self.root} cannot be written ({error.strerror}); make it writable or choose another"
            )
        return StoreError(f"the store at {self.root} cannot be {done}: {error}")


def _filesystem_of(url: str) -> tuple[Any, str]:
    """Listings are not cached: other processes write to the same store."""
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return filesystem, root
