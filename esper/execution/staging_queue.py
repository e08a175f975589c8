"""Changes are made ready on a background thread and then staged; those that wait at the same time, together.

What is compiled for them is compiled once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.execution.background import BackgroundThread
from esper.execution.change import Change
from esper.execution.executor import CalledOffError, ShutDownError
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.seed_requests import SeedRequest, SeedRequests

__all__ = ["Edit", "StagingQueue"]

_LOG = logging.getLogger("esper.execution")


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
    """The changes of one model that are to be staged. :meth:`put` from any thread, the rest happens on `thread`."""

    def __init__(self, runtime: Runtime, requests: SeedRequests, thread: BackgroundThread) -> None:
        self._runtime = runtime
        self._requests = requests
        self._thread = thread
        self._queue: deque[Callable[[], Edit | None]] = deque()

    def put(self, make: Callable[[], Edit | None]) -> None:
        """Have the edit that `make` returns staged; `make` may be slow, and answers its request itself if it fails."""
        self._queue.append(make)
        self._thread.submit(self._work)

    def publish_when_ready(self, request: SeedRequest, change: Change) -> bool:
        """Stage a change at once if every executor could follow it, else on the background thread. Lock held."""
        if self._runtime.ready(change.edit(self._runtime.target)):
            return self._runtime.publish(change)

        def failed(error: Exception | None) -> None:
            if error is not None:
                change.refused(error)

        self.put(lambda: Edit(request, change, failed))
        return True

    def _work(self) -> None:
        """Take what waits in the queue, and what comes meanwhile, and stage it together."""
        edits: list[Edit] = []
        while self._queue:
            edit = self._queue.popleft()()
            if edit is not None:
                edits.append(edit)
        self._stage(edits)

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
                edit.request.staged.set_result(True)
        return published

    def _still_wanted(self, edits: Sequence[Edit]) -> list[Edit]:
        wanted = [edit for edit in edits if self._requests.wanted(edit.request)]
        for edit in edits:
            if edit not in wanted:
                edit.failed(None)
        return wanted
