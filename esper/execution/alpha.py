"""How a seed's alpha moves over training steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from esper.execution.state_layout import AlphaError, checked_alpha

__all__ = ["AlphaSchedule", "CosineRamp", "LinearRamp"]

AlphaSchedule = Callable[[int], float]
"""`step -> alpha`: `step` counts the training forwards since the schedule was set, from 0; the result is in [0, 1].

A schedule with an attribute `steps` ends there: it is asked for `schedule(steps)` last and then forgotten.
"""


@dataclass(frozen=True, slots=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        checked_alpha(self.start)
        checked_alpha(self.end)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise AlphaError(f"a ramp takes a whole number of steps, at least 1, not {self.steps!r}")

    def _fraction(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class LinearRamp(_Ramp):
    """Alpha from `start` to `end` in equal parts over `steps` training forwards."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._fraction(step)


@dataclass(frozen=True, slots=True)
class CosineRamp(_Ramp):
    """Alpha from `start` to `end` along half a cosine: slow at both ends."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * (1.0 - math.cos(math.pi * self._fraction(step))) / 2.0
