"""The plans of one model: the one in force, the one that is staged, and earlier ones that forwards still go on with."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

from esper.execution.plans.commit import Commit
from esper.execution.plans.handover import ForwardStarts
from esper.execution.plans.plan import DORMANT, Plan
from esper.execution.plans.plan_edit import PlanEdit

__all__ = ["StagedPlans"]

_KEPT_PLANS = 64  # of earlier versions, so that a thread that idles for long does not make the list grow


class StagedPlans:
    """Read by any thread; changed under the lock."""

    def __init__(self) -> None:
        self.version = 0
        """Of the plan in force: how many commits there have been."""
        self.starts = ForwardStarts()
        self.lock = threading.RLock()
        """For short, consistent changes of plan, seeds and requests; locks of the state and the cache come after it."""
        self._plan = DORMANT
        self._earlier: list[tuple[int, weakref.ref[Plan]]] = []  # plans that some forward may have begun with
        self._target = DORMANT
        self._staged: list[PlanEdit] = []
        self._commit: Commit | None = None  # the one under way, or cut short by an interrupt: then it is completed

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def following(self) -> Plan:
        """The plan that executors are to follow: that in force, or during a commit the one that it leads to."""
        commit = self._commit
        return self._plan if commit is None or commit.plan is None else commit.plan

    @property
    def upcoming(self) -> int:
        """The version of :attr:`following`."""
        commit = self._commit
        return self.version if commit is None or commit.plan is None else commit.version

    @property
    def begun_with(self) -> Plan:
        """The plan that this thread's forward goes on with: :attr:`following`, unless a commit has overtaken it."""
        with self.lock:
            start = self.starts.of_this_thread(self.upcoming)
            if start >= self.upcoming:
                return self.following
            if start >= self.version:
                return self._plan
            earlier = [plan for version, plan in self._earlier if version <= start]
            found = earlier[-1]() if earlier else None
            return self.following if found is None else found

    @property
    def target(self) -> Plan:
        """The plan that will be in force once everything staged is committed."""
        return self._target

    def _stage(self, edits: Iterable[PlanEdit]) -> None:
        for edit in edits:
            self._target = edit.edit(self._target)
            self._staged.append(edit)

    def _begin_commit(self, now: Callable[[PlanEdit], bool]) -> bool:
        with self.lock:
            edits = [edit for edit in self._staged if now(edit)]
            if edits:
                self._commit = Commit(edits, self.version + 1)
            return bool(edits)

    def _conclude(self, commit: Commit) -> None:
        """The commit is over: its plan is in force, unless it failed."""
        if commit.plan is not None and commit.edits:
            self._earlier = [each for each in self._earlier if each[1]() is not None][-_KEPT_PLANS:]
            self._earlier.append((self.version, weakref.ref(self._plan)))
            self._plan = commit.plan
            self.version = commit.version  # from here on forwards that consist of parts run the new plan
        self._staged = [edit for edit in self._staged if not commit.contains(edit)]
        self._target = self._edited(self._plan, self._staged)
        self._commit = None

    @staticmethod
    def _edited(plan: Plan, edits: Iterable[PlanEdit]) -> Plan:
        for edit in edits:
            plan = edit.edit(plan)
        return plan
