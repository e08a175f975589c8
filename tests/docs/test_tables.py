"""The tables of docs/benchmarks.md say what the results say, and round nothing in our favour."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

MACHINE = {
    "date": "2026-01-02",
    "processor": "A Processor",
    "cores": 2,
    "device": "cpu",
    "threads": 1,
    "python": "3.11.7",
    "torch": "2.13.0",
    "command": "python -m benchmarks.dormant_overhead",
}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hook, reading results from `tmp_path`."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "hooks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def write(folder: Path, name: str, columns: list[str], rows: list[list[Any]], details: dict[str, Any]) -> None:
    document = {"machine": MACHINE, "columns": columns, "rows": rows, "details": details}
    (folder / f"{name}.json").write_text(json.dumps(document))


def overhead(folder: Path, case: str, plain: list[float], ours: list[float], name: str = "dormant_overhead") -> None:
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    row = [case, plain[0] * 1e6, ours[0] * 1e6, ratios[len(ratios) // 2]]
    columns = ["case", "plain, μs", "wrapped, μs", "ratio"]
    write(folder, name, columns, [row], {case: {"plain": plain, "esper": ours}})


def cells(tables: Any, name: str, case: str) -> list[str]:
    line = next(line for line in tables.results(name).splitlines() if line.startswith(f"| {case}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("case", "ours", "goal", "verdict"),
    [
        ("MLP 10-20-5, batch 4, eager, training", [0.7, 0.75, 0.8], "0.75", "met"),
        ("MLP 10-20-5, batch 4, eager, training", [0.76, 0.77, 0.78], "0.75", "missed"),
        ("MLP 10-20-5, batch 4, compiled, training", [0.97, 1.01, 1.02], "1.00", "within noise"),
        ("transformer, eager, training", [1.001, 1.001, 1.001], "1.00", "missed"),
        ("transformer, eager, training", [0.9, 1.0, 1.1], "1.00", "met"),
    ],
)
def test_a_verdict_follows_from_the_figures(
    tables: Any, tmp_path: Path, case: str, ours: list[float], goal: str, verdict: str
) -> None:
    overhead(tmp_path, case, [1.0, 1.0, 1.0], ours)
    assert cells(tables, "dormant_overhead", case)[-2:] == [goal, verdict]


def test_our_figures_are_rounded_up(tables: Any, tmp_path: Path) -> None:
    overhead(tmp_path, "transformer, eager", [1e-6] * 3, [1.0001e-6] * 3)
    _, plain, wrapped, ratio, *_ = cells(tables, "dormant_overhead", "transformer")
    assert (plain, wrapped, ratio) == ("1.000", "1.001", "1.001")


def test_results_say_where_they_come_from(tables: Any, tmp_path: Path) -> None:
    overhead(tmp_path, "transformer, eager", [1.0] * 3, [1.0] * 3)
    text = tables.results("dormant_overhead")
    for value in ("2026-01-02", "A Processor", "2 cores", "1 thread,", "torch 2.13.0", "benchmarks.dormant_overhead`"):
        assert value in text
    assert "![" not in text
    (tmp_path / "dormant_overhead.png").touch()
    assert "](../benchmarks/results/dormant_overhead.png)" in tables.results("dormant_overhead")


def test_every_device_is_shown_and_a_missing_result_is_said_to_be_missing(tables: Any, tmp_path: Path) -> None:
    assert tables.results("dormant_overhead").startswith("No results are committed")
    overhead(tmp_path, "transformer, eager", [1.0] * 3, [1.0] * 3)
    overhead(tmp_path, "transformer, eager", [1.0] * 3, [2.0] * 3, name="dormant_overhead-cuda")
    assert tables.results("dormant_overhead").count("Measured on") == 2


def test_seed_scaling_is_flat_or_not(tables: Any, tmp_path: Path) -> None:
    columns = ["seeds", "eager ratio", "compiled ratio", "state, MiB", "resident growth, MiB"]
    write(tmp_path, "seed_scaling", columns, [[1, 0.9, 1.0, 0.1, 0.1], [100_000, 0.93, 1.2, 2.0, 2.0]], {})
    text = tables.results("seed_scaling")
    assert "0.930 with 100,000, so flat is met" in text
    assert "1.200 with 100,000, so flat is missed" in text


def test_kernel_execution_counts_what_is_faster(tables: Any, tmp_path: Path) -> None:
    columns = ["case", "graph, μs", "attachment, μs", "ratio"]
    rows = [["a", 10.0, 5.0, 0.5], ["b", 10.0, 20.0, 2.0]]
    details = {case: {"graph": [1.0] * 3, "attachment": [ratio] * 3} for case, _, _, ratio in rows}
    write(tmp_path, "kernel_execution", columns, rows, details)
    assert "faster in 1 of 2 cases" in tables.results("kernel_execution")
