"""Alpha schedules: the course of a seed's alpha over training steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper.execution.state_layout import AlphaError, checked_alpha

__all__ = ["AlphaSchedule", "CosineRamp", "LinearRamp", "SavedRamp", "Schedule", "described_alpha"]

AlphaSchedule = Callable[[int], float]
"""`step -> alpha`: `step` counts the model's steps since its first training forward on the schedule, from 0; the result
is in [0, 1].

Steps are those of the optimizers of `torch.optim` that hold parameters of the model; alpha moves at the first training
forward after one. Without any, each training forward is a step. Where several steps were taken between two training
forwards, `step` goes on by as many.

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
    """Alpha from `start` to `end` in equal parts over `steps` steps of the model's optimizer."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._fraction(step)


@dataclass(frozen=True, slots=True)
class CosineRamp(_Ramp):
    """Alpha from `start` to `end` along half a cosine over `steps` steps, slow at both ends."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * (1.0 - math.cos(math.pi * self._fraction(step))) / 2.0


@dataclass(slots=True)
class Schedule:
    """An alpha that moves: at the next training forward it becomes `alpha(step)`."""

    alpha: AlphaSchedule
    step: int = 0


_RAMPS: dict[str, type[LinearRamp] | type[CosineRamp]] = {"linear": LinearRamp, "cosine": CosineRamp}


class SavedRamp(BaseModel):
    """A ramp as data, and the step at which it is; what a checkpoint or a pickle keeps of a schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)
    steps: int = Field(ge=1, le=2**62)
    step: int = Field(ge=0, le=2**62)

    @classmethod
    def of(cls, schedule: Schedule | None) -> SavedRamp | None:
        """`schedule` as data; None for code, which is not saved."""
        alpha: Any = schedule and schedule.alpha
        kind = next((kind for kind, ramp in _RAMPS.items() if type(alpha) is ramp), None)
        if schedule is None or kind is None:
            return None
        values = {"start": float(alpha.start), "end": float(alpha.end), "steps": alpha.steps, "step": schedule.step}
        return cls.model_validate({"kind": kind, **values})

    def schedule(self) -> Schedule:
        """The schedule, where it was."""
        return Schedule(_RAMPS[self.kind](self.start, self.end, self.steps), self.step)


def described_alpha(alpha: float | AlphaSchedule) -> str:
    """An alpha, or what moves it, in words that are the same in every process: of code its name."""
    if not callable(alpha):
        return f"{float(alpha):g}"
    ramp = SavedRamp.of(Schedule(alpha))
    name = getattr(alpha, "__qualname__", type(alpha).__qualname__)
    return name if ramp is None else f"{ramp.kind} ramp {ramp.start:g} to {ramp.end:g} in {ramp.steps}"
