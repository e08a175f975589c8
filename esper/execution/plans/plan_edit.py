"""An edit of the plan: from when it is staged until it is in force, or has failed."""

from __future__ import annotations

from esper.execution.lifecycle import Transition
from esper.execution.plans.plan import Plan

__all__ = ["PlanEdit"]


class PlanEdit:
    """One edit. The methods stand in the order in which they are called."""

    is_held = False
    """Whether other ranks have still to agree, see `esper.execution.plans.gate`: it stays staged."""
    writes_tensors = False
    """Whether something has to be done to the model's tensors, which may take a while."""

    def edit(self, plan: Plan) -> Plan:
        """The plan that `plan` becomes; pure, asked for at any time."""
        raise NotImplementedError

    def is_safe(self) -> bool:
        """Whether it may come into force where a forward begins; else it stays staged, and is asked at the next one."""
        return True

    def write_tensors(self) -> None:
        """At the commit, before anything else. What it raises ends this edit, without effect, and goes to `fail`."""

    def apply(self) -> Transition | None:
        """Record it in the state, once it is in force.

        At the commit, under the runtime's lock: it must neither wait nor raise, nor call the user's code, and may be
        called again after an interrupt.
        """

    def fail(self, error: Exception | None) -> None:
        """Instead of :meth:`apply`; `error` is None if nobody wants it any more, or the process ends."""
