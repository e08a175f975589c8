"""Work that a test does in processes of its own: forked ones, which start at once, and programs, which start afresh."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

__all__ = ["Program", "environment_with_pool", "forked", "obey_permissions", "race"]

_ROOT = Path(__file__).parents[2]
_Result = TypeVar("_Result")
_CAPABILITIES_VERSION_3 = 0x20080522


def forked(function: Callable[..., _Result], *arguments: object) -> _Result:
    """What `function`, of a module's top level, returns in a forked child; its exception is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result(timeout=60)


def race(function: Callable[..., _Result], arguments: Sequence[tuple[object, ...]]) -> list[_Result]:
    """`function(barrier, *each)` in a forked child for each of `arguments`, all at once."""
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, ProcessPoolExecutor(len(arguments), context) as pool:
        barrier = manager.Barrier(len(arguments))
        futures = [pool.submit(function, barrier, *each) for each in arguments]
        return [future.result(timeout=120) for future in futures]


def obey_permissions() -> None:
    """Give up what lets root write anywhere (CAP_DAC_OVERRIDE), in this thread. For a child of its own; Linux."""
    if os.getuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for index in (0, 1):  # the effective and the permitted set
        data[index] &= ~0b110
    assert libc.capset(header, data) == 0


def environment_with_pool() -> dict[str, str]:
    """This process's, in which a program has Inductor's own pool of compiling processes, as it has for users."""
    return {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}


class Program:
    """`source` as a running Python process; `arguments` are its `sys.argv[1:]`."""

    def __init__(self, source: str, *arguments: object, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, arguments)],
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=env,
            text=True,
        )

    def read_line(self) -> str:
        """The next line that it prints."""
        output: IO[str] | None = self.process.stdout
        assert output is not None
        return output.readline().strip()

    def finish(self, timeout: float = 120.0) -> list[str]:
        """Wait for its end, which must be a good one; the lines that it printed and nobody has read."""
        output, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0
        return output.splitlines()
