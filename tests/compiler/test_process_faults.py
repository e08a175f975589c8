"""Whole programs that come to grief: without a compiler, with a hanging worker, ended or forked in mid-compilation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.moody_compiler import MoodyCompiler
from tests.compiler.worker_processes import ROOT, assert_gone
from tests.services.programs import Program, environment_with_pool

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]
PROMPT = 10.0  # seconds within which a program that is told to end has ended


def program(folder: Path, call: str, environment: Mapping[str, str] = os.environ) -> Program:
    """The program of `faulty_programs` that is called so; it keeps its kernels in `folder`."""
    source = f"from tests.compiler.faulty_programs import *\n{call}"
    env = {**environment, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return Program(source, folder, env=env)


def said(running: Program) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.finish(timeout=280)]


@pytest.mark.timeout(400)
def test_a_worker_that_hangs_is_killed_in_time_and_another_one_serves_the_next_load(
    tmp_path: Path, empty_store: Path
) -> None:
    limit = {**os.environ, "ESPER_EXECUTION__COMPILE_TIMEOUT": "15"}
    failed, loaded = said(program(tmp_path, "has_a_worker_that_stops()", limit))
    reason = failed.pop("reason")
    assert "its job took longer than 15 s; raise the setting execution.compile_timeout" in reason
    assert failed == {
        "loaded": False,
        "same": True,
        "state": "ERROR_RECOVERY",
        "errors": 1,
        "in_force": ["host compile"],
    }
    assert loaded == {"state": "ACTIVE", "errors": 1, "reason": "", "in_force": ["worker"], "others": True}


def without_a_compiler(call: str, folder: Path, **missing: str) -> list[dict[str, Any]]:
    """What is said by a program that has none, after it has said what was raised."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **missing}
    raised, *rest = said(program(folder, call, environment))
    assert "needs a C++ compiler: install g++, or name one in CXX" in raised["raised"]
    assert 'options={"fallback": "eager"} runs such graphs uncompiled' in raised["raised"]
    return rest


def test_without_a_compiler_in_the_path_compiling_says_what_to_do(tmp_path: Path) -> None:
    assert without_a_compiler("has_no_compiler(only_raises=True)", tmp_path, PATH="/nowhere") == []


@pytest.mark.timeout(400)
def test_without_a_compiler_a_load_says_what_to_do_and_the_fallback_runs_uncompiled(tmp_path: Path) -> None:
    fallen_back, failed = without_a_compiler("has_no_compiler()", tmp_path, CXX="/nowhere/g++")
    assert fallen_back["dormant"] == ["uncompiled"]
    assert (fallen_back["state"], fallen_back["in_force"]) == ("ACTIVE", ["uncompiled"])
    assert "needs a C++ compiler: install g++, or name one in CXX" in failed.pop("reason")
    assert failed == {
        "loaded": False,
        "same": True,
        "state": "ERROR_RECOVERY",
        "errors": 1,
        "in_force": ["uncompiled"],
    }


@pytest.mark.parametrize("when", ["cold start", "load"])
def test_a_program_that_ends_in_mid_compilation_ends_at_once_with_all_that_it_started(
    when: str, tmp_path: Path, compiler: MoodyCompiler
) -> None:
    running = program(tmp_path, f"ends({when!r})", environment_with_pool())
    ending = json.loads(running.read_line())
    assert len(ending["pids"]) == 2, "a worker and its compiler"
    assert ending["state"] == ("DORMANT" if when == "cold start" else "LOADING")
    assert running.finish(PROMPT) == []
    for pid in ending["pids"]:
        assert_gone(pid)


@pytest.mark.timeout(400)
def test_a_forked_child_and_its_parent_both_go_on(tmp_path: Path, empty_store: Path) -> None:
    lines = said(program(tmp_path, "forks()", environment_with_pool()))
    well = {"changed": True, "state": "ACTIVE", "errors": 0, "reason": ""}
    for loaded, where in ((None, []), (True, ["worker"]), (None, ["worker"])):  # the first time it is only wrapped
        child, ended, parent, lines = *lines[:3], lines[3:]
        assert child == {"who": "child", **well, "in_force": where}
        assert ended == {"child": 0, "loaded": loaded}
        assert parent.pop("in_force") in (where, ["store"] if where else [])
        assert parent == {"who": "parent", **well}
    assert lines == []
