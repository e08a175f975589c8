"""Downloaded kernels on the local disk, shared by all processes of a user.

What is here need not be trusted: bytes are hashed when they are read, and signatures are checked by whoever loads them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import platformdirs

from esper.file_store import BoundedFolder, write_whole
from esper.logs import SayOnce
from esper.regular_files import read_regular

__all__ = ["DiskCache"]

_log = logging.getLogger(__name__)

_MIB = 2**20
_MOST_BYTES = 2**30  # of an artifact or an attachment, which may have half of that
_OURS = re.compile(r"[0-9a-f]{64}")


class DiskCache:
    """Bytes by their SHA-256, and small facts by a key, in `folder`. For any thread and any number of processes.

    Files are written under another name and renamed, so they are whole or not there. A damaged one is removed when it
    is read. What was used longest ago goes first when there are more than `max_mb` MiB; files that are not the cache's
    are left alone. Nothing raises: what cannot be kept is logged and not kept.
    """

    def __init__(self, folder: Path | None = None, max_mb: float = 2048) -> None:
        """`folder` defaults to the user's cache folder; it is made when there is something to keep."""
        self.folder = (
            Path(platformdirs.user_cache_dir("esper", appauthor=False)) / "kernels" if folder is None else folder
        )
        self._max_bytes = int(max_mb * _MIB)
        self._say_once = SayOnce(_log)
        parts = [self.folder / part for part in ("blobs", "facts")]
        self._files = BoundedFolder(parts, self._max_bytes, _OURS, self._complain)

    def __contains__(self, digest: str) -> bool:
        """Whether there is a file for this SHA-256; only :meth:`get` looks whether it is whole."""
        return os.path.isfile(self._blob(digest))

    def get(self, digest: str) -> bytes | None:
        """The bytes with this SHA-256, if they are here."""
        data = self._read(self._blob(digest), min(self._max_bytes, _MOST_BYTES))
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            self._remove_damaged(self._blob(digest))
            return None
        return data

    def put(self, data: bytes, digest: str | None = None) -> str:
        """Keep `data`; its digest, which may be given by whoever has it already."""
        digest = digest or hashlib.sha256(data).hexdigest()
        if len(data) > self._max_bytes:
            self._complain(f"{len(data)} bytes are more than all of the cache may hold; raise urza.client.cache_mb")
        else:
            self._write(self._blob(digest), data)
        return digest

    def note(self, key: str, fact: dict[str, str | None]) -> None:
        """Keep a fact under `key`, in place of what was there."""
        text = json.dumps(fact)
        self._write(self._fact(key), f"{_digest(text)}\n{text}".encode())

    def fact(self, key: str) -> dict[str, str | None] | None:
        """What is known under `key`."""
        data = self._read(self._fact(key), _MIB)
        if data is None:
            return None
        digest, _, text = data.decode(errors="replace").partition("\n")
        if digest != _digest(text):
            self._remove_damaged(self._fact(key))
            return None
        fact: dict[str, str | None] = json.loads(text)
        return fact

    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.size for each in self._files.files())

    def _blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest[:2] / digest

    def _fact(self, key: str) -> Path:
        return self.folder / "facts" / _digest(key)

    def _read(self, path: Path, most_bytes: int) -> bytes | None:
        try:
            data = read_regular(path, most_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EFBIG:  # nothing of ours
                self._remove_damaged(path)
                return None
            self._complain(str(error))
            return None
        self._files.used(path)
        return data

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        except OSError as error:
            self._complain(error)
        else:
            self._files.written(path, len(data))

    def _remove_damaged(self, path: Path) -> None:
        _log.warning("%s is damaged and removed; it will be fetched again", path)
        with suppress(OSError):
            path.unlink()

    def _complain(self, what: OSError | str) -> None:
        said = what if isinstance(what, str) else what.strerror or str(what)
        self._say_once(logging.WARNING, f"kernels are not kept in {self.folder}: {said}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
