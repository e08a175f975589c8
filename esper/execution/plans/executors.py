"""The executors of one model, which follow its plan, and the hooks by which they tell where a forward begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from torch import nn

from esper.execution import background
from esper.execution.plans.entries import Entries
from esper.execution.plans.executor import Executor, Preparation, PreparationCancelledError
from esper.execution.plans.plan import Plan
from esper.execution.plans.staged_plans import StagedPlans

__all__ = ["PlanExecutors"]


class PlanExecutors(StagedPlans):
    """Plans and those who follow them. `modules` are the model's."""

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        super().__init__()
        self.entries = Entries(modules)
        self.has_entry_hooks = True
        """Whether something is to be done where a forward begins: whoever is entered has to call `Runtime.enter`."""
        self.executors_added = 0
        """How many executors there have been."""
        self._executors: weakref.WeakSet[Executor] = weakref.WeakSet()
        self._renewed: weakref.WeakSet[Executor] = weakref.WeakSet()

    def add_executor(self, executor: Executor) -> None:
        """Have `executor` follow this runtime's plan for as long as it lives."""
        with self.lock:
            self._executors.add(executor)
            self.executors_added += 1
            if self._needs_entry_hooks():
                executor.install_entry_hook()

    def executors(self) -> list[Any]:
        """Those alive now."""
        with self.lock:
            return list(self._executors)

    def ready(self, plan: Plan) -> bool:
        """Whether every executor could follow `plan` at once."""
        return all(executor.ready(plan, self) for executor in self.executors())

    def prepare(self, plan: Plan, cancelled: Future[None] | None = None) -> None:
        """Have every executor make ready for `plan`. On a background thread; raises what they raise.

        Raises :class:`PreparationCancelledError` as soon as `cancelled` is done.
        """
        preparations: list[Preparation] = []
        try:
            for executor in self.executors():
                preparation = executor.prepare(plan, self)
                if preparation is not None:
                    preparations.append(preparation)
            while preparations:
                futures = [preparations[0].future, *([cancelled] if cancelled else [])]
                with background.waiting():
                    wait(futures, return_when=FIRST_COMPLETED)
                if cancelled is not None and cancelled.done():
                    raise PreparationCancelledError("the kernel is not wanted any more")
                preparations.pop(0).finish()
        finally:
            for preparation in preparations:
                preparation.abandon()

    def renew(self, executor: Executor) -> None:
        """Have `executor` follow the plan anew where the next forward begins, whatever the commit mode.

        For an executor that has something better for the same plan. On any thread.
        """
        with self.lock:
            self._renewed.add(executor)
            self._install_entry_hooks()

    def refresh(self) -> None:
        """Have every executor follow the plan anew: its tensors have moved."""
        with self.lock:
            for executor in list(self._executors):
                executor.follow(self.following)

    def _follow_renewed(self) -> None:
        with self.lock:
            for executor in list(self._renewed):
                executor.follow(self.following)
                self._renewed.discard(executor)

    def _needs_entry_hooks(self) -> bool:
        raise NotImplementedError

    def _install_entry_hooks(self) -> None:
        self.entries.prepare()
        self.has_entry_hooks = True
        for executor in self._executors:
            executor.install_entry_hook()
        self.entries.watch()

    def _remove_entry_hooks_if_settled(self) -> None:
        with self.lock:
            if not self._needs_entry_hooks():
                self.entries.forget()
                self.has_entry_hooks = False
                for executor in self._executors:
                    executor.remove_entry_hook()
