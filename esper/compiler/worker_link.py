"""One compile worker, seen from the process that uses it."""

from __future__ import annotations

import io
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import IO

from esper.child_processes import ChildStartError, describe_exit, kill_family, read_tail, start_child
from esper.compiler.errors import WorkerJobError, WorkerStartError
from esper.compiler.worker_protocol import BUFFER_BYTES, HEADER, Kind

__all__ = ["LinkEndedError", "LinkTimeoutError", "WorkerLink"]

_MODULE = "esper.compiler.worker_process"
_GRACE = 1.0  # seconds; a process that closes its socket and does not end by then has not died
_PART_BYTES = 2**18  # read at a time: copying it with the interpreter lock held takes 0.1 ms
_LONGEST_WAIT = 1e6  # seconds; what poll(2) can count
_CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
"""That this process may use; the thread that starts a worker may be bound to fewer of them."""
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program may have switched SIGPIPE on again


class LinkEndedError(Exception):
    """The worker is dead or does not answer in the way that is agreed. It is of no more use."""


class LinkTimeoutError(Exception):
    """The worker did not answer in time. It is of no more use."""


class WorkerLink:
    """A worker process, and the line to it.

    For one thread, which blocks; only :meth:`kill` and :meth:`forget` may be called from others. The process runs from
    the beginning; raises :class:`~esper.compiler.errors.WorkerStartError` if it cannot be started.
    """

    def __init__(self, target: str, nice: int) -> None:
        if os.name != "posix":
            raise WorkerStartError(f"compile workers need a POSIX system, and this one is {sys.platform}")
        self._target = target
        try:
            self._log = _open_log()
            ours, theirs = socket.socketpair()
        except OSError as cause:
            raise WorkerStartError(f"no compile worker can be started: {cause}") from cause
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            try:
                self._process = self._start(theirs, nice)
            except (ChildStartError, OSError) as cause:
                ours.close()
                self._log.close()
                raise WorkerStartError(f"no compile worker can be started: {cause}") from cause
        self._line = _Line(ours, self._process.pid)

    def _start(self, theirs: socket.socket, nice: int) -> subprocess.Popen[bytes]:
        import fcntl  # not on Windows

        descriptor = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)  # a daemon's socket may have one below
        try:
            return start_child(
                _MODULE,
                [str(descriptor), str(os.getpid()), self._target],
                log=self._log,
                compile_threads=_compile_threads(),
                nice=nice,
                pass_fds=[descriptor],
            )
        finally:
            os.close(descriptor)

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until the target is imported. Raises ``WorkerStartError`` if that fails, or what :meth:`call` does."""
        self._line.set_deadline(seconds)
        kind, body = self._receive()
        if kind == Kind.UNUSABLE:
            raise WorkerStartError(
                f"compile workers cannot import what they run, {self._target}:\n{body.decode(errors='replace')}"
            )
        if kind != Kind.READY:
            raise LinkEndedError

    def call(self, payload: bytes, seconds: float) -> bytes | WorkerJobError:
        """The target's result for `payload`, or its exception.

        Raises :class:`LinkEndedError` or :class:`LinkTimeoutError`; then only :meth:`end` is left to be called.
        """
        os.ftruncate(self._log.fileno(), 0)
        self._line.set_deadline(seconds)
        self._line.send(HEADER.pack(Kind.JOB, len(payload)))
        self._line.send(payload)
        kind, body = self._receive()
        if kind == Kind.RESULT:
            return body
        if kind == Kind.ERROR:
            return _error(body)
        raise LinkEndedError

    def _receive(self) -> tuple[int, bytes]:
        kind, length = HEADER.unpack(self._line.read(HEADER.size))
        return kind, self._line.read(length)

    def has_ended(self) -> bool:
        """Whether the worker died, between two calls."""
        return self._line.is_readable()  # it says nothing of its own accord

    def log_tail(self) -> str:
        """The last that the worker, and what it started, printed since the last :meth:`call`."""
        return read_tail(self._log)

    def kill(self) -> None:
        """Kill the worker and whatever it started, at once. From any thread."""
        kill_family(self._process.pid)

    def end(self) -> str:
        """Kill what is left, and wait for that. How the worker ended, if it did so by itself."""
        died = self._line.has_died()
        self.kill()
        self._process.wait()
        return describe_exit(self._process.returncode) if died else "no longer answered"

    def close(self) -> None:
        """Close files and pipes. After :meth:`end`, or in a forked child."""
        self._line.close()
        self._log.close()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def forget(self) -> None:
        """In a forked child: close files and pipes, and leave the process to the parent."""
        self.close()
        self._process.poll()  # finds that it is no child of this process


class _Line:
    """A worker's socket, which also ends when the worker does: a process forked meanwhile may hold the other end."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._pidfd = _open_pid(pid)
        self._deadline = 0.0

    def set_deadline(self, seconds: float) -> None:
        """Have everything from here on end within `seconds`."""
        self._deadline = time.monotonic() + seconds

    def read(self, length: int) -> bytes:
        """Exactly `length` bytes. Raises ``LinkEndedError`` or ``LinkTimeoutError``.

        They are gathered part by part in the memory that is returned: the interpreter lock is never held for longer
        than it takes to copy a part.
        """
        body = io.BytesIO()
        dead = False
        while missing := length - body.tell():
            try:
                part = self._socket.recv(min(missing, _PART_BYTES))
            except BlockingIOError:
                if dead:
                    raise LinkEndedError from None
                dead = self._wait(select.POLLIN)
            except ConnectionError:
                raise LinkEndedError from None
            else:
                if not part:
                    raise LinkEndedError
                body.write(part)
        return body.getvalue()

    def send(self, data: bytes) -> None:
        """Send all of it. Raises ``LinkEndedError`` or ``LinkTimeoutError``."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest, _NO_SIGNAL) :]
            except BlockingIOError:
                if self._wait(select.POLLOUT):
                    raise LinkEndedError from None
            except ConnectionError:
                raise LinkEndedError from None

    def is_readable(self) -> bool:
        """Whether there are bytes, or the worker has died."""
        return bool(self._poll(select.POLLIN, 0.0))

    def has_died(self) -> bool:
        """Whether the worker has ended, or is about to: a process that ends closes its files first."""
        if not self.is_readable() or self._pidfd is None:
            return self.is_readable()
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        return bool(waiting.poll(_GRACE * 1000))

    def close(self) -> None:
        self._socket.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _wait(self, event: int) -> bool:
        """Until the socket is ready or the process has ended; whether it has ended."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise LinkTimeoutError
        return any(file == self._pidfd for file, _ in self._poll(event, min(remaining, _LONGEST_WAIT)))

    def _poll(self, event: int, seconds: float) -> list[tuple[int, int]]:
        waiting = select.poll()
        waiting.register(self._socket, event)
        if self._pidfd is not None:
            waiting.register(self._pidfd, select.POLLIN)
        return waiting.poll(seconds * 1000)


def _open_log() -> IO[bytes]:
    """A file without a name, in memory where there is such a thing: a full disk must not fail a job that prints."""
    if sys.platform == "linux":
        log: IO[bytes] = os.fdopen(os.memfd_create("esper-compile-worker"), "r+b", buffering=0)
    else:
        log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # it is the caller's
    import fcntl  # not on Windows

    flags = fcntl.fcntl(log, fcntl.F_GETFL)
    fcntl.fcntl(log, fcntl.F_SETFL, flags | os.O_APPEND)  # so that it can be emptied while the worker holds it
    return log


def _open_pid(pid: int) -> int | None:
    if sys.platform == "linux":
        with suppress(OSError):  # an older kernel, or a sandbox without it; then the end of the socket has to tell
            return os.pidfd_open(pid)
    return None


def _compile_threads() -> int:
    """C++ compilers that a worker may run at a time: one where there is a core to spare for the training process."""
    return 1 if _CORES < 4 else min(8, _CORES // 2)


def _error(body: bytes) -> WorkerJobError:
    text = json.loads(body)
    name, message = text["type"], text["message"]
    return WorkerJobError(f"{name}: {message}" if message else name, name, message, text["traceback"])
