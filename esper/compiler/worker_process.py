"""A compile worker: `python -m esper.compiler.worker_process`, started by `esper.compiler.worker_link`.

It does one job after the other, at a low priority and on one thread, and ends when the process that started it does.
What a job prints goes to the log; the socket to the parent is known to nobody else here, nor to what a job starts.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, cast

from esper.child_processes import end_with_parent
from esper.compiler.worker_protocol import HEADER, Kind

__all__ = ["main"]

_MOST_CHARACTERS = 100_000  # of an exception's message or traceback: Inductor puts whole programs into its messages
_FIRST_TO_DIE = 500  # of 1000; see proc(5), oom_score_adj
_Target = Callable[[bytes], bytes]


class _Line:
    """This end of the socket."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # what a job starts must not keep the line open
        self._socket = socket.socket(fileno=descriptor)
        self._reader = io.BufferedReader(socket.SocketIO(self._socket, "r"), 2**16)

    def read_job(self) -> bytes | None:
        """The next job; None if there will be none."""
        header = self._reader.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        kind, length = HEADER.unpack(header)
        assert kind == Kind.JOB
        body = self._reader.read(length)
        return body if len(body) == length else None

    def send(self, kind: Kind, body: bytes) -> None:
        self._socket.sendall(HEADER.pack(kind, len(body)))
        self._socket.sendall(body)


def main() -> NoReturn:
    """Serve the parent until it hangs up."""
    descriptor, parent, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    end_with_parent(parent)
    line = _Line(descriptor)
    _stand_back()
    function = _find(target, line)
    with suppress(ConnectionError):  # the parent has hung up, or is gone
        line.send(Kind.READY, b"")
        while (job := line.read_job()) is not None:
            line.send(*_answer(function, job))
            del job
    _leave(0)


def _stand_back() -> None:
    """Be the first to go if memory runs out; and if this process dies, let the log tell where."""
    cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)
    faulthandler.enable()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # where there is no such file, no matter
        score.write(str(_FIRST_TO_DIE))  # rather than the process that trains


def _find(target: str, line: _Line) -> _Target:
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
    except BaseException:  # noqa: BLE001  # whatever it is, the parent hears of it and this process ends
        with suppress(ConnectionError):
            line.send(Kind.UNUSABLE, traceback.format_exc()[-_MOST_CHARACTERS:].encode(errors="replace"))
        _leave(1)
    return cast("_Target", function)


def _answer(function: _Target, job: bytes) -> tuple[Kind, bytes]:
    try:
        result = function(job)
        if not isinstance(result, bytes):
            raise TypeError(f"a compile worker's function must return bytes, and this one returned {type(result)}")
    except BaseException as error:  # noqa: BLE001  # also SystemExit: it ends the job and not the worker
        report = traceback.TracebackException.from_exception(error)
        text = {
            "type": type(error).__name__,
            "message": str(report)[:_MOST_CHARACTERS],
            "traceback": "".join(report.format())[-_MOST_CHARACTERS:],
        }
        return Kind.ERROR, json.dumps(text).encode()
    return Kind.RESULT, result


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a log that cannot be written keeps nobody here
            stream.flush()
    os._exit(status)  # at once: shutting torch down takes time


if __name__ == "__main__":
    main()
