"""What a benchmark leaves behind: tables, JSON and a plot."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from benchmarks.harness import Section, report, stoppable


def made(folder: Path, device: str = "cpu", **more: Any) -> None:
    options = argparse.Namespace(device=device, results=folder)
    report(
        "example", "An example", ("case", "s"), [("a", 1.5)], {"a": [0.25, 1e-7, -3]}, lambda *_: None, options, **more
    )


def test_a_report_is_a_table_a_json_file_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path)
    assert "An example" in capsys.readouterr().out
    document = json.loads((tmp_path / "example.json").read_text())
    assert (document["columns"], document["rows"]) == (["case", "s"], [["a", 1.5]])
    assert document["details"] == {"a": [0.25, 1e-7, -3]}
    assert document["machine"]["threads"] >= 1
    assert "sections" not in document
    assert (tmp_path / "example.png").read_bytes().startswith(b"\x89PNG")


def test_lists_of_numbers_take_one_line(tmp_path: Path) -> None:
    made(tmp_path)
    assert '"a": [ 0.25, 1e-07, -3 ]' in (tmp_path / "example.json").read_text()


def test_further_tables_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, sections=[Section("More", ("what", "n"), [("b", 2)])])
    assert "More" in capsys.readouterr().out
    document = json.loads((tmp_path / "example.json").read_text())
    assert document["sections"] == [{"title": "More", "columns": ["what", "n"], "rows": [["b", 2]]}]


def test_a_plot_has_as_many_panels_as_asked_for(tmp_path: Path) -> None:
    panels: list[Axes] = []
    options = argparse.Namespace(device="cpu", results=tmp_path)
    report("example", "An example", ("case",), [], {}, lambda *axes: panels.extend(axes), options, panels=(2, 3))
    assert len(panels) == 6


def test_what_was_measured_before_it_is_stopped_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    with stoppable():
        for row in range(3):
            if row == 2:
                signal.raise_signal(signal.SIGINT)
            rows.append(row)
    assert rows == [0, 1]
    assert "stopped" in capsys.readouterr().out
