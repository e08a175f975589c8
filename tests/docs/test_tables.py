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
    """Of both modes, of which the second takes twice as long."""
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    middle = ratios[len(ratios) // 2]
    row = [case, plain[0] * 1e6, ours[0] * 1e6, middle, ours[0] * 2e6, middle * 2]
    columns = ["case", "plain, μs", "module, μs", "module / plain", "fx, μs", "fx / plain"]
    write(folder, name, columns, [row], {case: {"plain": plain, "module": ours, "fx": [2 * each for each in ours]}})


def cells(tables: Any, name: str, case: str) -> list[str]:
    line = next(line for line in tables.results(name).splitlines() if line.startswith(f"| {case}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("case", "ours", "module", "fx"),
    [
        ("MLP 10-20-5, batch 4, eager, training", [0.35, 0.37, 0.4], "1.00: met", "0.75: met"),
        ("MLP 10-20-5, batch 4, eager, training", [0.38, 0.39, 0.4], "1.00: met", "0.75: missed"),
        ("MLP 10-20-5, batch 4, compiled, training", [0.97, 1.01, 1.02], "1.00: within noise", "1.00: missed"),
        ("transformer, eager, training", [1.001, 1.001, 1.001], "1.00: missed", "1.00: missed"),
        ("transformer, eager, training", [0.45, 0.5, 0.55], "1.00: met", "1.00: met"),
    ],
)
def test_a_verdict_follows_from_the_figures(
    tables: Any, tmp_path: Path, case: str, ours: list[float], module: str, fx: str
) -> None:
    overhead(tmp_path, case, [1.0, 1.0, 1.0], ours)
    of_case = cells(tables, "dormant_overhead", case)
    assert (of_case[4], of_case[-1]) == (module, fx)


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


SWAP_COLUMNS = [
    "case", "median step, ms", "worst step, ms", "worst / median", "steps lost", "seconds lost",
    "control: worst / median", "control: seconds lost", "request to active, s", "idle / plain",
]  # fmt: skip


def hot_swap(folder: Path, worst: float, lost: float, control: float, idle: list[float]) -> None:
    middle: Any = sorted(idle)[len(idle) // 2] if idle else ""
    rows = [
        ["MLP, 6 blocks: Esper", 5.0, 5.0 * worst, worst, lost / 5e-3, lost, 1.5, control, 9.0, middle],
        ["MLP, 6 blocks: module swap", 5.0, 8000.0, 1600.0, 1600.0, 8.0, 1.5, 0.01, 8.0, ""],
    ]
    rounds = {"idle": {"esper": idle, "plain": [1.0] * len(idle)}} if idle else {}
    goals = {"worst": 5.0, "lost": 0.3, "idle": 1.0}
    details = {"goals": goals, "cases": {"MLP, 6 blocks: Esper": "mlp"}, "models": {"mlp": rounds}}
    write(folder, "hot_swap", SWAP_COLUMNS, rows, details)
    add_sections(folder, "hot_swap", [{"title": "Median step", "columns": ["case", "before"], "rows": [["x", 5.0]]}])


def add_sections(folder: Path, name: str, sections: list[dict[str, Any]]) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sections": sections}))


@pytest.mark.parametrize(
    ("worst", "lost", "control", "idle", "verdicts"),
    [
        (4.9, 0.2, 0.0, [0.99, 1.0, 1.01], ["met", "met", "met"]),
        (5.1, 0.31, 0.0, [1.001, 1.002, 1.003], ["missed", "missed", "missed"]),
        (4.9, 0.5, 0.25, [0.98, 0.99, 1.01, 1.02, 1.03], ["met", "met", "within noise"]),
        (4.9, 0.2, 0.0, [], ["met", "met", "missed"]),
    ],
)
def test_a_swap_is_judged_by_its_worst_step_its_lost_time_and_what_it_costs_idle(
    tables: Any, tmp_path: Path, worst: float, lost: float, control: float, idle: list[float], verdicts: list[str]
) -> None:
    hot_swap(tmp_path, worst, lost, control, idle)
    text = tables.results("hot_swap")
    line = next(line for line in text.splitlines() if line.startswith("| MLP, 6 blocks |"))
    assert [cell.strip() for cell in line.strip("|").split("|")][2::2] == verdicts
    assert "| MLP, 6 blocks: module swap | 5.000 | 8000.0 |" in text
    assert "Median step:" in text


def compile_time(folder: Path, ours: float, first: float, second: tuple[int, int]) -> None:
    goals = {"ratio": 1.05, "first": 3.0, "compilations": 0}
    details = {
        "goals": goals,
        "starts": {"mlp": {"first": first, "trace": 0.01}},
        "processes": {"first": {}, "second": {}},
    }
    write(
        folder, "compile_time", ["case", "inductor, plain", "esper, dormant", "ratio"],
        [["MLP, cold", 10.0, ours, ours / 10.0]], details,
    )  # fmt: skip
    add_sections(
        folder,
        "compile_time",
        [
            {"title": "First step", "columns": ["case", "first"], "rows": [["MLP", first]]},
            {
                "title": "The same script",
                "columns": ["process", "compiled in it", "compiled by workers"],
                "rows": [["first", 2, 1], ["second", *second]],
            },
            {"title": "A kernel", "columns": ["blocks", "s"], "rows": [[2, 5.0]]},
        ],
    )


@pytest.mark.parametrize(
    ("ours", "first", "second", "verdicts"),
    [(10.5, 0.03, (0, 0), ["met"] * 3), (10.6, 0.031, (0, 1), ["missed"] * 3), (10.6, 0.5, (1, 0), ["missed"] * 3)],
)
def test_compile_time_is_judged_by_its_three_goals(
    tables: Any, tmp_path: Path, ours: float, first: float, second: tuple[int, int], verdicts: list[str]
) -> None:
    compile_time(tmp_path, ours, first, second)
    text = tables.results("compile_time")
    assert cells(tables, "compile_time", "MLP, cold")[-1] == verdicts[0]
    assert f"at most 3 of Dynamo's trace and a step: {verdicts[1]}." in text
    assert f"by or for the second process: {verdicts[2]}." in text


def test_what_failed_in_compile_time_is_said_to_have_failed(tables: Any, tmp_path: Path) -> None:
    compile_time(tmp_path, 10.0, 0.01, (0, 0))
    path = tmp_path / "compile_time.json"
    document = json.loads(path.read_text())
    document["details"]["starts"]["mlp"] = {"failed": "RuntimeError: no"}
    document["details"]["processes"]["second"] = {"failed": "RuntimeError: no"}
    document["sections"][1]["rows"][1] = ["second", "RuntimeError: no", ""]
    path.write_text(json.dumps(document))
    text = tables.results("compile_time")
    assert "at most 3 of Dynamo's trace and a step: failed." in text
    assert "by or for the second process: failed." in text


@pytest.mark.parametrize(
    ("seeds", "batching", "ratio", "goal", "verdict"),
    [
        (1, "one by one", 1.02, "1.02", "met"),
        (1, "batched", 1.01, "1.02", "met"),
        (4, "batched", 1.01, "1.00", "missed"),
        (4, "batched", 0.8, "1.00", "met"),
        (16, "one by one", 1.03, "1.02", "missed"),
    ],
)
def test_active_seeds_have_to_be_as_fast_as_by_hand_and_batched_ones_faster(
    tables: Any, tmp_path: Path, seeds: int, batching: str, ratio: float, goal: str, verdict: str
) -> None:
    case = f"{seeds} a layer, {batching}, forward"
    details = {
        "goals": {"one by one": 1.02, "batched": 1.0},
        case: {"seeds": seeds, "batching": batching, "hand": [1.0] * 3, "esper": [ratio] * 3},
    }
    columns = ["case", "by hand, μs", "esper, μs", "ratio"]
    write(tmp_path, "active_overhead", columns, [[case, 1e6, ratio * 1e6, ratio]], details)
    assert cells(tables, "active_overhead", case)[-2:] == [goal, verdict]
