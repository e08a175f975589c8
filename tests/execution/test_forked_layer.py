"""A process that is forked while seeds change in it, or while its threads are in the middle of something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.services.programs import environment_with_pool

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.mark.slow
def test_a_child_that_is_forked_in_the_middle_of_a_change_loads_and_runs() -> None:
    assert output_of("tests.execution.forked_layer") == ["child: 0", "called off: True", "parent: True"]


@pytest.mark.slow
def test_a_child_that_is_forked_while_other_threads_hold_locks_or_fetch_can_do_everything() -> None:
    assert output_of("tests.execution.forked_steps") == [
        "alpha: True",
        "request: True",
        "cache: True",
        "telemetry: True",
        "another: True",
        "fetch: True",
        "child: 0",
        "alpha: True",
        "fetched: True",
        "request: True",
    ]


def output_of(module: str) -> list[str]:
    """The lines that a program prints, which has to end well."""
    command, env = [sys.executable, "-W", "ignore", "-m", module], environment_with_pool()
    program = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert program.returncode == 0, program.stderr
    return program.stdout.splitlines()
