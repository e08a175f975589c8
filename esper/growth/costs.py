"""What a `Grower` is told and what it takes: losses, read without waiting for a device at each step, and FLOPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from esper.errors import shown
from esper.growth.errors import GrowthError

__all__ = ["Costs", "Losses"]

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
