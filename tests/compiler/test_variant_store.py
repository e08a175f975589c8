"""The store of compiled variants: whatever the disk does, a program gets what was stored or nothing, and goes on."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

from esper.compiler.variant_store import VariantKey, VariantStore, default_store

LOGGER = "esper.compiler.variant_store"
KEY = VariantKey.of({"torch": "2.13.0", "graph": b"one"})
OTHER = VariantKey.of({"torch": "2.13.0", "graph": b"other"})
PAYLOAD = bytes(range(256))
DAMAGED_LENGTH = 40
"""Bytes of payload where every byte of a file is damaged in turn."""


@pytest.fixture
def store(tmp_path: Path) -> VariantStore:
    return VariantStore(tmp_path / "store")


def only_file(store: VariantStore) -> Path:
    (path,) = store.folder.iterdir()
    return path


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER and record.levelno >= level]


@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD, os.urandom(8 << 20)], ids=["empty", "one", "256", "8 MiB"])
def test_what_is_stored_is_found_by_another_store(payload: bytes, store: VariantStore) -> None:
    assert store.get(KEY) is None
    store.put(KEY, payload)
    again = VariantStore(store.folder)
    assert again.get(KEY) == payload
    assert again.get(OTHER) is None
    assert (again.statistics.hits, again.statistics.misses, again.statistics.unusable) == (1, 1, 0)
    assert (store.statistics.writes, store.statistics.misses) == (1, 1)


def test_a_later_payload_takes_the_place_of_an_earlier_one(store: VariantStore) -> None:
    store.put(KEY, b"earlier")
    store.put(KEY, b"later")
    assert store.get(KEY) == b"later"
    assert len(list(store.folder.iterdir())) == 1


def test_looking_makes_no_folder_and_says_nothing(store: VariantStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        assert store.get(KEY) is None
    assert not store.folder.exists()
    assert not messages(caplog)


def test_a_store_needs_room(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit_bytes is 0"):
        VariantStore(tmp_path, limit_bytes=0)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_a_miss_and_is_removed(store: VariantStore) -> None:
    store.put(KEY, PAYLOAD[:DAMAGED_LENGTH])
    path = only_file(store)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert store.get(KEY) is None, f"cut to {length} bytes"
        assert not path.exists()
    assert store.statistics.unusable == len(content)


def test_any_changed_byte_is_a_miss(store: VariantStore) -> None:
    store.put(KEY, PAYLOAD[:DAMAGED_LENGTH])
    path = only_file(store)
    content = path.read_bytes()
    for position in range(len(content)):
        for flipped in (0x01, 0x80):
            path.write_bytes(
                content[:position] + bytes([content[position] ^ flipped]) + content[position + 1 :],
            )
            assert store.get(KEY) is None, f"byte {position} changed"
    path.write_bytes(content)
    assert store.get(KEY) == PAYLOAD[:DAMAGED_LENGTH]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content + b"x", "too long"),
        (lambda content: b"", "truncated"),
        (lambda content: b"\x7fELF" + os.urandom(500), "not a file of Esper's"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum"),
    ],
    ids=["longer", "empty", "foreign", "changed"],
)
def test_a_damaged_file_is_named_with_its_reason_removed_and_written_anew(
    damage: object, reason: str, store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, PAYLOAD)
    path = only_file(store)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]  # a lambda of the table above
    assert store.get(KEY) is None
    (message,) = messages(caplog, logging.WARNING)
    assert reason in message
    assert str(path) in message
    assert "was removed" in message
    assert not path.exists()
    store.put(KEY, PAYLOAD)
    assert store.get(KEY) == PAYLOAD


def test_a_file_under_the_name_of_another_key_is_a_miss(store: VariantStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put(KEY, PAYLOAD)
    store.put(OTHER, b"other")
    paths = {path.read_bytes()[-5:]: path for path in store.folder.iterdir()}
    other = paths.pop(b"other")
    (own,) = paths.values()
    shutil.copy(own, other)
    assert store.get(OTHER) is None
    assert "another key" in messages(caplog, logging.WARNING)[0]
    assert store.get(KEY) == PAYLOAD


def test_a_file_of_another_format_is_left_to_those_who_can_read_it(
    store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, PAYLOAD)
    path = only_file(store)
    content = path.read_bytes()
    path.write_bytes(content[:8] + (99).to_bytes(4, "big") + content[12:])
    with caplog.at_level(logging.INFO, LOGGER):
        assert store.get(KEY) is None
    assert path.exists()
    assert any("version 99" in message and "left alone" in message for message in messages(caplog))
    store.put(KEY, PAYLOAD)
    assert store.get(KEY) == PAYLOAD


def test_each_reason_is_said_once(store: VariantStore, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        for key in (KEY, OTHER):
            store.put(key, PAYLOAD)
        for path in store.folder.iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        assert store.get(KEY) is None
        assert store.get(OTHER) is None
    for _ in range(2):
        store.put(KEY, PAYLOAD)
        only_file(store).write_bytes(b"x" * 1000)
        assert store.get(KEY) is None
    assert [message.rpartition(": ")[2] for message in messages(caplog, logging.WARNING)] == [
        "it is truncated",
        "it is not a file of Esper's",
    ]
    assert store.statistics.unusable == 8


# -- things in the way -------------------------------------------------------------------------------------------------


def put_in_the_way(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "folder":
        (path / "with something in it").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)  # a link to itself, which not even root can follow


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself"])
def test_something_else_in_the_place_of_a_file_is_a_miss_and_stays(
    kind: str, store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, PAYLOAD)
    path = only_file(store)
    put_in_the_way(path, kind)
    with caplog.at_level(logging.INFO, LOGGER):
        assert store.get(KEY) is None
        assert store.get(KEY) is None
    assert len(messages(caplog)) == 1
    assert str(path) in messages(caplog)[0]
    assert os.path.lexists(path)


def test_a_folder_in_the_place_of_a_file_cannot_be_written_over(
    store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(KEY, PAYLOAD)
    path = only_file(store)
    put_in_the_way(path, "folder")
    store.put(KEY, PAYLOAD)
    store.put(KEY, PAYLOAD)
    (message,) = messages(caplog, logging.WARNING)
    assert "a folder stands where a variant belongs: remove it" in message
    assert only_file(store) == path, "the temporary file is gone"
    assert store.statistics.failed_writes == 2
    store.put(OTHER, PAYLOAD)
    assert store.get(OTHER) == PAYLOAD


@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_the_folder_should_be_is_one_warning(
    below: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("something of the user's")
    store = VariantStore(tmp_path / "file" / "store" if below else tmp_path / "file")
    for _ in range(2):
        assert store.get(KEY) is None
        store.put(KEY, PAYLOAD)
    (message,) = messages(caplog, logging.WARNING)
    assert str(store.folder) in message
    assert "remove it" in message
    assert "TORCHINDUCTOR_CACHE_DIR" in message
    assert (tmp_path / "file").read_text() == "something of the user's"
    assert (store.statistics.misses, store.statistics.failed_writes) == (2, 2)


# -- size --------------------------------------------------------------------------------------------------------------


def numbered(number: int) -> VariantKey:
    return VariantKey.of({"number": str(number)})


def age(store: VariantStore, key: VariantKey, seconds: float) -> None:
    """Make the variant look as if it had been used last so long ago."""
    then = time.time() - seconds
    os.utime(next(store.folder.glob(f"{key.digest}*")), (then, then))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, limit_bytes=10_000)
    for number in range(4):
        store.put(numbered(number), b"x" * 2000)
        age(store, numbered(number), 100 - number)
    assert store.get(numbered(0)) is not None  # the oldest, used again
    store.put(numbered(4), b"x" * 2000)
    present = [number for number in range(5) if VariantStore(tmp_path).get(numbered(number)) is not None]
    assert present == [0, 2, 3, 4]
    assert store.statistics.evicted == 1


def test_what_is_larger_than_the_limit_is_not_kept_and_pushes_nothing_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = VariantStore(tmp_path, limit_bytes=2000)
    store.put(KEY, PAYLOAD)
    for _ in range(2):
        store.put(OTHER, b"x" * 2000)
    assert store.get(OTHER) is None
    assert store.get(KEY) == PAYLOAD
    (message,) = messages(caplog, logging.WARNING)
    assert "limited to 2000 bytes" in message


def test_what_killed_processes_left_is_removed_and_the_files_of_others_are_not(tmp_path: Path) -> None:
    abandoned, being_written = (f".{'0' * 16}.{letter * 16}" for letter in "ab")
    for name, age_seconds in ((abandoned, 7200), (being_written, 10), ("notes.txt", 7200)):
        (tmp_path / name).write_bytes(b"x" * 100_000)
        os.utime(tmp_path / name, (time.time() - age_seconds,) * 2)
    (tmp_path / "folder").mkdir()
    store = VariantStore(tmp_path, limit_bytes=50_000)
    store.put(KEY, PAYLOAD)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(KEY.digest)) == [
        being_written,
        "folder",
        "notes.txt",
    ]
    assert store.get(KEY) == PAYLOAD


# -- threads, permissions, the log, the default ------------------------------------------------------------------------


def test_threads_share_a_store(store: VariantStore) -> None:
    wrong: list[int] = []

    def work(start: int) -> None:
        for number in range(50):
            store.put(numbered(number), b"%d" % number * 100)
            if store.get(numbered((number + start) % 50)) not in (None, b"%d" % ((number + start) % 50) * 100):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(17 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counted = store.statistics
    assert (counted.writes, counted.hits + counted.misses, counted.unusable) == (200, 200, 0)
    assert len(list(store.folder.iterdir())) == 50


def test_files_have_the_permissions_that_the_user_gives_to_files(store: VariantStore) -> None:
    before = os.umask(0o027)
    try:
        store.put(KEY, PAYLOAD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(only_file(store).stat().st_mode) == 0o640


def test_the_log_says_what_a_key_was_made_of_and_what_was_different(
    store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(VariantKey.of({"torch": "2.12.1", "graph": b"graph", "mode": "default"}), PAYLOAD)
    store.put(VariantKey.of({"torch": "2.12.1", "graph": b"another graph"}), PAYLOAD)
    (store.folder / f"{'0' * 64}.variant").write_bytes(b"of no use")
    wanted = VariantKey.of({"torch": "2.13.0", "graph": b"graph", "mode": "default"})
    with caplog.at_level(logging.DEBUG, LOGGER):
        assert store.get(wanted) is None
    said = "\n".join(messages(caplog, logging.DEBUG))
    assert f"variant {wanted.short}: missed, there is none" in said
    assert f"variant {wanted.short}: made of torch = 2.13.0" in said
    assert f"variant {wanted.short}: made of graph = sha256:" in said
    assert said.endswith("differs in torch (2.12.1 there)")


def test_the_default_store_follows_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    first = default_store()
    assert first is not None
    assert first is default_store()
    first.put(KEY, PAYLOAD)
    assert list((tmp_path / "first" / "esper").iterdir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    second = default_store()
    assert second is not None
    assert second.folder == tmp_path / "second" / "esper"
    assert second.get(KEY) is None


def test_there_is_no_default_store_without_compile_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch(force_disable_caches=True):
        assert default_store() is None


def test_a_cache_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert default_store() is None
    assert default_store() is None
    (message,) = messages(caplog, logging.WARNING)
    assert str(tmp_path / "file" / "cache") in message
    assert "TORCHINDUCTOR_CACHE_DIR" in message
