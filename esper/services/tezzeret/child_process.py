"""A child process that compiles, watched by the thread that started it."""

from __future__ import annotations

import getpass
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import psutil  # type: ignore[import-untyped]  # psutil ships no types

from esper.child_processes import (
    ChildStartError,
    describe_exit,
    family,
    kill_family,
    read_tail,
    start_child,
    wait_for_family,
)
from esper.ownership import UnsafePathError, check_own
from esper.services.errors import ServiceError
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.protocol import LOG, ChildRequest
from esper.services.tezzeret.watchers import StopSignal

__all__ = ["ChildExit", "run_child"]

_log = logging.getLogger(__name__)

_LOOK_EVERY = 0.25
"""Seconds between two looks at the child's memory. Its exit and a stop are noticed at once."""

_MODULE = "esper.services.tezzeret.child"
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
Kill = Literal["time", "memory", "stopped"]


@dataclass(frozen=True, slots=True)
class ChildExit:
    """How a child ended."""

    returncode: int
    killed: Kill | None
    """Why it was killed, if we did it."""
    seconds: float
    peak_bytes: int
    log_tail: str

    def __str__(self) -> str:
        """What happened to the process, for people."""
        return describe_exit(self.returncode)


def run_child(
    request: ChildRequest, limits: ChildLimits, stop: StopSignal, look: Callable[[], None] | None = None
) -> ChildExit:
    """Start the child for `request`, wait for it, and kill it with all that it started if it exceeds `limits`.

    `look` is called every quarter of a second; an exception from it ends the child and is passed on. Raises
    ``ServiceError`` if no process can be started.
    """
    log_path = Path(request.folder) / LOG
    with open(log_path, "wb") as log:
        process = _start(log, Path(request.folder), limits.niceness)
    child = _Child(process)
    try:
        with stop.attached(lambda: child.kill("stopped")):
            child.send(request)
            while not child.exited.wait(_LOOK_EVERY):
                child.check(limits)
                if look is not None:
                    look()
    finally:
        child.kill("stopped")
        child.exited.wait()
        child.hang_up()
    with open(log_path, "rb") as log:
        tail = read_tail(log)
    return ChildExit(process.returncode, child.killed, child.age(), child.peak_bytes, tail)


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self.killed: Kill | None = None
        self.peak_bytes = 0
        self.exited = threading.Event()
        threading.Thread(target=self._wait, name="esper-tezzeret-child", daemon=True).start()

    def _wait(self) -> None:
        wait_for_family(self._process)
        self.exited.set()

    def age(self) -> float:
        return time.monotonic() - self._started

    def send(self, request: ChildRequest) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which its exit will tell
            self._process.stdin.write(request.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    def hang_up(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def check(self, limits: ChildLimits) -> None:
        used = sum(_resident(each) for each in family(self._process.pid))
        self.peak_bytes = max(self.peak_bytes, used)
        if used > limits.memory_bytes:
            self.kill("memory")
        elif self.age() > limits.wall_seconds:
            self.kill("time")

    def kill(self, reason: Kill) -> None:
        """Kill the child and its descendants, unless it has ended. From any thread."""
        with self._lock:
            if self.killed is not None or self._process.poll() is not None:
                return
            self.killed = reason
            kill_family(self._process.pid)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _start(log: IO[bytes], folder: Path, niceness: int) -> subprocess.Popen[bytes]:
    try:
        variables = _own_cache(folder)
        return start_child(_MODULE, [str(os.getpid())], log=log, nice=niceness, secrets=False, variables=variables)
    except ChildStartError as cause:
        raise ServiceError(f"the process that compiles kernels cannot be started: {cause}") from cause


def _own_cache(folder: Path) -> dict[str, str]:
    """Inductor's cache folder is left alone if others can write to it: what is compiled is signed."""
    chosen = os.environ.get(_CACHE_VARIABLE)
    if chosen is None:  # as PyTorch chooses it
        chosen = os.path.join(
            tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\\\/:*?"<>|]', "_", getpass.getuser())
        )
    try:
        check_own(chosen, "Inductor's cache folder")
    except UnsafePathError as error:
        _log.warning("%s; kernels are compiled in a folder that is made for each", error)
        return {_CACHE_VARIABLE: str(folder / "inductor")}
    return {}
