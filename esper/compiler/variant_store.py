"""Compiled variants on disk, so that a second run of a program compiles nothing.

A variant is opaque here: machine code and marshalled Python, about 0.3 MB. Whoever can write to the folder can run code
here, and the checksums guard against damage, not against people: a folder that is not this user's own, all the way up
to the root, is not used (see `esper.ownership`). It lies in Inductor's own cache by default.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from esper import torch_internals
from esper.compiler.variant_file import (
    MOST_BYTES,
    VariantFileError,
    read_factors,
    read_variant,
    variant_parts,
)
from esper.compiler.variant_key import VariantKey
from esper.file_store import BoundedFolder, write_whole
from esper.forking import reset_after_fork
from esper.logs import SayOnce
from esper.ownership import UnsafePathError, check_own, make_own_folder

__all__ = ["DEFAULT_LIMIT_BYTES", "StoreStatistics", "VariantKey", "VariantStore", "default_store"]

DEFAULT_LIMIT_BYTES = 2 * 1024**3
"""2 GiB: several thousand variants."""

_LOG = logging.getLogger(__name__)
_WHAT = "the folder of compiled variants"
_SUFFIX = ".variant"
_OURS = re.compile(r"[0-9a-f]+\.variant")
_COMPARED_FILES = 64  # how many stored variants a miss is compared with when the log has to explain it

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EEXIST: "something that is no folder has this name: remove it",
    errno.ENOTDIR: "something that is no folder is in its path: remove it",
    errno.EISDIR: "a folder stands where a variant belongs: remove it",
}


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a store has done in this process. `unusable` are the misses that had a file, but not a good one."""

    hits: int = 0
    misses: int = 0
    unusable: int = 0
    writes: int = 0
    failed_writes: int = 0
    evicted: int = 0


