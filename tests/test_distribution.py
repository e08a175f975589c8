"""How the tests are shared out among processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MARK = 'pytestmark = pytest.mark.xdist_group("one")'
TESTS = """
import pytest


@pytest.mark.parametrize("number", range(8))
def test(number):
    pass
"""


@pytest.mark.slow
def test_a_group_is_run_by_one_process_and_the_rest_by_all(tmp_path: Path) -> None:
    (tmp_path / "test_grouped.py").write_text(f"{TESTS}\n{MARK}\n")
    (tmp_path / "test_other.py").write_text(TESTS)
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-v",
            "-n", "2", "--dist", "loadgroup", "--rootdir", str(tmp_path), str(tmp_path),
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    ran = re.findall(r"^\[(gw\d)\] .*PASSED (test_\w+)\.py", run.stdout, re.MULTILINE)
    assert len(ran) == 16
    assert len({process for process, file in ran if file == "test_grouped"}) == 1
    assert {process for process, _ in ran} == {"gw0", "gw1"}
