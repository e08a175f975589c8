"""The protocol of executors: what runs a model follows its plan, and may have to be made ready for one."""

from __future__ import annotations

from concurrent.futures import Future
from contextvars import Context
from typing import Any, Protocol

from esper.errors import EsperError
from esper.execution.plans.plan import Plan

__all__ = ["Executor", "PlanOwner", "Preparation", "PreparationCancelledError", "ShutDownError"]


class PreparationCancelledError(EsperError):
    """A preparation was given up, since nobody wants its plan any more."""


class ShutDownError(EsperError):
    """A preparation has no end, since the process ends, or what it needs was closed for good."""


class Preparation(Protocol):
    """Work that another process does for an executor, and that a background thread waits for."""

    @property
    def future(self) -> Future[Any]:
        """Done when :meth:`finish` need not wait."""
        ...

    def finish(self) -> None:
        """Make the executor ready; raises what kept it from being."""

    def abandon(self) -> None:
        """Instead of :meth:`finish`: nobody waits any more."""


class PlanOwner(Protocol):
    """A runtime, as executors know it: they tell by it whose plan is spoken of."""

    settings: Context
    """The settings of torch's compilers under which to compile."""


class Executor(Protocol):
    """Something that executes (a part of) the model and is specialised for a plan."""

    def ready(self, plan: Plan, runtime: PlanOwner) -> bool:
        """Whether following `plan`, as that of `runtime`, needs no preparation. On any thread."""
        ...

    def prepare(self, plan: Plan, runtime: PlanOwner) -> Preparation | None:
        """Make ready to follow `plan`, or begin to. On a background thread; may be slow, may raise."""

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`. On the thread that runs the model, at a commit; a pointer change, must not raise."""

    def install_entry_hook(self) -> None:
        """From now on, call :meth:`Runtime.on_forward_start` where a forward begins. On any thread."""

    def remove_entry_hook(self) -> None:
        """Stop calling it."""
