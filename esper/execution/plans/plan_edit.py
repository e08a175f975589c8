"""A change of the plan that waits for a commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper.execution.lifecycle import Transition
from esper.execution.plans.plan import Plan

__all__ = ["Change"]


@dataclass(frozen=True, slots=True)
class Change:
    """One staged change: `edit` makes the new plan, `applied` records it in the state once it is in force.

    `applied` runs at the commit, under the runtime's lock: it must neither wait nor raise, nor call the user's code.
    `first`, if there is one, is what has to be done to the model's tensors, at the commit and before anything else.
    What it raises ends this change, without effect, and goes to `refused`. A commit where a forward begins leaves a
    change staged for which `safe` is not true; it is asked there each time.
    """

    edit: Callable[[Plan], Plan]
    applied: Callable[[], Transition | None]
    first: Callable[[], None] | None = None
    safe: Callable[[], bool] = lambda: True
    refused: Callable[[Exception], None] = lambda _: None
