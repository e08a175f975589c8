"""What a `Grower` is told and what it takes: losses, read without waiting for a device at each step, time and FLOPs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from esper.errors import shown
from esper.growth.errors import GrowthError

__all__ = ["NOTICEABLE", "Clock", "Costs", "Losses"]

NOTICEABLE = 1.0
"""Seconds of waiting that are told."""
_TOGETHER = 64


@dataclass
class Losses:
    """Losses of steps that were told and are not looked at yet: those on a device are read many together."""

    waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor | float, *, now: bool) -> list[tuple[int, float]]:
        """The losses known since the last call, with their steps; all of them, if they are wanted `now`.

        Raises :class:`GrowthError` for what is no loss.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise GrowthError(f"a loss is one number, not a tensor of shape {list(loss.shape)}")
            if loss.device.type != "cpu":
                self.waiting.append((step, loss.detach().reshape(())))
                return self.read() if now or len(self.waiting) >= _TOGETHER else []
            loss = float(loss.detach())
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise GrowthError(f"a loss is a tensor or a number, not {shown(loss)}")
        return [*self.read(), (step, float(loss))]

    def read(self) -> list[tuple[int, float]]:
        """Those that were waiting."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return []
        values = torch.stack([loss.float() for _, loss in waiting]).tolist()
        return [(step, value) for (step, _), value in zip(waiting, values, strict=True)]


@dataclass
class Costs:
    """FLOPs: of probes, scores and trials in vain so far, and of training.

    A step of training is taken to cost what forward and backward of a probe's first batch did last, or what was said.
    """

    extra: int = 0
    step: float | None = None
    is_said: bool = False
    before: float = 0.0
    """Those of the steps until `since`."""
    since: int = 0

    def note_step(self, flops: float, at: int) -> None:
        """From the step `at` on, one takes so many."""
        if not self.is_said:
            self.before += (at - self.since) * (flops if self.step is None else self.step)
            self.step, self.since = flops, at

    def share(self, at: int) -> float | None:
        """Those of probes, scores and trials in vain as a share of all until the step `at`."""
        if self.step is None:
            return None
        whole = self.extra + self.before + max(at - self.since, 0) * self.step
        return self.extra / whole if whole else 0.0

    def state(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


class Clock:
    """For how long a grower holds up the thread that trains, and waits there; read by any."""

    def __init__(self, held: float = 0.0, waited: float = 0.0) -> None:
        self._held, self._waited = float(held), float(waited)
        self._began: float | None = None
        self._waits_since: float | None = None
        self.is_told = False
        """Whether a user was told of a wait."""

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """This block holds it up."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._held, self._began = self._held + time.perf_counter() - self._began, None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """This block does nothing but wait, if it has to."""
        self._waits_since = began = time.perf_counter()
        try:
            yield
        finally:
            self._waited, self._waits_since = self._waited + time.perf_counter() - began, None

    def lap(self) -> float:
        """Seconds of holding up since the last lap."""
        held, self._held = self._held, 0.0
        if self._began is not None:
            now = time.perf_counter()
            held, self._began = held + now - self._began, now
        return held

    @property
    def waited(self) -> float:
        """Seconds of waiting in all."""
        since = self._waits_since
        return self._waited + (0.0 if since is None else time.perf_counter() - since)

    @property
    def is_waiting(self) -> bool:
        return self._waits_since is not None

    def state(self) -> dict[str, float]:
        """As data."""
        return {"held": self._held, "waited": self._waited}