class VariantStore:
    """Variants in `folder`, `limit_bytes` of them at most, the least recently used thrown out first.

    Any thread and any number of processes may use one folder at once. Nothing that goes wrong with it is an error: what
    cannot be read is a miss, what cannot be written is not kept, and the log says so, once for each reason. So it is
    where others could have put a variant: nothing is read there and nothing written. The folder is made by the first
    write. The lock is held for counting only, never while a file is read, written or digested.
    A damaged file is removed; should another process put a good one in its place at that moment, one more miss follows.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes is {limit_bytes}; a store needs room for at least one byte")
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._statistics = StoreStatistics()
        self._say_once = SayOnce(_LOG)
        self._files = BoundedFolder([self.folder], limit_bytes, _OURS, self._say_unwritable)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may have held; see `esper.forking`."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"VariantStore({str(self.folder)!r}, limit_bytes={self.limit_bytes})"

    @property
    def statistics(self) -> StoreStatistics:
        """What was done up to this moment."""
        with self._lock:
            return self._statistics

    def get(self, key: VariantKey) -> bytes | None:
        """The payload stored under `key`, or None. Reads a file: not for the thread that trains."""
        path = self._path(key)
        try:
            check_own(path, _WHAT)
            payload = read_variant(path, key)
        except FileNotFoundError:
            self._missed(key, "there is none", unusable=0)
            return None
        except UnsafePathError as error:
            self._say_unsafe(error)
            self._count(misses=1, unusable=1)
            return None
        except VariantFileError as error:
            self._unusable(path, error.reason, error.is_damaged)
            self._missed(key, error.reason, unusable=1)
            return None
        except OSError as error:
            self._unusable(path, f"it cannot be read ({error.strerror or error})", is_damaged=False)
            self._missed(key, "it cannot be read", unusable=1)
            return None
        self._files.used(path)
        self._count(hits=1)
        _explain(key, "found")
        return payload

    def put(self, key: VariantKey, payload: bytes) -> None:
        """Store `payload` under `key`, in the place of what was there. Never raises for what the disk does.

        Writes a file: not for the thread that trains.
        """
        parts = variant_parts(key, payload)
        size = sum(map(len, parts))
        most = min(self.limit_bytes, MOST_BYTES)
        if size > most:
            self._count(failed_writes=1)
            self._say_once(
                logging.WARNING,
                f"a compiled variant of {size} bytes is not kept: {self.folder} is limited to {most} bytes",
                reason="too large",
            )
            return
        try:
            make_own_folder(self.folder, _WHAT)
            # only this user may write to it, whatever the umask: else it would not be read again. What a power cut
            # leaves fails its checksum
            write_whole(self._path(key), *parts, mode=0o644)
        except UnsafePathError as error:
            self._count(failed_writes=1)
            self._say_unsafe(error)
            return
        except OSError as error:
            self._count(failed_writes=1)
            self._say_unwritable(error)
            return
        self._count(writes=1)
        _LOG.debug("variant %s: stored, %d bytes", key.short, size)
        evicted = self._files.written(self._path(key), size)
        if evicted:
            self._count(evicted=evicted)
            _LOG.debug("removed %d variants from %s", evicted, self.folder)

    # -- files -----------------------------------------------------------------------------------------------------

    def _path(self, key: VariantKey) -> Path:
        return self.folder / f"{key.digest}{_SUFFIX}"

    # -- what is said ----------------------------------------------------------------------------------------------

    def _count(self, **more: int) -> None:
        with self._lock:
            counted = self._statistics
            self._statistics = replace(counted, **{name: getattr(counted, name) + more[name] for name in more})

    def _missed(self, key: VariantKey, reason: str, *, unusable: int) -> None:
        self._count(misses=1, unusable=unusable)
        _explain(key, f"missed, {reason}")
        if _LOG.isEnabledFor(logging.DEBUG):
            self._compare(key)

    def _compare(self, key: VariantKey) -> None:
        """Log in which factors the most similar of the variants used last differs."""
        files = sorted(self._files.files(), key=lambda each: each.used_at, reverse=True)
        closest: tuple[list[str], Path] | None = None
        for path in [each.path for each in files[:_COMPARED_FILES]]:
            try:
                there = read_factors(path)
            except (OSError, VariantFileError):
                continue  # nothing to compare with; reading it for its own key will say what is wrong
            names = sorted({*key.factors, *there})
            differing = [
                f"{name} ({there.get(name, 'absent')} there)"
                for name in names
                if there.get(name) != key.factors.get(name)
            ]
            if closest is None or len(differing) < len(closest[0]):
                closest = differing, path
        if closest is not None and closest[0]:
            _LOG.debug("variant %s: %s differs in %s", key.short, closest[1].name[:12], ", ".join(closest[0]))

    def _unusable(self, path: Path, reason: str, is_damaged: bool) -> None:
        removed = is_damaged and _remove(path)
        outcome = "and was removed" if removed else "and is left alone"
        self._say_once(
            logging.WARNING if is_damaged else logging.INFO,
            f"the stored variant {path} is not used {outcome}: {reason}",
            reason=reason,
        )

    def _say_unsafe(self, error: UnsafePathError) -> None:
        self._say_once(
            logging.WARNING,
            f"compiled variants are neither read nor kept, so the next run compiles them again: {error}; or name a "
            "folder of your own in TORCHINDUCTOR_CACHE_DIR",
            reason="unsafe",
        )

    def _say_unwritable(self, error: OSError) -> None:
        remedy = _REMEDIES.get(error.errno or 0, "see to it")
        self._say_once(
            logging.WARNING,
            f"compiled variants cannot be kept in {self.folder} ({error.strerror or error}), so the next run compiles "
            f"them again: {remedy}, or name another folder in TORCHINDUCTOR_CACHE_DIR",
            reason=f"write {error.errno}",
        )


def default_store() -> VariantStore | None:
    """The store in Inductor's cache folder, one for each folder; None where torch's compile caches are disabled.

    None too, with one warning, where that folder cannot be made.
    """
    try:
        cache = torch_internals.compiler_cache_dir()
    except OSError as error:
        _say_once(
            logging.WARNING,
            f"compiled variants are not kept: Inductor's cache folder cannot be made ({error}); name another in "
            "TORCHINDUCTOR_CACHE_DIR",
        )
        return None
    if cache is None:
        return None
    return _stores.get(cache) or _stores.setdefault(cache, VariantStore(Path(cache) / "esper"))


_stores: dict[str, VariantStore] = {}
_say_once = SayOnce(_LOG)


def _remove(path: str | Path) -> bool:
    """Remove a file; False if it is gone already or may not be removed."""
    try:
        os.unlink(path)
    except OSError as error:
        _LOG.debug("%s cannot be removed: %s", path, error)
        return False
    return True


def _explain(key: VariantKey, outcome: str) -> None:
    """Log what became of a look-up and everything that went into its key, one record each, so that logs compare."""
    if not _LOG.isEnabledFor(logging.DEBUG):
        return
    _LOG.debug("variant %s: %s", key.short, outcome)
    for name, value in key.factors.items():
        _LOG.debug("variant %s: made of %s = %s", key.short, name, value)
