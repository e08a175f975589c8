"""A pool of processes that compile, so that the process that trains does not."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import Counter, deque
from concurrent.futures import Future

from esper.compiler.errors import (
    CompileWorkerError,
    WorkerCrashedError,
    WorkersClosedError,
    WorkerStartError,
    WorkerTimeoutError,
)
from esper.compiler.report import WorkerCounters
from esper.compiler.worker_link import LinkEndedError, LinkTimeoutError, WorkerLink
from esper.forking import no_forks, reset_after_fork
from esper.futures import InterruptSafeFuture

__all__ = ["CompileWorkers", "default_workers", "workers_so_far"]

_log = logging.getLogger(__name__)

_START_SECONDS = 300.0
"""For a worker to import what it needs, at a low priority on a busy machine."""
_CLOSE_SECONDS = 5.0
_ATTEMPTS = 2


class CompileWorkers:
    """`count` processes in which the function `target`, "module:function" from bytes to bytes, does jobs.

    The processes are new interpreters: they import `target` and not the program that is running. Each computes on one
    thread at a priority lowered by `nice`, does one job at a time, and ends with this process however that ends. They
    are started when :meth:`warm` or :meth:`submit` first needs them, and again when they die; a thread for each waits
    for it, without polling. In a forked child the pool starts afresh, and the parent's jobs stay the parent's.

    For any thread. Close it, or use it as a context manager: until then its processes stay.
    """

    def __init__(
        self,
        count: int = 1,
        *,
        target: str = "esper.compiler.variant_job:run",
        nice: int = 10,
        timeout: float = 600.0,
    ) -> None:
        """`timeout`, in seconds, is for a job that does not bring its own, from when a worker begins with it."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._count = count
        self._target = target
        self._nice = nice
        self._timeout = _checked(timeout)
        self._closed = False
        self._begin()
        reset_after_fork(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()  # guards all of these, and is never held for more than a few lines
        self._jobs: deque[_Job] = deque()
        self._seats: list[_Seat] = []
        self._busy: set[_Seat] = set()
        self._warmings = 0
        self._counters: Counter[str] = Counter()

    def after_fork(self) -> None:
        """Leave threads, processes and jobs to the parent; see `esper.forking`."""
        for seat in self._seats:
            seat.forget()
        self._begin()

    def warm(self) -> None:
        """Have all processes started, and `target` imported in them. Returns at once; a failure is logged."""
        with self._changed:
            if self._closed:
                return
            self._warmings += 1
            try:
                self._staff(self._count)
            except RuntimeError as cause:
                _log.warning("no thread can be started to wait for a compile worker: %s", cause)
            self._changed.notify_all()

    def submit(self, payload: bytes, *, timeout: float | None = None) -> Future[bytes]:
        """Have a worker apply `target` to `payload`, within `timeout` seconds from when it begins. Returns at once.

        Jobs begin in the order in which they were submitted; one that waits can be cancelled. The future's callbacks
        run on the thread that waits for the worker: they must be short. It fails with a
        :class:`~esper.compiler.errors.CompileWorkerError`: ``WorkerJobError`` for what `target` raised,
        ``WorkerTimeoutError``, ``WorkerCrashedError`` if the worker died and then another one too,
        ``WorkerStartError`` or ``WorkersClosedError``.
        """
        job = _Job(payload, self._timeout if timeout is None else _checked(timeout))
        with self._changed:
            refused = _closed_error() if self._closed else self._enqueue(job)
        if refused is not None:
            job.settle(refused)
        return job.future

    def _enqueue(self, job: _Job) -> CompileWorkerError | None:
        """Why not, if there is nobody to do it."""
        self._jobs.append(job)
        try:
            self._staff()
        except RuntimeError as cause:  # too many threads, or the interpreter is ending
            if not self._seats:
                self._jobs.remove(job)
                return WorkerStartError(f"no thread can be started to wait for a compile worker: {cause}")
        self._changed.notify()
        return None

    def _staff(self, least: int = 0) -> None:
        wanted = min(self._count, max(least, len(self._busy) + len(self._jobs)))
        while len(self._seats) < wanted:
            self._seats.append(_Seat(self))

    def close(self) -> None:
        """Kill what runs. Futures that are not done fail with ``WorkersClosedError``, also those of later jobs."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = self._jobs, deque()
            seats = list(self._seats)
            self._changed.notify_all()
        for seat in seats:
            seat.kill()
        for job in waiting:
            if job.begin():
                job.settle(_closed_error())
        for seat in seats:
            seat.join(_CLOSE_SECONDS)

    def __enter__(self) -> CompileWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def statistics(self) -> WorkerCounters:
        """Jobs that workers began and that are `done` or `failed`; and what became of workers."""
        with self._changed:
            return WorkerCounters(**self._counters)

    # -- for seats -------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return self._closed

    def start_link(self) -> WorkerLink:
        return WorkerLink(self._target, self._nice)

    def count(self, what: str) -> None:
        with self._changed:
            self._counters[what] += 1

    def next_job(self, seat: _Seat) -> _Job | None:
        """Wait for a job; None if the seat should only see to it that it has a worker, or if the pool is closed."""
        with self._changed:
            self._busy.discard(seat)
            self._changed.wait_for(lambda: self._closed or self._jobs or seat.warmings < self._warmings)
            self._busy.add(seat)
            seat.warmings = self._warmings
            return self._jobs.popleft() if self._jobs else None

    def leave(self, seat: _Seat) -> None:
        """The seat's thread ends."""
        with self._changed:
            self._busy.discard(seat)
            self._seats.remove(seat)
            self._staff()  # if it ended because a future's callback raised SystemExit, somebody has to go on


class _Job:
    def __init__(self, payload: bytes, timeout: float) -> None:
        self.payload = payload
        self.timeout = timeout
        self.future: Future[bytes] = InterruptSafeFuture()

    def begin(self) -> bool:
        """False if it was cancelled. From here on it cannot be."""
        return self.future.set_running_or_notify_cancel()

    def settle(self, outcome: bytes | BaseException) -> None:
        if isinstance(outcome, bytes):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class _Seat:
    """A place for one worker: the thread that waits for it, and its process, which belongs to that thread alone."""

    def __init__(self, pool: CompileWorkers) -> None:
        self._pool = pool
        self._link: WorkerLink | None = None
        self._starts = 0
        self.warmings = 0
        """How many of the pool's warmings the seat has taken note of. The pool's lock guards it."""
        self._thread = threading.Thread(target=self._serve, name="esper-compile-worker", daemon=True)
        self._thread.start()

    # -- from any thread -------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill the worker, if there is one. The thread notices."""
        link = self._link
        if link is not None:
            link.kill()

    def join(self, seconds: float) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def forget(self) -> None:
        """In a forked child."""
        if self._link is not None:
            self._link.forget()

    # -- on the seat's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._pool.is_closed:
                job = self._pool.next_job(self)
                if job is None:
                    self._warm()
                elif job.begin():
                    outcome = self._outcome(job)
                    self._pool.count("done" if isinstance(outcome, bytes) else "failed")
                    job.settle(outcome)
                    del outcome
                del job  # it may be large, and the next one may be long in coming
        finally:
            if self._link is not None:
                self._drop(self._link)
            self._pool.leave(self)

    def _warm(self) -> None:
        if self._pool.is_closed:
            return
        try:
            self._ready_link()
        except LinkEndedError:
            if not self._pool.is_closed:
                _log.warning("%s", _start_error(*self._fail()))
        except WorkerStartError as error:
            _log.warning("%s", error)

    def _outcome(self, job: _Job) -> bytes | BaseException:
        """The job's result, or why there is none."""
        how = tail = ""
        ready = False
        for attempt in range(1, _ATTEMPTS + 1):
            ready = False
            try:
                link = self._ready_link()
                ready = True
                outcome = link.call(job.payload, job.timeout)
                if _log.isEnabledFor(logging.DEBUG) and (tail := link.log_tail()):
                    _log.debug("a compile worker's output:\n%s", tail)
                return outcome
            except LinkEndedError:
                how, tail = self._fail()
                if self._pool.is_closed:
                    return _closed_error()
                doing = "in the middle of a job" if ready else "while it started"
                _log.warning("a compile worker %s %s, attempt %d of %d", how, doing, attempt, _ATTEMPTS)
            except LinkTimeoutError:
                return self._too_late(job)
            except BaseException as error:  # noqa: BLE001  # the future carries it to whoever waits
                if self._link is not None:
                    self._drop(self._link)
                return error.with_traceback(None)  # which would keep the payload
        return _crash_error(how, tail) if ready else _start_error(how, tail)

    def _ready_link(self) -> WorkerLink:
        """The worker, started anew if it has died. Raises ``WorkerStartError`` or :class:`LinkEndedError`."""
        if self._link is not None:
            if not self._link.has_ended():
                return self._link
            _log.warning("a compile worker %s while it had nothing to do", self._fail()[0])
        with no_forks():  # a forked child must know of it to forget it
            self._link = link = self._pool.start_link()
        if self._starts:
            self._pool.count("restarts")
        self._starts += 1
        if self._pool.is_closed:  # since before `kill` could have found it
            link.kill()
        try:
            link.wait_until_ready(_START_SECONDS)
        except WorkerStartError:
            self._drop(link)
            raise
        except LinkTimeoutError:
            _, tail = self._drop(link)
            late = f"a compile worker was not ready within {_START_SECONDS:g} s"
            raise WorkerStartError(_with_tail(late, tail)) from None
        return link

    def _too_late(self, job: _Job) -> WorkerTimeoutError:
        assert self._link is not None
        _, tail = self._drop(self._link)
        self._pool.count("timeouts")
        return WorkerTimeoutError(
            _with_tail(
                f"the compile worker was killed because its job took longer than {job.timeout:g} s; "
                "raise the setting execution.compile_timeout, or the job's own limit",
                tail,
            )
        )

    def _fail(self) -> tuple[str, str]:
        """Clear away a worker that died by itself; how it ended, and the last that it printed."""
        assert self._link is not None
        if not self._pool.is_closed:
            self._pool.count("crashes")
        return self._drop(self._link)

    def _drop(self, link: WorkerLink) -> tuple[str, str]:
        self._link = None
        how = link.end()
        tail = link.log_tail()
        link.close()
        return how, tail


_default: dict[str, CompileWorkers] = {}


def default_workers() -> CompileWorkers:
    """This process's pool, made on first use and closed at the interpreter's exit.

    The settings `execution.compile_workers`, `execution.compile_timeout` and `execution.compile_niceness` say how large
    it is, how long a job may take and at which priority. Raises :class:`~esper.configs.ConfigError`.
    """
    workers = _default.get("")
    if workers is None:
        from esper.configs import load_config  # with pydantic's settings, which `import esper` does without

        settings = load_config().execution
        made = CompileWorkers(
            settings.compile_workers, nice=settings.compile_niceness, timeout=settings.compile_timeout
        )
        workers = _default.setdefault("", made)  # atomic, and without a lock that a fork could leave locked
        if workers is made:
            atexit.register(made.close)
    return workers


def workers_so_far() -> WorkerCounters | None:
    """What this process's pool has done; None if there is none yet."""
    workers = _default.get("")
    return None if workers is None else workers.statistics


def _checked(timeout: float) -> float:
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
    return timeout


def _closed_error() -> WorkersClosedError:
    return WorkersClosedError("the compile workers were closed before the job was done")


def _crash_error(how: str, tail: str) -> WorkerCrashedError:
    message = f"two compile workers died of the same job; the second {how}"
    if how.endswith("SIGKILL"):
        message += ", as happens when memory runs out"
    return WorkerCrashedError(_with_tail(message, tail), how, tail)


def _start_error(how: str, tail: str) -> WorkerStartError:
    return WorkerStartError(_with_tail(f"compile workers die while they start; the last one {how}", tail))


def _with_tail(message: str, tail: str) -> str:
    return f"{message}; its last words:\n{tail}" if tail else message
