"""What compile workers do in tests. A job is a name and an argument: `b"echo hello"`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["run"]

_FOREVER = 300.0
_SLEEPER = [sys.executable, "-S", "-c", f"import time; time.sleep({_FOREVER})"]


class UnpicklableError(Exception):
    """Cannot be made again from its arguments, which is how exceptions are unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")
        self.both = (first, lambda: second)


def run(payload: bytes) -> bytes:
    name, _, argument = payload.partition(b" ")
    result: bytes = globals()[f"_{name.decode()}"](argument)
    return result


def _sign(folder: bytes, *pids: int) -> None:
    for pid in pids:
        (Path(os.fsdecode(folder)) / str(pid)).touch()


def _echo(argument: bytes) -> bytes:
    return argument


def _sleep(argument: bytes) -> bytes:
    time.sleep(float(argument))
    return argument


def _about(argument: bytes) -> bytes:
    """What a worker is like."""
    about = {
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "nice": os.nice(0),
        "threads": sys.modules["torch"].get_num_threads(),
        "compile_threads": os.environ["TORCHINDUCTOR_COMPILE_THREADS"],
        "main": sys.orig_argv[sys.orig_argv.index("-m") + 1],
        "path": sys.path,
        "read": sys.stdin.read(),
    }
    return json.dumps(about).encode()


def _attend(folder: bytes) -> bytes:
    """Leave a file named by this process's pid in the folder, and wait there for one named `go`."""
    _sign(folder, os.getpid())
    while not (Path(os.fsdecode(folder)) / "go").exists():
        time.sleep(0.01)
    return str(os.getpid()).encode()


def _hang(folder: bytes) -> bytes:
    """Start two processes, one in a session of its own; leave files named by all three pids; and go on forever."""
    started = [subprocess.Popen(_SLEEPER, start_new_session=apart).pid for apart in (False, True)]
    _sign(folder, *started, os.getpid())
    time.sleep(_FOREVER)
    return b""


def _brood(folder: bytes) -> bytes:
    """Start a process, as compiling starts a compiler; leave files named by both pids; and go on forever."""
    _sign(folder, subprocess.Popen(_SLEEPER).pid, os.getpid())
    time.sleep(_FOREVER)
    return b""


def _spin(folder: bytes) -> bytes:
    """The same, without letting the interpreter lock go."""
    _sign(folder, subprocess.Popen(_SLEEPER).pid, os.getpid())
    re.fullmatch("(a+)+", "a" * 60 + "b")
    return b""


def _abandon(folder: bytes) -> bytes:
    """Start a process, and die."""
    _sign(folder, subprocess.Popen(_SLEEPER).pid)
    os._exit(5)


def _orphan(folder: bytes) -> bytes:
    """Die, and leave a process behind that holds every file which this one had open."""
    if os.fork() == 0:
        os.setsid()
        _sign(folder, os.getpid())
        time.sleep(_FOREVER)
        os._exit(0)
    while not any(Path(os.fsdecode(folder)).iterdir()):
        time.sleep(0.01)
    os._exit(4)


def _signal(number: bytes) -> bytes:
    os.kill(os.getpid(), int(number))
    time.sleep(_FOREVER)
    return b""


def _once(path: bytes) -> bytes:
    """Die the first time."""
    if not os.path.exists(path):
        Path(os.fsdecode(path)).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return b"the second time"


def _exit(status: bytes) -> bytes:
    print("these were my last words")
    os._exit(int(status))


def _leave(status: bytes) -> bytes:
    sys.exit(int(status))


def _raise(argument: bytes) -> bytes:
    raise UnpicklableError("salt", argument.decode())


def _long(argument: bytes) -> bytes:
    raise ValueError("x" * 1_000_000)


def _silent(argument: bytes) -> bytes:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("there is nothing to say")

    raise SilentError


def _nothing(argument: bytes) -> bytes:
    return None  # type: ignore[return-value]  # the mistake is the point


def _print(argument: bytes) -> bytes:
    print("printed", argument)
    print("an error", file=sys.stderr)
    os.write(1, b"raw output\n" * 1000)
    subprocess.run(["sh", "-c", "echo from a compiler; echo and its errors >&2"], check=True)
    return argument
