"""Downloaded kernels on the local disk, shared by all processes of a user.

What is here need not be trusted: bytes are hashed when they are read, and signatures are checked by whoever loads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import platformdirs

__all__ = ["DiskCache"]

_log = logging.getLogger(__name__)

_MIB = 2**20
_FILL = 0.9  # of the bound, which is left after an eviction
_ABANDONED_SECONDS = 3600.0  # after which an unfinished file is nobody's


class DiskCache:
    """Bytes by their SHA-256, and small facts by a key, in `folder`. For any thread and any number of processes.

    Files are written under another name and renamed, so they are whole or not there. A damaged one is removed when it
    is read. What was used longest ago goes first when the folder holds more than `max_mb` MiB. Nothing raises: what
    cannot be kept is logged and not kept.
    """

    def __init__(self, folder: Path | None = None, max_mb: float = 2048) -> None:
        """`folder` defaults to the user's cache folder; it is made when there is something to keep."""
        self.folder = (
            Path(platformdirs.user_cache_dir("esper", appauthor=False)) / "kernels" if folder is None else folder
        )
        self._max_bytes = int(max_mb * _MIB)
        self._complained = False

    def get(self, digest: str) -> bytes | None:
        """The bytes with this SHA-256, if they are here."""
        path = self._blob(digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            _log.warning("%s is damaged and removed; it will be fetched again", path)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, data: bytes) -> str:
        """Keep `data`; its digest."""
        digest = hashlib.sha256(data).hexdigest()
        if len(data) <= self._max_bytes and self._write(self._blob(digest), data):
            self._evict(keep=self._blob(digest))
        return digest

    def note(self, key: str, fact: dict[str, str | None]) -> None:
        """Keep a fact under `key`, in place of what was there."""
        self._write(self._fact(key), json.dumps(fact).encode())

    def fact(self, key: str) -> dict[str, str | None] | None:
        """What is known under `key`."""
        path = self._fact(key)
        try:
            fact = json.loads(path.read_bytes())
        except OSError:
            return None
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return fact if isinstance(fact, dict) else None

    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.stat.st_size for each in self._files())

    def _blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest[:2] / digest

    def _fact(self, key: str) -> Path:
        return self.folder / "facts" / hashlib.sha256(key.encode()).hexdigest()

    def _write(self, path: Path, data: bytes) -> bool:
        unfinished = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "xb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except OSError as error:
            if not self._complained:
                _log.warning("kernels are not kept on disk: %s", error)
            self._complained = True
            with suppress(OSError):
                unfinished.unlink()
            return False
        return True

    def _evict(self, keep: Path) -> None:
        files = sorted(self._files(), key=lambda each: each.stat.st_mtime)
        surplus = sum(each.stat.st_size for each in files) - self._max_bytes
        if surplus > 0:  # make some room, so that not every file that comes makes another one go
            surplus += int((1.0 - _FILL) * self._max_bytes)
        abandoned_before = time.time() - _ABANDONED_SECONDS
        for each in files:
            unfinished = each.path.name.startswith(".")
            if each.stat.st_mtime < abandoned_before if unfinished else surplus > 0 and each.path != keep:
                with suppress(OSError):  # another process was faster
                    each.path.unlink()
                surplus -= each.stat.st_size

    def _files(self) -> Iterator[_File]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder) / name
                with suppress(OSError):
                    yield _File(path, path.stat())


class _File:
    __slots__ = ("path", "stat")

    def __init__(self, path: Path, stat: os.stat_result) -> None:
        self.path, self.stat = path, stat
