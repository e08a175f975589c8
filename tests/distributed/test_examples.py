"""The examples of docs/ranks.md, run as that page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def test_ddp_by_torchrun() -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "passes"))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, "examples/ddp.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"rank (\d): grown at forward (\d+), parameters sum up to (-?[\d.]+)", done.stdout)
    assert sorted(rank for rank, _, _ in found) == ["0", "1"]
    assert len({rest for _, *rest in map(tuple, found) for rest in [tuple(rest)]}) == 1, done.stdout
