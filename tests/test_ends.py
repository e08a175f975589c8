"""Programs come to an ordinary end, whatever Esper is doing just then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.programs import environment_with_pool

_TIMES = int(os.environ.get("TEST_ENDS_TIMES", "1"))
"""How often each program is run; 12 makes a hundred."""

_STATUS = {"exits": 3, "raises": 1}


def _start(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "tests.ending_programs", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, env=environment_with_pool(), stdout=pipe, stderr=pipe, text=True)


def _check_end(process: subprocess.Popen[str], kind: str) -> None:
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (_STATUS.get(kind, 0), "done\n"), err
    assert "terminate" not in err
    assert ("Traceback" in err) == (kind == "raises"), err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loaded", "requests", "hangs", "exits", "raises"])
def test_a_program_ends(kind: str) -> None:
    for _ in range(_TIMES):
        _check_end(_start(kind), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled-loaded", "compiled-request"])
def test_a_compiled_program_ends(kind: str) -> None:
    for _ in range(_TIMES):
        _check_end(_start(kind), kind)


@pytest.mark.slow
def test_two_ranks_end(tmp_path: Path) -> None:
    for turn in range(_TIMES):
        ranks = [_start(f"rank{rank}", str(tmp_path / f"store{turn}")) for rank in range(2)]
        for rank in ranks:
            _check_end(rank, "rank")
