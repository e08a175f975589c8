"""A commit under way, and what is left to do of it: one that an interrupt cuts short is completed and not undone."""

from __future__ import annotations

from collections.abc import Sequence

from esper.execution.lifecycle import Transition
from esper.execution.plans.plan import Plan
from esper.execution.plans.plan_edit import Change

__all__ = ["Commit"]


class Commit:
    """Staged `changes` on their way into force; those whose `first` fails fall out.

    For the thread that carries the commit out. Each method may be called again after an interrupt.
    """

    def __init__(self, changes: Sequence[Change], version: int) -> None:
        self.changes = list(changes)
        self.version = version
        """That of the plan, once it is in force."""
        self.plan: Plan | None = None
        """What the changes lead to, once that is known."""
        self.at: Change | None = None
        """The change that something is being done for."""
        self._staged = tuple(changes)
        self._ready = 0
        self._results: list[Transition | None] = []

    @property
    def has_first(self) -> bool:
        """Whether something has to be done to the model's tensors, which may take a while."""
        return any(change.first is not None for change in self._staged)

    @property
    def transitions(self) -> list[Transition]:
        """What has changed, layer by layer, each seed's changes in their order."""
        changed = [result for result in self._results if result is not None]
        return sorted(changed, key=lambda transition: (transition.layer_id, transition.seed))

    def contains(self, change: Change) -> bool:
        """Whether `change` ends with this commit, in force or not."""
        return any(each is change for each in self._staged)

    def do_first(self) -> None:
        """Do what changes want done to the model's tensors. One that fails is told so, and does not come into force."""
        while self._ready < len(self.changes):
            change = self.at = self.changes[self._ready]
            try:
                if change.first is not None:
                    change.first()
            except Exception as error:  # noqa: BLE001  # law 4: a change that fails must not fail the forward
                change.refused(error)
                self.changes = [each for each in self.changes if each is not change]
            else:
                self._ready += 1

    def apply(self) -> None:
        """Record the changes in the state of their seeds."""
        for change in self.changes[len(self._results) :]:
            self.at = change
            self._results.append(change.applied())
