"""Finding the processes in which Tezzeret compiles."""

from __future__ import annotations

import time

import psutil  # type: ignore[import-untyped]  # psutil ships no types

__all__ = ["child_of", "children_of", "wait_until_gone"]


def children_of(pid: int | None = None) -> list[psutil.Process]:
    """The compiling children of a process, or of this one."""
    found = []
    for each in psutil.Process(pid).children():
        try:
            if "esper.services.tezzeret.child" in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def child_of(pid: int | None = None, *, other_than: psutil.Process | None = None) -> psutil.Process:
    """The compiling child, once there is one."""
    deadline = time.monotonic() + 60
    while not (found := [each for each in children_of(pid) if each != other_than]):
        assert time.monotonic() < deadline, "no child process was started"
        time.sleep(0.02)
    return found[0]


def wait_until_gone(process: psutil.Process, seconds: float) -> None:
    """Fails if `process` still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {process.pid} still runs"
        time.sleep(0.02)
