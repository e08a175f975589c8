"""The store of compiled variants on full disks, without permissions, and in forked children.

Processes that race or are killed are those of `esper.file_store`, in `tests/services/test_urza_client_disk.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.compiler.variant_store import VariantKey, VariantStore

KEY = VariantKey.of({"torch": "2.13.0"})
PRELUDE = """
import logging, os, sys
from esper.compiler.variant_store import VariantKey, VariantStore

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
key = VariantKey.of({"torch": "2.13.0"})
store = VariantStore(sys.argv[1])
"""


def run(program: str, *arguments: str) -> list[str]:
    """The lines that `program` prints in a process of its own, which must end well."""
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, *arguments], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted only by root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_warning_and_what_was_stored_stays(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = VariantStore(small_disk / "store")
    store.put(KEY, b"x" * 100_000)
    for number in range(3):
        store.put(VariantKey.of({"number": str(number)}), b"y" * 200_000)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(store.folder) in message
    assert "free some space there, or name another folder in TORCHINDUCTOR_CACHE_DIR" in message
    assert store.get(KEY) == b"x" * 100_000
    assert len(list(store.folder.iterdir())) == 1, "no temporary file takes up the rest of the disk"
    assert store.statistics.failed_writes == 3
    store.put(VariantKey.of({"small": "one"}), b"z" * 1000)
    assert store.get(VariantKey.of({"small": "one"})) == b"z" * 1000


def test_a_limit_on_the_size_of_files_is_one_warning(tmp_path: Path) -> None:
    lines = run(
        """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store.put(key, b"x" * 5000)
store.put(key, b"x" * 5000)
print(store.get(key), os.listdir(store.folder))
store.put(key, b"x" * 1000)
print(store.get(key) == b"x" * 1000)
""",
        str(tmp_path),
    )
    assert len(lines) == 3
    assert lines[0].startswith("WARNING")
    assert "ulimit -f" in lines[0]
    assert lines[1:] == ["None []", "True"]


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))  # pytest's own folders are closed to other users
    try:
        store = VariantStore(folder / "store")
        store.put(KEY, b"payload")
        for path in (*store.folder.iterdir(), store.folder, folder):
            path.chmod(0o444 if path.is_file() else 0o555)
        lines = run(
            """
if os.geteuid() == 0:
    os.seteuid(65534)
other = VariantKey.of({"torch": "2.12.0"})
print(store.get(key))
store.put(other, b"x")
store.put(other, b"x")
print(store.get(other), VariantStore(sys.argv[1] + "/new/folder").put(other, b"x"))
""",
            str(store.folder),
        )
    finally:
        folder.chmod(0o755)
        (folder / "store").chmod(0o755)
        shutil.rmtree(folder)
    assert lines[0] == "b'payload'"
    assert lines[1].startswith("WARNING")
    assert f"{folder / 'store'} (Permission denied)" in lines[1]
    assert "make it writable, or name another folder in TORCHINDUCTOR_CACHE_DIR" in lines[1]
    assert lines[2].startswith("WARNING")  # another store, another folder
    assert lines[3] == "None None"


def test_a_variant_that_may_not_be_read_is_a_miss() -> None:
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))
    try:
        folder.chmod(0o755)
        VariantStore(folder).put(KEY, b"payload")
        (path,) = folder.iterdir()
        path.chmod(0)
        lines = run("if os.geteuid() == 0: os.seteuid(65534)\nprint(store.get(key), store.get(key))", str(folder))
        assert path.exists()
    finally:
        shutil.rmtree(folder)
    assert lines[-1] == "None None"
    assert len(lines) == 2
    assert "it cannot be read (Permission denied)" in lines[0]


@pytest.mark.slow
def test_a_forked_child_uses_the_store_whatever_threads_of_the_parent_were_doing(tmp_path: Path) -> None:
    lines = run(
        """
import signal, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forks beside threads
store.put(key, b"payload")
others = [VariantKey.of({"number": str(number)}) for number in range(8)]
ended = threading.Event()

def work(other):
    while not ended.is_set():
        store.get(other), store.statistics

threads = [threading.Thread(target=work, args=(other,)) for other in others]
sys.setswitchinterval(1e-6)
for thread in threads:
    thread.start()
codes = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os._exit(0 if store.get(key) == b"payload" and store.statistics.hits > 0 else 1)
    codes.append(os.waitpid(child, 0)[1])
    if codes[-1] != 0:
        break
ended.set()
for thread in threads:
    thread.join()
print(codes == [0] * 40, codes)
""",
        str(tmp_path),
    )
    assert lines[0].startswith("True"), lines
