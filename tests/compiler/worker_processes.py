"""Finding the processes of compile workers, and programs that use some."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types

from tests.services.children import wait_until_gone
from tests.services.programs import Program

__all__ = ["AMPLE", "ROOT", "TARGET", "assert_gone", "failure", "pids_in", "processes", "program", "settled"]

ROOT = Path(__file__).parents[2]
TARGET = "tests.compiler.worker_jobs:run"
AMPLE = 120.0


def processes(pid: int | None = None) -> list[psutil.Process]:
    """The workers of a process, or of this one, without those of its own pool, which other tests have used."""
    found = []
    for each in psutil.Process(pid).children():
        try:
            line = each.cmdline()
            if pid is None and "esper.compiler.variant_job:run" in line:
                continue
            if "esper.compiler.worker_process" in line and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def pids_in(folder: Path, count: int = 1) -> list[int]:
    """What processes have left in `folder`, once there are `count`."""
    deadline = time.monotonic() + AMPLE
    while len(found := sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())) < count:
        assert time.monotonic() < deadline, "no job began"
        time.sleep(0.01)
    return found


def assert_gone(pid: int) -> None:
    """Fails if the process is there after ten seconds."""
    with suppress(psutil.NoSuchProcess):
        wait_until_gone(psutil.Process(pid), 10)


def settled(future: Future[bytes]) -> bytes:
    return future.result(AMPLE)


def failure(future: Future[bytes]) -> BaseException:
    error = future.exception(AMPLE)
    assert error is not None
    return error


_PROGRAM = """
import ctypes, json, os, sys, time
from pathlib import Path
from esper.compiler.workers import CompileWorkers, default_workers
pool = CompileWorkers(target="tests.compiler.worker_jobs:run")
def say(*what):
    print(*what, flush=True)
"""


def program(source: str, *arguments: object, **environment: str) -> Program:
    return Program(_PROGRAM + source, *arguments, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
