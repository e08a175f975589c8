"""Files that are written whole or not at all, and folders of them that are bounded."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["UNFINISHED", "BoundedFolder", "StoredFile", "write_whole"]

UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.[0-9a-f]{16}")
"""Files named by a digest that :func:`write_whole` has begun. A writer that is killed leaves one behind."""

_FILL = 0.9  # of the bound, which is left after an eviction
_LOOKS = 50  # for each bound's worth that is written: other processes write too, and looking at every file takes time
_ABANDONED_SECONDS = 3600.0  # after which an unfinished file is nobody's


def write_whole(path: Path, *parts: bytes, mode: int = 0o666, durable: bool = False, replace: bool = True) -> None:
    """Write a file of `parts`: a reader finds what was there before, or all of it. Nothing is left of what fails.

    `mode` is what the umask takes from. `durable` has it survive a power cut. Without `replace` a file that is there
    stays. Raises `OSError`.
    """
    unfinished = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
    try:
        with open(unfinished, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            for part in parts:
                file.write(part)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(unfinished, path)
        else:
            with suppress(FileExistsError):
                os.link(unfinished, path)
    finally:
        with suppress(OSError):  # it has its name by now, or never came into being
            unfinished.unlink()
    if durable and os.name == "posix":  # elsewhere folders cannot be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a :class:`BoundedFolder`."""

    path: Path
    size: int
    used_at: float
    """Seconds since the epoch."""


class BoundedFolder:
    """Files of `folders` whose names `ours` matches, `most_bytes` of them at most: the least recently used go first.

    For any thread and any number of processes; all that is not ours is left alone, but for unfinished files that nobody
    writes any more. `complain` is told of what cannot be removed.
    """

    def __init__(
        self, folders: Sequence[Path], most_bytes: int, ours: re.Pattern[str], complain: Callable[[OSError], None]
    ) -> None:
        self._folders, self._most_bytes, self._ours, self._complain = folders, most_bytes, ours, complain
        self._seen = most_bytes  # at the last look; until the first, there may be that much
        self._written = 0  # since

    def used(self, path: Path) -> None:
        """A file was read: it goes last."""
        with suppress(OSError):  # it was evicted meanwhile, or may only be read: its owner's order counts
            os.utime(path)

    def written(self, path: Path, size: int) -> int:
        """A file of `size` bytes was written: make room for it. How many files were removed; `path` is not among them.

        Other processes' files are looked at after each fiftieth of the bound that this one wrote.
        """
        self._written += size
        if self._seen + self._written <= self._most_bytes and self._written * _LOOKS <= self._most_bytes:
            return 0
        self._written = 0
        files = sorted(self.files(), key=lambda each: each.used_at)
        left = sum(each.size for each in files)
        most = self._most_bytes if left <= self._most_bytes else int(_FILL * self._most_bytes)  # for more than one
        removed = 0
        for each in files:
            if left > most and each.path != path and self._remove(each):
                left -= each.size
                removed += 1
        self._seen = left
        abandoned_before = time.time() - _ABANDONED_SECONDS
        for each in self._named(UNFINISHED):
            if each.used_at < abandoned_before:
                self._remove(each)
        return removed

    def files(self) -> Iterator[StoredFile]:
        """What is there of ours; other processes may remove it meanwhile."""
        return self._named(self._ours)

    def _named(self, names: re.Pattern[str]) -> Iterator[StoredFile]:
        for root in self._folders:
            for folder, _, found in os.walk(root):
                for name in filter(names.fullmatch, found):
                    path = Path(folder, name)
                    with suppress(OSError):
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            yield StoredFile(path, status.st_size, status.st_mtime)

    def _remove(self, file: StoredFile) -> bool:
        try:
            file.path.unlink(missing_ok=True)  # another process may have been faster
        except OSError as error:
            self._complain(error)
            return False
        return True
