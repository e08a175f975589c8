"""A process that is forked while seeds change in it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_is_forked_in_the_middle_of_a_change_loads_and_runs() -> None:
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.execution.forked_layer"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    assert program.stdout.splitlines() == ["child: 0", "called off: True", "parent: True"], program.stderr
