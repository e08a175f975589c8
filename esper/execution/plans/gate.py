"""The protocol of gates: where a model changes together with others, they say when a staged change may come into force.

What is behind a gate is held (`PlanEdit.is_held`) until it is due, and nothing else of a model knows of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = ["Gate"]


class Gate(Protocol):
    """What stands between the staged changes of one model and its plan."""

    @property
    def is_leading(self) -> bool:
        """Whether what this thread asks is asked of the others too."""
        ...

    def begin(self) -> None:
        """A training forward begins, or with `commit="manual"` a commit: let go of what is due. On its thread."""

    def number(self, targets: Sequence[str]) -> str:
        """A name for the next thing that is asked of `targets` together. From any thread, under the runtime's lock."""
        ...

    def offer(self, change: str, what: str, *operations: Any) -> None:
        """This rank is ready for a change, in which `operations` come into force together; it may have none to do.

        From any thread.
        """

    def refuse(self, change: str, what: str, reason: str) -> None:
        """This rank cannot have a change. From any thread."""

    def lead(self, request: Callable[[], dict[str, Any]]) -> None:
        """Something is asked here: have it asked of the others too, if this thread leads them."""

    def restart(self) -> None:
        """The plan was replaced as a whole, here as on all ranks: what is not decided is not wanted any more."""
