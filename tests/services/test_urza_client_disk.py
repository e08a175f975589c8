"""Bytes kept on the local disk: whole or not there, bounded, shared by processes, and no reason for a failure."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import queue
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from logging.handlers import QueueHandler
from pathlib import Path
from threading import Barrier

import pytest

from esper.services.urza_client import DiskCache
from tests.services.programs import forked, obey_permissions, race

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not" / "yet" / "made"


@pytest.fixture
def disk(folder: Path) -> DiskCache:
    return DiskCache(folder)


def content(seed: int, size: int = 1000) -> bytes:
    return random.Random(seed).randbytes(size)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_of(disk: DiskCache, digest: str) -> Path:
    (path,) = disk.folder.rglob(digest)
    return path


def age(disk: DiskCache, digest: str, seconds: float) -> None:
    """Have it used `seconds` earlier than it was."""
    then = time.time() - seconds
    os.utime(file_of(disk, digest), (then, then))


def test_what_is_put_is_found_again_also_by_others(disk: DiskCache, folder: Path) -> None:
    digest = disk.put(content(1))
    assert digest not in DiskCache(folder.parent)
    for each in (disk, DiskCache(folder)):
        assert digest in each
        assert each.get(digest) == content(1)
        assert each.get("0" * 64) is None
        assert "0" * 64 not in each
    assert disk.put(b"") in disk


def test_facts(disk: DiskCache, folder: Path) -> None:
    assert disk.fact("a key") is None
    disk.note("a key", {"id": "ü", "nothing": None})
    disk.note("../../another", {})
    assert DiskCache(folder).fact("a key") == {"id": "ü", "nothing": None}
    assert disk.fact("../../another") == {}
    disk.note("a key", {"id": "other"})
    assert disk.fact("a key") == {"id": "other"}


def test_nothing_is_made_before_there_is_something_to_keep(disk: DiskCache, folder: Path) -> None:
    assert disk.get("0" * 64) is None
    assert disk.fact("a key") is None
    assert disk.size() == 0
    assert not folder.exists()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    disk = DiskCache()
    assert disk.folder.name == "kernels"
    assert disk.folder.parent.name == "esper"
    assert disk.folder.is_relative_to(tmp_path)


@pytest.mark.parametrize("damage", [b"", content(1)[:-1], content(1)[:500] + b"!" + content(1)[501:], content(2)])
def test_damaged_bytes_are_removed(disk: DiskCache, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    digest = disk.put(content(1))
    file_of(disk, digest).write_bytes(damage)
    assert disk.get(digest) is None
    assert digest not in disk
    assert f"{digest} is damaged" in caplog.text
    disk.put(content(1))
    assert disk.get(digest) == content(1)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_facts_are_removed(disk: DiskCache, folder: Path, damage: bytes) -> None:
    disk.note("a key", {"id": "x"})
    (path,) = files(folder)
    for damaged in (damage, path.read_bytes().replace(b"x", b"y")):
        disk.note("a key", {"id": "x"})
        path.write_bytes(damaged)
        assert disk.fact("a key") is None
        assert files(folder) == []


def test_what_was_used_longest_ago_goes_first(folder: Path) -> None:
    disk = DiskCache(folder, max_mb=4500 / MIB)
    digests = [disk.put(content(i)) for i in range(4)]
    for i, digest in enumerate(digests):
        age(disk, digest, 100 - i)
    assert disk.get(digests[0]) == content(0)  # and so it is the one used last
    fifth = disk.put(content(4))
    assert [digest in disk for digest in [*digests, fifth]] == [True, False, True, True, True]
    assert disk.size() <= 4500


def test_what_was_just_put_stays_also_if_all_else_seems_younger(folder: Path) -> None:
    """The clock was set back, or the folder is on a server whose clock is ahead."""
    disk = DiskCache(folder, max_mb=4500 / MIB)
    for i in range(4):
        age(disk, disk.put(content(i)), -3600)
    assert disk.put(content(4)) in disk
    disk.note("a key", {"id": "x" * 600})
    assert disk.fact("a key") == {"id": "x" * 600}
    assert disk.size() <= 4500


def test_facts_are_bounded_too(folder: Path) -> None:
    disk = DiskCache(folder, max_mb=5000 / MIB)
    for i in range(200):
        disk.note(f"key {i}", {"id": "x" * 64})
    assert disk.size() <= 5000
    assert disk.fact("key 199") == {"id": "x" * 64}
    assert disk.fact("key 0") is None


def test_what_is_larger_than_the_bound_is_not_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = DiskCache(folder, max_mb=2500 / MIB)
    small, large = disk.put(content(1)), disk.put(content(2, 3000))
    assert (small in disk, large in disk) == (True, False)
    assert "urza.client.cache_mb" in caplog.text


def test_files_of_others_are_left_alone(folder: Path) -> None:
    disk = DiskCache(folder, max_mb=2500 / MIB)
    theirs = [
        folder / "thesis.tex",
        folder / "blobs" / "ab" / "photo.jpg",
        folder / "facts" / ".hidden",
        folder / ("0" * 64),
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    for i in range(5):
        disk.put(content(i))
    assert all(path.exists() for path in theirs)
    assert disk.put(content(4)) in disk
    assert disk.size() <= 2500


def test_unfinished_files_that_nobody_writes_are_removed(disk: DiskCache) -> None:
    digest = disk.put(content(1))
    old, fresh = (file_of(disk, digest).with_name(f".{digest[:16]}.{letter * 16}") for letter in "ab")
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    DiskCache(disk.folder).put(content(2))  # the first that a process writes makes it look
    assert not old.exists()
    assert fresh.exists(), "somebody may be writing it"
    assert digest in disk


def test_what_others_wrote_is_found_before_much_more_is_written(folder: Path) -> None:
    bound = 50_000
    ours, theirs = (DiskCache(folder, max_mb=bound / MIB) for _ in range(2))
    ours.put(content(0))
    for number in range(1, 60):
        theirs.put(content(number))
    full = ours.size()
    assert bound * 0.8 < full <= bound
    for number in range(60, 66):
        ours.put(content(number))
        assert ours.size() <= bound * 1.02 + 1000


def _die_half_way(write: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which kills; Python ignores it otherwise
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    write()


@needs_fork
def test_a_process_that_is_killed_while_it_writes_leaves_what_was_there(
    disk: DiskCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest, old = disk.put(content(1)), {"id": "x"}
    disk.note("a key", old)
    whole = files(folder)
    for write in (
        lambda: disk.put(content(2)),
        lambda: disk.put(content(1)),
        lambda: disk.note("a key", {"id": "y" * 1000}),
    ):
        killed = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(write,))
        killed.start()
        killed.join(30)
        assert killed.exitcode == -signal.SIGXFSZ
    halves = [path for path in files(folder) if path not in whole]
    assert [path.stat().st_size for path in halves] == [500] * 3, "all died half way"
    assert all(path.name.startswith(".") for path in halves)
    assert (disk.get(digest), disk.fact("a key")) == (content(1), old)
    assert hashlib.sha256(content(2)).hexdigest() not in disk
    assert "damaged" not in caplog.text


def _put_unprivileged(folder: Path) -> tuple[int, bool]:
    obey_permissions()
    return _put_twice(DiskCache(folder))


def _put_limited(folder: Path) -> tuple[int, bool]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    return _put_twice(DiskCache(folder))


def _put_twice(disk: DiskCache) -> tuple[int, bool]:
    """How many warnings there were, and whether anything was kept."""
    messages: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger("esper").addHandler(QueueHandler(messages))
    digests = [disk.put(content(i)) for i in range(3)]
    disk.note("a key", {"id": "x" * 1000})
    return messages.qsize(), any(digest in disk or disk.get(digest) is not None for digest in digests)


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="root gives up its capabilities")
def test_a_folder_that_cannot_be_written_is_said_once(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    assert forked(_put_unprivileged, folder) == (1, False)
    assert files(folder) == []


@needs_fork
def test_a_full_disk_is_said_once_and_nothing_is_left(folder: Path) -> None:
    """A limit on the size of files stands in for it: the write fails half way."""
    assert forked(_put_limited, folder) == (1, False)
    assert files(folder) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"theirs")
    disk = DiskCache(tmp_path / "taken")
    digest = disk.put(content(1))
    disk.note("a key", {})
    assert (disk.get(digest), digest in disk, disk.fact("a key"), disk.size()) == (None, False, None, 0)
    assert (tmp_path / "taken").read_bytes() == b"theirs"


BOUND = 50_000


def _use(barrier: Barrier, folder: Path, seed: int) -> tuple[int, int, list[str]]:
    """Put and get, as fast as it goes; how often what was asked for was there, how often not, and all complaints."""
    complaints: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger("esper").addHandler(QueueHandler(complaints))
    disk = DiskCache(folder, max_mb=BOUND / MIB)
    contents = [content(i, 500 + 97 * i) for i in range(60)]  # four times the bound
    digests = [disk.put(each) for each in contents]
    chosen = random.Random(seed)
    found = missed = 0
    barrier.wait()
    for _ in range(400):
        i = chosen.randrange(len(contents))
        data = disk.get(digests[i])
        if data is None:
            missed += 1
            disk.put(contents[i])
        else:
            found += 1
            assert data == contents[i]
        disk.note(f"key {i}", {"id": digests[i]})
        fact = disk.fact(f"key {i}")
        assert fact is None or fact == {"id": digests[i]}
    return found, missed, [complaints.get().getMessage() for _ in range(complaints.qsize())]


@needs_fork
def test_processes_put_read_and_evict_at_once_in_one_small_folder(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = race(_use, [(folder, seed) for seed in range(3)])
    for found, missed, complaints in outcomes:
        assert complaints == []
        assert found > 0
        assert missed > 0, "nothing was evicted: this was no race"
    disk = DiskCache(folder, max_mb=BOUND / MIB)
    last = disk.put(content(1000))
    assert disk.size() <= BOUND
    assert last in disk
    assert not [path for path in files(folder) if path.name.startswith(".")]
    for path in files(folder / "blobs"):
        assert disk.get(path.name) is not None
    assert "damaged" not in caplog.text
