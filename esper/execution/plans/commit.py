"""A commit under way, and what is left to do of it: one that an interrupt cuts short is completed and not undone."""

from __future__ import annotations

from collections.abc import Sequence

from esper.execution.lifecycle import Transition
from esper.execution.plans.plan import Plan
from esper.execution.plans.plan_edit import PlanEdit

__all__ = ["Commit"]


class Commit:
    """Staged `edits` on their way into force; those that fail to write the model's tensors fall out.

    For the thread that carries the commit out. Each method may be called again after an interrupt.
    """

    def __init__(self, edits: Sequence[PlanEdit], version: int) -> None:
        self.edits = list(edits)
        self.version = version
        """That of the plan, once it is in force."""
        self.plan: Plan | None = None
        """What the edits lead to, once that is known."""
        self._staged = tuple(edits)
        self._ready = 0
        self._results: list[Transition | None] = []

    @property
    def writes_tensors(self) -> bool:
        """Whether something has to be done to the model's tensors, which may take a while."""
        return any(edit.writes_tensors for edit in self._staged)

    @property
    def transitions(self) -> list[Transition]:
        """What has changed, layer by layer, each seed's changes in their order."""
        changed = [result for result in self._results if result is not None]
        return sorted(changed, key=lambda transition: (transition.layer_id, transition.seed))

    def contains(self, edit: PlanEdit) -> bool:
        """Whether `edit` ends with this commit, in force or not."""
        return any(each is edit for each in self._staged)

    def write_tensors(self) -> None:
        """Do what edits want done to the model's tensors. One that fails is told so, and does not come into force."""
        while self._ready < len(self.edits):
            edit = self.edits[self._ready]
            try:
                edit.write_tensors()
            except Exception as error:  # noqa: BLE001  # law 4: an edit that fails must not fail the forward
                edit.fail(error)
                self.edits = [each for each in self.edits if each is not edit]
            else:
                self._ready += 1

    def apply(self) -> None:
        """Record the edits in the state of their seeds."""
        for edit in self.edits[len(self._results) :]:
            self._results.append(edit.apply())
