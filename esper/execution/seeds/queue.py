"""The staging queue: operations are made ready on a background thread and then staged, side by side if they can.

What is compiled for them is compiled once. Kernels are fetched side by side, on other threads, and one whose fetch
takes long is not waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from esper.execution.background import FETCHING, STAGING, JobQueue, has_worked
from esper.execution.plans.executor import PreparationCancelledError, ShutDownError
from esper.execution.plans.gate import Gate
from esper.execution.plans.plan import Plan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.progress import Stage
from esper.execution.seeds.seed import Operation, described_together
from esper.forking import reset_after_fork

__all__ = ["StagingQueue"]

_LOG = logging.getLogger("esper.execution")

_SLOW_FETCH = 0.1  # seconds after which others do not wait for it
_LONGEST_GATHERING = 0.5


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Operations that are staged together: all or none of them, or those that are still wanted."""

    operations: tuple[Operation, ...]
    is_whole: bool = True

    def still_wanted(self) -> _Bundle | None:
        """What there is to stage; the rest is given up."""
        wanted = tuple(operation for operation in self.operations if operation.is_wanted)
        kept = wanted if len(wanted) == len(self.operations) or not self.is_whole else ()
        for operation in self.operations:
            if operation not in kept:
                operation.fail(None)
        return _Bundle(kept, self.is_whole) if kept else None


def _offer(gate: Gate, operations: Iterable[Operation]) -> None:
    for change, group in itertools.groupby(operations, key=lambda each: each.change):
        together = tuple(group)
        for operation in together:
            operation.note(Stage.AGREEING)
        gate.offer(change, described_together([each.describe() for each in together]), *together)


class StagingQueue:
    """The operations of one model that are to be staged. From any thread; they are made ready on `STAGING`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._jobs = JobQueue(STAGING)
        self._begin()
        reset_after_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # guards the next two
        self._arrived = threading.Condition(self._lock)
        self._fetched: deque[_Bundle] = deque()
        self._fetches: dict[Operation, float | None] = {}  # when they began; None as long as they wait for a thread

    def after_fork(self) -> None:
        """Leave to the parent what its threads are at; see `esper.forking`."""
        self._begin()

    def fetch(self, *operations: Operation, first: Callable[[], None] | None = None) -> None:
        """Have operations staged once they were fetched, each of which may be slow or hang; `first` is done before."""
        line = deque(operations)
        with self._lock:
            self._fetches.update(dict.fromkeys(operations))
        try:
            FETCHING.submit(lambda: self._fetch_some(line, first))
        except BaseException:
            for operation in operations:
                self._end_fetch(operation, goes_on=False)
            raise

    def _fetch_some(self, line: deque[Operation], first: Callable[[], None] | None = None) -> None:
        """Fetch the first of a line and, while that is quick, those behind it; another job goes on beside this one."""
        if len(line) > 1:
            FETCHING.submit(lambda: self._fetch_some(line))
        if first is not None:
            first()
        fetched = False
        while not (fetched and has_worked()):
            try:
                operation = line.popleft()
            except IndexError:  # others are at the same line
                return
            self._fetch(operation)
            fetched = True

    def _fetch(self, operation: Operation) -> None:
        goes_on = False
        with self._lock:
            self._fetches[operation] = time.monotonic()
        try:
            goes_on = operation.fetch()
        finally:
            self._end_fetch(operation, goes_on)

    def _end_fetch(self, operation: Operation, goes_on: bool) -> None:
        with self._lock:
            self._fetches.pop(operation, None)
            if goes_on:
                self._fetched.append(_Bundle((operation,)))
            self._arrived.notify()
        if goes_on:
            self._jobs.submit(self._work)

    def stage_fetched(self, operations: Sequence[Operation]) -> None:
        """Have operations whose fetches have ended staged together, or none of them."""
        with self._lock:
            self._fetched.append(_Bundle(tuple(operations)))
        self._jobs.submit(self._work)

    def later(self, job: Callable[[], object]) -> None:
        """Have `job` done between the operations."""
        self._jobs.submit(job)

    def stage(self, *operations: Operation) -> bool:
        """Stage operations at once if every executor could follow them, else on the background thread. Lock held.

        One of which something else is asked meanwhile is left out then.
        """
        if self._runtime.gate is not None:
            _offer(self._runtime.gate, operations)
            return True
        plan = self._runtime.target
        for operation in operations:
            plan = operation.edit(plan)
        if self._runtime.ready(plan):
            self._runtime.publish(*operations)
        else:
            for operation in operations:
                operation.wait()
            with self._lock:
                self._fetched.append(_Bundle(operations, is_whole=False))
            self._jobs.submit(self._work)
        return True

    def _work(self) -> None:
        """Stage what has come, and what comes soon after, together."""
        with self._lock:
            end = time.monotonic() + _LONGEST_GATHERING
            while self._fetched and (seconds := min(self._until_slow(), end - time.monotonic())) > 0:
                self._arrived.wait(seconds)
            bundles = list(self._fetched)
            self._fetched.clear()
        self._stage(bundles)

    def _until_slow(self) -> float:
        """Seconds until all fetches under way will have taken long; 0 if there are none."""
        now = time.monotonic()
        begun = [now if began is None else began for began in self._fetches.values()]
        return max(begun) + _SLOW_FETCH - now if begun else 0.0

    def _stage(self, bundles: Sequence[_Bundle]) -> None:
        while bundles := [wanted for each in bundles if (wanted := each.still_wanted()) is not None]:
            operations = [operation for each in bundles for operation in each.operations]
            base, executors, plan = self._runtime.target, self._runtime.executors_added, self._runtime.target
            for operation in operations:
                plan = operation.edit(plan)
            for operation in operations:
                operation.note(Stage.COMPILING_VARIANTS)
            try:
                with self._superseded(operations) as superseded:
                    self._runtime.prepare(plan, superseded)
            except PreparationCancelledError:
                continue
            except ShutDownError as error:
                _LOG.info("not staged: %s", error)
                for operation in operations:
                    operation.fail(None)
                return
            except Exception as error:  # noqa: BLE001  # law 4: whatever fails before the commit is kept as the seed's error
                if len(bundles) > 1:  # it need not be the fault of all
                    for bundle in bundles:
                        self._stage([bundle])
                else:
                    for operation in operations:
                        operation.fail(error)
                return

            if self._publish_prepared(operations, base, executors):
                return

    @contextlib.contextmanager
    def _superseded(self, operations: Sequence[Operation]) -> Iterator[Future[None]]:
        """A future that is done as soon as something else is asked of one of the seeds."""
        future: Future[None] = Future()
        with self._runtime.lock:
            for operation in operations:
                operation.ticket.superseded = future
            if not all(operation.is_wanted for operation in operations):
                future.set_result(None)
        try:
            yield future
        finally:
            with self._runtime.lock:
                for operation in operations:
                    operation.ticket.superseded = None

    def _publish_prepared(self, operations: Sequence[Operation], base: Plan, executors: int) -> bool:
        """Stage what was prepared on top of `base`, unless that is not what would come into force any more."""
        with self._runtime.lock:
            if base is not self._runtime.target or executors != self._runtime.executors_added:
                return False
            if not all(operation.is_wanted for operation in operations):
                return False
            if (gate := self._runtime.gate) is not None:
                _offer(gate, operations)
                return True
            for operation in operations:
                operation.publish()
            self._runtime.publish(*operations)
        for operation in operations:
            operation.answer(True)
        return True
