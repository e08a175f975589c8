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
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import platformdirs

from esper.regular_files import read_regular

__all__ = ["DiskCache"]

_log = logging.getLogger(__name__)

_MIB = 2**20
_MOST_BYTES = 2**30  # of an artifact or an attachment, which may have half of that
_FILL = 0.9  # of the bound, which is left after an eviction
_LOOKS = 50  # for each bound's worth that is written: other processes write too, and looking at every file takes time
_ABANDONED_SECONDS = 3600.0  # after which an unfinished file is nobody's
_OURS = re.compile(r"[0-9a-f]{64}|(?P<unfinished>\.[0-9a-f]{16}\.[0-9a-f]{16})")


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
        self._seen = self._max_bytes  # at the last look; until the first, there may be that much
        self._written = 0  # since
        self._complaints: set[str] = set()

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
        elif self._write(self._blob(digest), data):
            self._make_room(len(data), keep=self._blob(digest))
        return digest

    def note(self, key: str, fact: dict[str, str | None]) -> None:
        """Keep a fact under `key`, in place of what was there."""
        path, text = self._fact(key), json.dumps(fact)
        is_new = not os.path.exists(path)
        data = f"{_digest(text)}\n{text}".encode()
        if self._write(path, data) and is_new:
            self._make_room(len(data), keep=path)

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
        return sum(each.size for each in self._files())

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
        with suppress(OSError):  # it was evicted meanwhile, or the folder may only be read
            os.utime(path)
        return data

    def _write(self, path: Path, data: bytes) -> bool:
        unfinished = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "xb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except OSError as error:
            self._complain(error.strerror or str(error))
            with suppress(OSError):
                unfinished.unlink()
            return False
        return True

    def _remove_damaged(self, path: Path) -> None:
        _log.warning("%s is damaged and removed; it will be fetched again", path)
        with suppress(OSError):
            path.unlink()

    def _complain(self, what: str) -> None:
        if what not in self._complaints:
            _log.warning("kernels are not kept in %s: %s", self.folder, what)
        self._complaints.add(what)

    def _make_room(self, size: int, keep: Path) -> None:
        self._written += size
        if self._seen + self._written > self._max_bytes or self._written * _LOOKS > self._max_bytes:
            self._written = 0
            self._seen = self._evict(keep)

    def _evict(self, keep: Path) -> int:
        """Remove what is too much; bytes of what is left."""
        files = sorted(self._files(), key=lambda each: each.used_at)
        left = sum(each.size for each in files)
        most = self._max_bytes if left <= self._max_bytes else int(_FILL * self._max_bytes)  # room for more than one
        abandoned_before = time.time() - _ABANDONED_SECONDS
        for each in files:
            if each.used_at < abandoned_before if each.unfinished else left > most and each.path != keep:
                try:
                    each.path.unlink(missing_ok=True)  # another process may have been faster
                except OSError as error:
                    self._complain(error.strerror or str(error))
                else:
                    left -= each.size
        return left

    def _files(self) -> Iterator[_File]:
        for part in ("blobs", "facts"):
            for folder, _, names in os.walk(self.folder / part):
                for name in names:
                    ours = _OURS.fullmatch(name)
                    if ours is not None:
                        with suppress(OSError):
                            yield _File(Path(folder) / name, ours["unfinished"] is not None)


class _File:
    __slots__ = ("path", "size", "unfinished", "used_at")

    def __init__(self, path: Path, unfinished: bool) -> None:
        status = path.stat()
        self.path, self.unfinished, self.size, self.used_at = path, unfinished, status.st_size, status.st_mtime


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
