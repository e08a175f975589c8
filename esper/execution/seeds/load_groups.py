"""Loads into several seeds that come into force together, or not at all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.operations import Load
from esper.execution.seeds.progress import Course, KernelRequest, Stage
from esper.execution.seeds.seed import Operation

__all__ = ["GroupedLoad", "KernelsRequest", "LoadGroup"]

_LOG = logging.getLogger("esper.execution")
_SUPERSEDED = "something else was asked of its seed meanwhile"


class KernelsRequest(KernelRequest):
    """A request for kernels of several layers: whether all of them are staged, and if not, why; and how far it is."""

    def __init__(self, layers: Sequence[str], courses: Sequence[Course]) -> None:
        super().__init__(layers, courses)
        self._errors: dict[str, str] = {}
        self._blueprints = (0, 0)

    @property
    def errors(self) -> Mapping[str, str]:
        """Why the layers whose fault it was have no kernel, by their names; empty as long as nothing has failed."""
        return MappingProxyType(self._errors)

    def note_error(self, layer: str, reason: str) -> None:
        """`layer` cannot have its kernel."""
        self._errors.setdefault(layer, reason)

    def note_blueprints(self, compiled: int, total: int) -> None:
        """Of `total` different blueprints, so many are compiled."""
        self._blueprints = compiled, total

    def _counted(self, stage: Stage, stages: Sequence[Stage]) -> tuple[int, int]:
        return self._blueprints if stage is Stage.COMPILING_BLUEPRINTS else super()._counted(stage, stages)

    def _reason(self) -> str:
        return "; ".join(f"{layer!r}: {reason}" for layer, reason in list(self._errors.items())) or super()._reason()


class GroupedLoad(Load):
    """A load of a group, which has it staged with the others."""

    group: LoadGroup

    def fetch(self) -> bool:
        fetched = False
        try:
            fetched = super().fetch()
        finally:
            self.group.note(self, fetched=fetched)
        return False  # the queue waits for the group

    def write_tensors(self) -> None:
        self.group.admit(self._runtime)

    def fail(self, error: Exception | None) -> None:
        if not self.is_wanted and not self.group.is_broken:
            self.group.request.note_error(self.seed.layer_name, _SUPERSEDED)
        super().fail(error)

    def refer_to(self, artifact_id: str) -> None:
        """Before it is fetched: its kernel has been compiled."""
        self._options = replace(self._options, reference=artifact_id)
        self.note(Stage.WAITING)

    def give_up(self, error: Exception | None = None) -> None:
        """Before it was fetched: leave the seed as it was, or with `error` in `ERROR_RECOVERY`."""
        self._end(error)
        with self._runtime.lock:
            if self.is_wanted:
                self.seed.take_ticket()

    def speaks_for_its_change(self) -> bool:
        return self.group.is_first_to_end()

    def _end(self, error: Exception | None) -> None:
        if error is not None and self.is_wanted:
            self.group.request.note_error(self.seed.layer_name, f"{type(error).__name__}: {error}")
        super()._end(error)


class LoadGroup:
    """`loads` into seeds of one model, fetched side by side; `stage` takes them once all are. On threads that fetch."""

    def __init__(self, loads: Sequence[GroupedLoad], stage: Callable[[Sequence[Operation]], None]) -> None:
        self.loads = tuple(loads)
        self.request = KernelsRequest([load.seed.layer_name for load in loads], [load.course for load in loads])
        self._stage = stage
        self._lock = threading.Lock()
        self._fetched: list[GroupedLoad] = []
        self.is_broken = False
        """Whether one of them cannot be fetched, for which the others have been given up."""
        self._has_spoken = False
        self._open = len(self.loads)
        self._admission: Exception | bool = False
        for load in self.loads:
            load.group = self
            load.staged.add_done_callback(self._answered)

    def expect(self) -> None:
        """Before anything is fetched: say what will be."""
        if self.loads:
            self.loads[0].seed.kernel_cache.expect([load.reference for load in self.loads])

    def is_first_to_end(self) -> bool:
        """Whether nothing was said yet of why the group comes to nothing, which the caller says then."""
        with self._lock:
            before, self._has_spoken = self._has_spoken, True
        return not before

    def note(self, load: GroupedLoad, *, fetched: bool) -> None:
        """The fetch of `load` has ended."""
        with self._lock:
            broken, is_whole = self.is_broken, False
            if fetched and not broken:
                self._fetched.append(load)
                is_whole = len(self._fetched) == len(self.loads)
        if not fetched:
            self._break(load)
        elif broken:
            load.fail(None)
        elif is_whole:
            self._stage(self.loads)  # and from now on the queue ends them, all or none

    def _break(self, broken: GroupedLoad) -> None:
        """`broken` cannot come into force, so the others do not either."""
        with self._lock:
            if self.is_broken:
                return
            self.is_broken, fetched = True, self._fetched
        if not broken.is_wanted:
            self.request.note_error(broken.seed.layer_name, _SUPERSEDED)
        for load in self.loads:
            if load in fetched:
                load.fail(None)
            elif load is not broken:
                load.give_up()

    def refuse(self, failed: Mapping[GroupedLoad, Exception]) -> None:
        """Before anything was fetched: some loads have failed, so nothing is."""
        with self._lock:
            self.is_broken = True
        for load, error in failed.items():
            load.give_up(error)
        for load in self.loads:
            if load not in failed:
                load.give_up()

    def admit(self, runtime: Runtime) -> None:
        """At the commit: have what must hold the parameters hold all of them. Raises for all what it does for one."""
        if self._admission is False:
            try:
                runtime.model.admit_kernels([load.at_site for load in self.loads])
                self._admission = True
            except Exception as error:  # noqa: BLE001  # kept for the others
                self._admission = error
        if isinstance(self._admission, Exception):
            raise self._admission

    def _answered(self, staged: Future[Any]) -> None:
        del staged
        with self._lock:
            self._open -= 1
            if self._open:
                return
        succeeded = all(load.staged.result() for load in self.loads)
        if not succeeded and self.request.errors and len(self.loads) > 1:  # of one its own load has said why
            reasons = "; ".join(f"{layer!r}: {reason}" for layer, reason in self.request.errors.items())
            _LOG.warning("none of the kernels for %d layers was loaded: %s", len(self.loads), reasons)
        self.request.set_result(succeeded)
