"""How far a request for kernels is: its stages, and the future that tells of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from esper.futures import InterruptSafeFuture

__all__ = ["Course", "KernelRequest", "Progress", "Stage"]


class Stage(StrEnum):
    """What a request for kernels waits for, in order; the last three are final."""

    COMPILING_BLUEPRINTS = "compiling blueprints"
    WAITING = "waiting"
    """For a thread that fetches."""
    FETCHING = "fetching"
    FETCHED = "fetched"
    """And its turn to be made ready has not come."""
    COMPILING_VARIANTS = "compiling variants"
    AGREEING = "agreeing"
    """Other ranks have to be as far."""
    STAGED = "staged"
    """The next forward, or `commit()`, puts it in force; among ranks, the forward that they agreed on."""
    IN_FORCE = "in force"
    FAILED = "failed"
    CALLED_OFF = "called off"
    """Something else was asked of a seed meanwhile."""

    @property
    def is_final(self) -> bool:
        return self in (Stage.IN_FORCE, Stage.FAILED, Stage.CALLED_OFF)


_ORDER = {stage: number for number, stage in enumerate(Stage)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request was at the moment of asking; its `str` is one line."""

    stage: Stage
    """What has been in force stays so here, whatever becomes of it later."""
    layers: tuple[str, ...]
    """The names of all layers that are to have a kernel."""
    done: int
    """Of `total`, how many have this stage behind them; all of them, where it is final."""
    total: int
    """How many blueprints are compiled while they are, and else how many layers there are."""
    seconds: float
    """Since the request, until its end."""
    reason: str = ""
    """Why it has failed."""

    def __str__(self) -> str:
        count = len(self.layers)
        layers = f" for {count} layers" if count > 1 else f" for {self.layers[0]!r}" if count else ""
        parts = f" ({self.done} of {self.total})" if self.total > 1 and not self.stage.is_final else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.stage}{parts}{layers}, {self.seconds:.1f} s{why}"


class Course:
    """How far the load of one kernel is. Whoever carries the load on writes it, anyone reads it, without a lock."""

    __slots__ = ("_end", "_stage")

    def __init__(self) -> None:
        self._stage = Stage.WAITING
        self._end: tuple[Stage, float, str] | None = None

    @property
    def stage(self) -> Stage:
        """The latest."""
        return self._stage if self._end is None else self._end[0]

    @property
    def ended(self) -> float | None:
        """When it came to its end, by `time.monotonic`."""
        return None if self._end is None else self._end[1]

    @property
    def reason(self) -> str:
        """Why it has failed."""
        return "" if self._end is None else self._end[2]

    def enter(self, stage: Stage, reason: str = "") -> None:
        """The load is at `stage` from now on, unless it has come to its end."""
        if not stage.is_final:
            self._stage = stage
        elif self._end is None:
            self._end = stage, time.monotonic(), reason


class KernelRequest(InterruptSafeFuture[bool]):
    """A request for a kernel: whether it is staged, and how far it is."""

    def __init__(self, layers: Sequence[str], courses: Sequence[Course]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        """The names of the layers."""
        self._courses = tuple(courses)
        self._began = time.monotonic()
        self.set_running_or_notify_cancel()  # not to be cancelled from outside: unload_kernel() calls a load off

    def progress(self) -> Progress:
        """How far it is now. Waits for nothing, and may be asked from any thread, as often as one likes."""
        stages = [course.stage for course in self._courses]
        stage = _joint(stages)
        if stage is Stage.AGREEING and self.done():
            stage = Stage.STAGED
        done, total = self._counted(stage, stages)
        ends = [course.ended for course in self._courses]
        end = max((each for each in ends if each is not None), default=None) if stage.is_final else None
        seconds = (time.monotonic() if end is None else end) - self._began
        return Progress(stage, self.layers, done, total, seconds, self._reason() if stage is Stage.FAILED else "")

    def _counted(self, stage: Stage, stages: Sequence[Stage]) -> tuple[int, int]:
        """How many parts have `stage` behind them, and how many there are."""
        passed = sum(_ORDER[each] > _ORDER[stage] for each in stages)
        return len(stages) if stage.is_final else passed, len(stages)

    def _reason(self) -> str:
        return next((course.reason for course in self._courses if course.reason), "")


def _joint(stages: Sequence[Stage]) -> Stage:
    """That of several loads which come together: of the one that is furthest behind, or what ends all."""
    for end in (Stage.FAILED, Stage.CALLED_OFF):
        if end in stages:
            return end
    first = min(stages, key=_ORDER.__getitem__)
    has_begun = any(_ORDER[each] > _ORDER[Stage.WAITING] for each in stages)
    return Stage.FETCHING if first is Stage.WAITING and has_begun else first
