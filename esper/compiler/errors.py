"""Errors of the compiler's part. A message names what happened and the remedy."""

from __future__ import annotations

from esper.errors import EsperError

__all__ = [
    "CompileWorkerError",
    "WorkerCrashedError",
    "WorkerJobError",
    "WorkerStartError",
    "WorkerTimeoutError",
    "WorkersClosedError",
]


class CompileWorkerError(EsperError):
    """Base class: a compile worker has no result for a job; the subclass says why."""


class WorkerStartError(CompileWorkerError):
    """No compile worker can be started here: no interpreter, no resources left, or what it runs cannot be imported."""


class WorkerCrashedError(CompileWorkerError):
    """Two workers, one after the other, died of the job; so does one that the system kills for want of memory."""

    def __init__(self, message: str, exit: str, log_tail: str) -> None:
        super().__init__(message)
        self.exit = exit
        """How the second one ended: "was killed by SIGSEGV"."""
        self.log_tail = log_tail
        """The last that it wrote to standard output and standard error."""


class WorkerTimeoutError(CompileWorkerError, TimeoutError):
    """The job took longer than its time limit. Its worker was killed, with all that it had started."""


class WorkerJobError(CompileWorkerError):
    """The job raised an exception. Nothing of it but text came back; the worker lives on."""

    def __init__(self, message: str, type_name: str, detail: str, traceback: str) -> None:
        super().__init__(message)
        self.type_name = type_name
        """The name of the exception's class, without its module."""
        self.message = detail
        """The exception's message."""
        self.traceback = traceback
        """The worker's traceback, as text."""
        if traceback:
            self.add_note(f"In the compile worker:\n{traceback}")


class WorkersClosedError(CompileWorkerError, RuntimeError):
    """The workers were closed before the job was done."""
