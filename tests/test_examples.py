"""The programs in examples/, each run as a user would."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parent.parent / "examples"
_EXPECTED = {
    "lightning_module.py": ["groups of the optimizer: ["],
    "peft_adapters.py": ["formal: as PEFT computes it", "casual: as PEFT computes it", "saved: as PEFT computes it"],
    "trainer.py": ["after 60 steps: ACTIVE", "resumed: ACTIVE", "[3, 4, 5, 6, 7, 8, 9, 10]"],
}
_NOTEBOOKS = {
    "classifier_finds_its_size.ipynb": [
        r" 128 hidden units: 9\d\.\d%", r"\d growths kept, .* stopped: ", r"grown to \d+ hidden units: 9[5-9]\.\d%",
    ],
    "growing.ipynb": ["<caption>linear layers</caption>", "<td>ACTIVE</td><td>0.5</td>", "'esper/seeds/active': 1"],
    "language_model_grows_in_depth.ipynb": [
        "the outputs are the same: True", r"1\.\d+ nats a character after 14\.\d GFLOP: grown", "The standard lib",
    ],
}  # fmt: skip
"""What they print or show, as patterns."""


@pytest.fixture(scope="module")
def platform_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of them, in which a kernel is compiled once."""
    return tmp_path_factory.mktemp("platform")


def _run(program: Path, platform_folder: Path, cwd: Path) -> str:
    environment = {
        **os.environ,
        "ESPER_PLATFORM__ROOT": str(platform_folder),
        "ESPER_TEZZERET__PIPELINE": "fast",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(program)]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("name", sorted(_EXPECTED))
def test_an_example_runs_and_prints_what_it_is_to(name: str, platform_folder: Path, tmp_path: Path) -> None:
    printed = _run(_FOLDER / name, platform_folder, tmp_path)
    for line in _EXPECTED[name]:
        assert line in printed


def _showing(cell: str) -> str:
    """A cell's program, which prints what a notebook would show of its last expression."""
    body = ast.parse(cell).body
    last = body[-1]
    if not isinstance(last, ast.Expr):
        return cell
    return "\n".join([*map(ast.unparse, body[:-1]), f"show({ast.unparse(last)})"])


@pytest.mark.slow
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("name", sorted(_NOTEBOOKS))
def test_a_notebook_runs_and_shows_what_it_is_to(name: str, platform_folder: Path, tmp_path: Path) -> None:
    show = "def show(value):\n    print((getattr(value, '_repr_html_', None) or value.__repr__)())"
    program = tmp_path / "notebook.py"
    codes = [_showing("".join(each["source"])) for each in _cells(name) if each["cell_type"] == "code"]
    program.write_text("\n".join([show, *codes]), encoding="utf-8")
    printed = _run(program, platform_folder, tmp_path)
    for line in _NOTEBOOKS[name]:
        assert re.search(line, printed), f"{line} is not in\n{printed}"


@pytest.mark.parametrize("name", sorted(_NOTEBOOKS))
def test_a_notebook_has_what_it_showed_when_it_was_run(name: str) -> None:
    outputs = [output for cell in _cells(name) for output in cell.get("outputs", ())]
    assert not [each for each in outputs if each["output_type"] == "error"]
    data = [each.get("data", {}) for each in outputs]
    parts = [part for each in outputs for part in each.get("text", ())]
    parts += [part for each in data for kind in ("text/html", "text/plain") for part in each.get(kind, ())]
    shown = "".join(parts)
    for line in _NOTEBOOKS[name]:
        assert re.search(line, shown), line
    assert not re.search(r"/(home|root|tmp|Users)/", shown), "a path of one machine"
    assert sum("image/png" in each for each in data) == (0 if name == "growing.ipynb" else 1)


def _cells(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))["cells"]
    return cells


def test_every_example_is_run() -> None:
    by_torchrun = ["ddp.py"]  # in tests/distributed/test_examples.py
    assert sorted(path.name for path in _FOLDER.glob("*.py")) == sorted([*_EXPECTED, *by_torchrun])
    assert sorted(path.name for path in _FOLDER.glob("*.ipynb")) == sorted(_NOTEBOOKS)
