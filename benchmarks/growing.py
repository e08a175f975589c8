"""What the benchmarks of growth share: arms over seeds, means with intervals, goals, FLOPs, and a way to load kernels.

FLOPs are counted by formula, two a multiplication with its addition, of the products alone: forward, backward to every
weight that learns and to every input that something before it learns from, and what a probe and a selection add.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

import esper
from benchmarks.harness import Section

__all__ = ["Arm", "Goal", "constant", "decayed", "goal_section", "interval", "load", "probe_flops", "shown", "steps_of"]

LEVEL = 0.95
PROPOSALS = 512
"""`esper.growth.selected`'s own default."""


@dataclass
class Arm:
    """One way to train, over seeds: what it ended at, what it computed and how long it took."""

    name: str
    figures: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)
    """Further figures, one a seed."""

    def add(self, figure: float, flops: float, seconds: float, **more: float) -> None:
        """One more seed."""
        self.figures.append(figure)
        self.flops.append(flops)
        self.seconds.append(seconds)
        for name, value in more.items():
            self.more.setdefault(name, []).append(value)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.figures)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t; infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    quantile = float(student.ppf((1 + LEVEL) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], places: int = 3) -> str:
    """The mean with its interval, as a cell of a table."""
    mean, half = interval(values)
    return f"{mean:.{places}f}" + (f" ± {half:.{places}f}" if math.isfinite(half) else "")


@dataclass(frozen=True)
class Goal:
    """`ours` is to be at most `factor` times `theirs`, or at least if `more` is better, in the mean over seeds.

    Seeds are compared in pairs: the interval is that of `ours - factor * theirs`.
    """

    what: str
    ours: Sequence[float]
    theirs: Sequence[float]
    factor: float
    more: bool = False

    @property
    def ratio(self) -> float:
        return statistics.fmean(self.ours) / statistics.fmean(self.theirs)

    @property
    def verdict(self) -> str:
        """Met or missed, and whether the interval leaves that open."""
        sign = -1.0 if self.more else 1.0
        mean, half = interval([sign * (a - self.factor * b) for a, b in zip(self.ours, self.theirs, strict=True)])
        word = "met" if mean <= 0 else "missed"
        return word if abs(mean) > half or half == mean == 0 else f"{word}, within the interval"

    def row(self) -> tuple[Any, ...]:
        """For :func:`goal_section`."""
        return self.what, f"{self.ratio:.3f}", f"{'at least' if self.more else 'at most'} {self.factor:g}", self.verdict


def goal_section(goals: Iterable[Goal]) -> Section:
    """What was to be shown, and whether it was."""
    return Section("Goals", ("ratio of means", "measured", "goal", "verdict"), [goal.row() for goal in goals])


def constant(_: float) -> float:
    """A learning rate that stays, as a factor over a run's progress from 0 to 1."""
    return 1.0


def decayed(progress: float) -> float:
    """A learning rate that ends at zero: constant for a half, then falling linearly."""
    return min(1.0, 2.0 * (1.0 - progress))


def load(
    model: esper.MorphableModel, layer: str, seed: int, blueprint: esper.Blueprint, platform: esper.Platform
) -> float:
    """Compile a kernel, put it in force, and return the seconds that it took."""
    start = time.perf_counter()
    kernel = platform.compile_sync(blueprint)
    if not model.request_kernel(layer, seed, kernel.id, trainable=True).result():
        raise esper.EsperError(model.kasmina_layers[layer].seed_errors[seed])
    model.commit()
    return time.perf_counter() - start


def probe_flops(rows: int, inputs: int, outputs: int, chosen: int, proposals: int = PROPOSALS) -> float:
    """Of the statistics of one site, and of a selection of `chosen` hidden units (0: of none) from a sample of them."""
    sample = min(rows, 4096)
    moments = 2.0 * rows * ((inputs + 1) ** 2 + outputs**2 + outputs * (inputs + 1))
    if not chosen:
        return moments
    candidates = 2.0 * sample * (inputs * proposals + outputs * (inputs + outputs))
    each = 2.0 * sample * proposals * (outputs + 3)
    solved = 20.0 * (inputs**3 + outputs**3)
    return moments + candidates + chosen * each + solved


def steps_of(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    count: int,
    schedule: Callable[[float], float] = constant,
    seen: list[float] | None = None,
) -> None:
    """`count` steps at the optimizer's rates times `schedule`; the losses are added to `seen`."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(count):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / count)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        if seen is not None:
            seen.append(float(value.detach()))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
