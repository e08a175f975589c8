"""Statistics of a trace of step times: medians by phase, the worst step, and the time that stalls cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PHASES", "StepTrace", "lost_seconds"]

PHASES = ("before", "preparing", "with the kernel", "after", "control")

_FEWEST = 20  # steps that have a median of their own


def lost_seconds(durations: Sequence[float], ordinary: float) -> float:
    """The time that steps took beyond the `ordinary` one; a step that is faster does not make up for a slow one."""
    return sum(max(0.0, duration - ordinary) for duration in durations)


@dataclass(frozen=True)
class StepTrace:
    """Seconds of consecutive steps. Whatever the loop does between two steps belongs to the second.

    The other fields are indices of steps, and begin the phases after the first: `requested` the step at whose start a
    kernel was asked for, `in_force` the first one with it, `unloaded` the one at whose start it was given up, and
    `ended` the first of the control, in which nothing is asked for.
    """

    durations: Sequence[float]
    requested: int
    in_force: int
    unloaded: int
    ended: int

    def __post_init__(self) -> None:
        bounds = (0, self.requested, self.in_force, self.unloaded, self.ended, len(self.durations))
        if list(bounds) != sorted(bounds) or self.requested < 1 or self.in_force >= self.unloaded:
            raise ValueError(f"phases begin at {bounds}; they follow each other, and no step is without a phase")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepTrace:
        """From :meth:`to_json`."""
        durations = [microseconds / 1e6 for microseconds in values["microseconds"]]
        return cls(durations, *(values[name] for name in ("requested", "in_force", "unloaded", "ended")))

    def to_json(self) -> dict[str, Any]:
        """Durations as whole microseconds."""
        indices = {name: getattr(self, name) for name in ("requested", "in_force", "unloaded", "ended")}
        return {"microseconds": [round(duration * 1e6) for duration in self.durations], **indices}

    def without_control(self) -> StepTrace:
        """The trace up to its control."""
        return StepTrace(self.durations[: self.ended], self.requested, self.in_force, self.unloaded, self.ended)

    def phase(self, name: str) -> Sequence[float]:
        """The durations of one of :data:`PHASES`; only "preparing" and the last two can be empty."""
        bounds = (0, self.requested, self.in_force, self.unloaded, self.ended, len(self.durations))
        start = PHASES.index(name)
        return self.durations[bounds[start] : bounds[start + 1]]

    def median(self, name: str) -> float:
        """The median step of a phase; of a phase with fewer than 20 steps that of "before"."""
        steps = self.phase(name)
        return statistics.median(steps if len(steps) >= _FEWEST else self.phase("before"))

    @property
    def worst(self) -> float:
        """The longest step from the request to the end of "after"."""
        return max(self.durations[self.requested : self.ended])

    @property
    def lost(self) -> float:
        """Seconds that steps took beyond the median of their phase, from the request to the end of "after"."""
        names = ("preparing", "with the kernel", "after")
        return sum(lost_seconds(self.phase(name), self.median(name)) for name in names)

    @property
    def slowed(self) -> float:
        """Seconds by which the steps of "preparing" took longer because their median is higher than before."""
        return max(0.0, self.median("preparing") - self.median("before")) * len(self.phase("preparing"))

    @property
    def request_to_active(self) -> float:
        """Seconds from the request to the end of the first step with the kernel."""
        return sum(self.durations[self.requested : self.in_force + 1])

    @property
    def control_worst(self) -> float:
        """The longest step of the control."""
        return max(self.phase("control"))

    @property
    def control_lost(self) -> float:
        """As :attr:`lost`, of the control: what this machine does by itself."""
        return lost_seconds(self.phase("control"), self.median("control"))
