"""The programs in examples/, each run as a user would."""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("name", sorted(_EXPECTED))
def test_an_example_runs_and_prints_what_it_is_to(name: str, platform_folder: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ESPER_PLATFORM__ROOT": str(platform_folder),
        "ESPER_TEZZERET__PIPELINE": "fast",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(_FOLDER / name)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    for line in _EXPECTED[name]:
        assert line in run.stdout


def test_every_example_is_run() -> None:
    assert sorted(path.name for path in _FOLDER.glob("*.py")) == sorted(_EXPECTED)
