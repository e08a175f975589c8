"""The programs in examples/, each run as a user would."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent.parent / "examples"
_EXPECTED = {
    "lightning_module.py": ["groups of the optimizer: ["],
    "peft_adapters.py": ["formal: as PEFT computes it", "casual: as PEFT computes it", "saved: as PEFT computes it"],
    "trainer.py": ["after 60 steps: ACTIVE", "resumed: ACTIVE", "[3, 4, 5, 6, 7, 8, 9, 10]"],
}


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
def test_the_notebook_runs_and_shows_tables(platform_folder: Path, tmp_path: Path) -> None:
    cells = json.loads((_FOLDER / "growing.ipynb").read_text(encoding="utf-8"))["cells"]
    show = "def show(value):\n    print(getattr(value, '_repr_html_', value.__repr__)())"
    program = tmp_path / "notebook.py"
    codes = [_showing("".join(each["source"])) for each in cells if each["cell_type"] == "code"]
    program.write_text("\n".join([show, *codes]), encoding="utf-8")
    printed = _run(program, platform_folder, tmp_path)
    assert "<caption>linear layers</caption>" in printed
    assert "<td>ACTIVE</td><td>0.5</td>" in printed
    assert "'esper/seeds/active': 1" in printed


def test_every_example_is_run() -> None:
    by_torchrun = ["ddp.py"]  # in tests/distributed/test_examples.py
    assert sorted(path.name for path in _FOLDER.glob("*.py")) == sorted([*_EXPECTED, *by_torchrun])
