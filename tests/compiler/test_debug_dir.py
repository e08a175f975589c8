"""`ESPER_DEBUG_DIR`: graphs before and after each pass, in folders that never mix, and never at the cost of a run."""

from __future__ import annotations

import ast
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import fx, nn

from esper.compiler.debug import pass_callback
from esper.compiler.workers import CompileWorkers
from esper_passes import ElideDormant, Pipeline, RewriteSites

PASSES = (RewriteSites({"0": 7}), ElideDormant())


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))


def dumped(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESPER_DEBUG_DIR", str(tmp_path / "dumps"))
    return tmp_path / "dumps"


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_dumped_unless_asked_for(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DEBUG_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("ESPER_DEBUG_DIR", value)
    assert pass_callback("graph 0") is None


def test_each_pass_leaves_the_graph_before_and_after_as_python(directory: Path) -> None:
    Pipeline(PASSES, pass_callback("graph 0"))(traced())
    folder = directory / str(os.getpid()) / "graph_0" / "000"
    assert dumped(folder) == [
        "00_rewrite_sites.after.py",
        "00_rewrite_sites.before.py",
        "01_elide_dormant.after.py",
        "01_elide_dormant.before.py",
        "timings.txt",
    ]
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    for text in texts.values():
        ast.parse(text)
    assert "esper.site" not in texts["00_rewrite_sites.before.py"]
    assert "esper.site" in texts["00_rewrite_sites.after.py"]
    assert texts["01_elide_dormant.before.py"] == texts["00_rewrite_sites.after.py"]
    assert "esper.site" not in texts["01_elide_dormant.after.py"]
    timings = (folder / "timings.txt").read_text().splitlines()
    assert [line.split()[0] for line in timings] == ["rewrite_sites", "elide_dormant"]
    assert all(line.endswith(" ms") and float(line.split()[1]) > 0 for line in timings)


def test_each_run_has_a_folder_of_its_own(directory: Path) -> None:
    for name in ("graph 0", "graph 0", "graph 1"):
        Pipeline(PASSES[:1], pass_callback(name))(traced())
    own = directory / str(os.getpid())
    assert sorted(path.relative_to(own).as_posix() for path in own.glob("*/*")) == [
        "graph_0/000",
        "graph_0/001",
        "graph_1/000",
    ]


def test_threads_never_share_a_folder(directory: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        callbacks = list(threads.map(pass_callback, ["graph"] * 64))
    assert None not in callbacks
    assert len(list((directory / str(os.getpid()) / "graph").iterdir())) == 64


@pytest.mark.parametrize("name", ["../../../escaped", "/etc/graph", "..", "", "a b/c\0d", "x" * 500])
def test_no_name_leads_out_of_the_folder(name: str, directory: Path, tmp_path: Path) -> None:
    Pipeline(PASSES[:1], pass_callback(name))(traced())
    own = directory / str(os.getpid())
    (graph,) = own.iterdir()
    assert len(dumped(graph)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]


def dump_in_worker(payload: bytes) -> bytes:
    """What the compile worker of the test below runs."""
    Pipeline(PASSES, pass_callback(payload.decode()))(traced())
    return str(os.getpid()).encode()


@pytest.mark.slow
def test_a_compile_worker_dumps_beside_the_process_that_trains(directory: Path) -> None:
    with CompileWorkers(target="tests.compiler.test_debug_dir:dump_in_worker") as workers:
        pid = workers.submit(b"graph 0").result(120).decode()
    Pipeline(PASSES, pass_callback("graph 0"))(traced())
    assert pid != str(os.getpid())
    for each in (pid, str(os.getpid())):
        assert len(dumped(directory / each / "graph_0" / "000")) == 5


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_folder_that_cannot_be_made_is_one_warning(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.write_text("a file")
    for _ in range(2):
        assert pass_callback("graph 0") is None
        assert pass_callback("graph 1") is None
    (message,) = warnings_in(caplog)
    assert str(directory) in message
    assert "ESPER_DEBUG_DIR" in message


def test_a_folder_that_becomes_unwritable_does_not_fail_the_passes(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = pass_callback("graph")
    shutil.rmtree(directory)
    directory.write_text("a file")
    result = Pipeline(PASSES, callback)(traced())
    assert result.modified
    (message,) = warnings_in(caplog)
    assert str(directory) in message


def test_a_folder_below_home_may_be_named_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ESPER_DEBUG_DIR", "~/dumps")
    Pipeline(PASSES[:1], pass_callback("graph"))(traced())
    assert dumped(tmp_path / "dumps" / str(os.getpid()) / "graph" / "000")
