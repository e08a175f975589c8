"""Changes are made ready on a background thread and then staged; those that are asked for at the same time, together.

What is compiled for them is compiled once. Kernels are fetched side by side, on other threads, and one whose fetch
takes long is not waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.execution.background import FETCHING, STAGING, JobQueue
from esper.execution.plans.executor import CalledOffError, ShutDownError
from esper.execution.plans.plan import Plan
from esper.execution.plans.plan_edit import Change
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.requests import SeedRequest, SeedRequests
from esper.forking import reset_after_fork

__all__ = ["Edit", "StagingQueue"]

_LOG = logging.getLogger("esper.execution")

_SLOW_FETCH = 0.1  # seconds after which others do not wait for it
_LONGEST_GATHERING = 0.5


@dataclass(frozen=True, slots=True)
class Edit:
    """A request whose change is known: `change` to be published, unless `failed` has to be told why not.

    `failed` gets None if the request was called off or the process ends. `before_publishing` is called under the lock.
    """

    request: SeedRequest
    change: Change
    failed: Callable[[Exception | None], None]
    before_publishing: Callable[[], None] = lambda: None


class StagingQueue:
    """The changes of one model that are to be staged. From any thread; they are made ready on `STAGING`."""

    def __init__(self, runtime: Runtime, requests: SeedRequests) -> None:
        self._runtime = runtime
        self._requests = requests
        self._jobs = JobQueue(STAGING)
        self._begin()
        reset_after_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # guards the next two
        self._arrived = threading.Condition(self._lock)
        self._edits: deque[Edit] = deque()
        self._fetches: dict[SeedRequest, float | None] = {}  # when they began; None as long as they wait for a thread

    def after_fork(self) -> None:
        """Leave to the parent what its threads are at; see `esper.forking`."""
        self._begin()

    def fetch(self, request: SeedRequest, make: Callable[[], Edit | None]) -> None:
        """Have the edit staged that `make` returns, which may be slow or hang, and answers its request if it fails."""
        with self._lock:
            self._fetches[request] = None
        try:
            FETCHING.submit(lambda: self._make(request, make))
        except BaseException:
            self._fetched(request, None)
            raise

    def _make(self, request: SeedRequest, make: Callable[[], Edit | None]) -> None:
        edit = None
        with self._lock:
            self._fetches[request] = time.monotonic()
        try:
            edit = make()
        finally:
            self._fetched(request, edit)

    def _fetched(self, request: SeedRequest, edit: Edit | None) -> None:
        with self._lock:
            self._fetches.pop(request, None)
            if edit is not None:
                self._edits.append(edit)
            self._arrived.notify()
        if edit is not None:
            self._jobs.submit(self._work)

    def put(self, edit: Edit) -> None:
        """Have an edit staged."""
        with self._lock:
            self._edits.append(edit)
        self._jobs.submit(self._work)

    def later(self, job: Callable[[], object]) -> None:
        """Have `job` done between the edits."""
        self._jobs.submit(job)

    def publish_when_ready(self, request: SeedRequest, change: Change) -> bool:
        """Stage a change at once if every executor could follow it, else on the background thread. Lock held."""
        if self._runtime.ready(change.edit(self._runtime.target)):
            return self._runtime.publish(change)

        def failed(error: Exception | None) -> None:
            if error is not None:
                change.refused(error)

        self.put(Edit(request, change, failed))
        return True

    def _work(self) -> None:
        """Stage what has come, and what comes soon after, together."""
        with self._lock:
            end = time.monotonic() + _LONGEST_GATHERING
            while self._edits and (seconds := min(self._until_slow(), end - time.monotonic())) > 0:
                self._arrived.wait(seconds)
            edits = list(self._edits)
            self._edits.clear()
        self._stage(edits)

    def _until_slow(self) -> float:
        """Seconds until all fetches under way will have taken long; 0 if there are none."""
        now = time.monotonic()
        begun = [now if began is None else began for began in self._fetches.values()]
        return max(begun) + _SLOW_FETCH - now if begun else 0.0

    def _stage(self, edits: Sequence[Edit]) -> None:
        while edits := self._still_wanted(edits):
            base, executors, plan = self._runtime.target, self._runtime.executors_added, self._runtime.target
            for edit in edits:
                plan = edit.change.edit(plan)
            try:
                with self._requests.called_off([edit.request for edit in edits]) as called_off:
                    self._runtime.prepare(plan, called_off)
            except CalledOffError:
                continue
            except ShutDownError as error:
                _LOG.info("not staged: %s", error)
                for edit in edits:
                    edit.failed(None)
                return
            except Exception as error:  # noqa: BLE001  # law 4: whatever fails before the commit is kept as the seed's error
                if len(edits) > 1:  # it need not be the fault of all
                    for edit in edits:
                        self._stage([edit])
                else:
                    edits[0].failed(error)
                return

            if self._publish_prepared(edits, base, executors):
                return

    def _publish_prepared(self, edits: Sequence[Edit], base: Plan, executors: int) -> bool:
        """Stage what was prepared on top of `base`, unless that is not what would come into force any more."""

        def valid() -> bool:
            if base is not self._runtime.target or executors != self._runtime.executors_added:
                return False
            if not all(self._requests.wanted(edit.request) for edit in edits):
                return False
            for edit in edits:
                self._requests.end(edit.request)
                edit.before_publishing()
            return True

        published = self._runtime.publish(*(edit.change for edit in edits), valid=valid)
        if published:
            for edit in edits:
                edit.request.answer(True)
        return published

    def _still_wanted(self, edits: Sequence[Edit]) -> list[Edit]:
        wanted = [edit for edit in edits if self._requests.wanted(edit.request)]
        for edit in edits:
            if edit not in wanted:
                edit.failed(None)
        return wanted
