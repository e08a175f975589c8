"""Confining the training process to one core while the processes that it started may use every other."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from functools import cache
from typing import Any

import psutil

__all__ = ["ALL_CORES", "confine", "move_aside"]

ALL_CORES = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""The cores that this process could use when it was started; none where the system does not tell (only Linux does)."""


def confine() -> None:
    """Put every thread of this process on its last core, and every process below it on all cores.

    Affinity belongs to threads and is inherited by what they start, so threads that come later are confined as well.
    A thread that starts a process is let go shortly before and taken back shortly after, so that processes that come
    later are not. Without a second core, or on another system than Linux, nothing is done.
    """
    if len(ALL_CORES) < 2:
        return
    process = psutil.Process()
    _free_what_is_started()
    _allow(process, frozenset({max(ALL_CORES)}))
    for child in process.children(recursive=True):
        _allow(child, ALL_CORES)


@cache
def _free_what_is_started() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        del arguments
        if event == "subprocess.Popen":
            thread = threading.get_native_id()
            os.sched_setaffinity(thread, ALL_CORES)
            threading.Timer(0.2, _take_back, [thread]).start()

    sys.addaudithook(hook)


def _take_back(thread: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.sched_setaffinity(thread, {max(ALL_CORES)})


def move_aside(pid: int) -> None:
    """Keep a process, and what it starts from here on, off the core that :func:`confine` puts this process on."""
    if len(ALL_CORES) > 1:
        _allow(psutil.Process(pid), ALL_CORES - {max(ALL_CORES)})


def _allow(process: psutil.Process, cores: frozenset[int]) -> None:
    try:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return  # it has ended meanwhile
