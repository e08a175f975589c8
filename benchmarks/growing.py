"""What the benchmarks of growth share: arms over seeds, means with intervals, goals, FLOPs, and a way to load kernels.

FLOPs are counted by formula, two a multiplication with its addition, of the products alone: forward, backward to every
weight that learns and to every input that something before it learns from, and what a probe and a selection add.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

import esper
from benchmarks.harness import Section

__all__ = [
    "Arm", "Pair", "comparison_section", "constant", "decayed", "goal_section", "interval", "load", "probe_flops",
    "shown", "steps_of",
]  # fmt: skip

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
class Pair:
    """Figures of two arms on the same seeds, of which less is better, or more."""

    what: str
    ours: Sequence[float]
    theirs: Sequence[float]
    more: bool = False

    @property
    def ratio(self) -> float:
        """Of the means."""
        return statistics.fmean(self.ours) / statistics.fmean(self.theirs)

    def lag(self, factor: float = 1.0) -> tuple[float, float]:
        """By how much ours is worse than `factor` times theirs, seed by seed, with its interval."""
        sign = -1.0 if self.more else 1.0
        return interval([sign * (a - factor * b) for a, b in zip(self.ours, self.theirs, strict=True)])

    def goal(self, factor: float) -> tuple[Any, ...]:
        """A row on ours being at most `factor` times theirs, or at least: whether it is, and whether that is sure."""
        mean, half = self.lag(factor)
        verdict = "met" if mean <= 0 else "missed"
        if abs(mean) <= half and half > 0:
            verdict += ", within the interval"
        return self.what, f"{self.ratio:.3f}", f"{'at least' if self.more else 'at most'} {factor:g}", verdict

    def comparison(self) -> tuple[Any, ...]:
        """A row on which of them is better; a tie if the interval leaves that open."""
        mean, half = self.lag()
        return self.what, f"{self.ratio:.3f}", "a tie" if abs(mean) <= half else "better" if mean < 0 else "worse"


def goal_section(rows: Iterable[tuple[Any, ...]]) -> Section:
    """What was to be shown, and whether it was."""
    return Section("Goals, as ratios of means", ("goal", "measured", "wanted", "verdict"), list(rows))


def comparison_section(pairs: Iterable[Pair]) -> Section:
    """How arms compare for which there is no goal."""
    columns = ("the first of the two is", "ratio of means", "verdict")
    return Section("Beside other arms, as ratios of means", columns, [pair.comparison() for pair in pairs])


def constant(_: float) -> float:
    """A learning rate that stays, as a factor over a run's progress from 0 to 1."""
    return 1.0


def decayed(progress: float) -> float:
    """A learning rate that ends at zero: constant for a half, then falling linearly."""
    return min(1.0, 2.0 * (1.0 - progress))


def load(
    model: esper.MorphableModel, kernels: Mapping[tuple[str, int], esper.Blueprint], platform: esper.Platform
) -> float:
    """Compile kernels for layers and seeds, put them in force together, and return the seconds that it took."""
    start = time.perf_counter()
    ids = {place: platform.submit(blueprint) for place, blueprint in kernels.items()}
    requests = {
        place: model.request_kernel(*place, platform.wait_sync(id_).id, trainable=True) for place, id_ in ids.items()
    }
    for (layer, seed), request in requests.items():
        if not request.result():
            raise esper.EsperError(model.kasmina_layers[layer].seed_errors[seed])
    model.commit()
    return time.perf_counter() - start


def probe_flops(rows: int, inputs: int, outputs: int, chosen: int, proposals: int = PROPOSALS) -> float:
    """Of the statistics of one site, and of a selection of `chosen` hidden units (0: of none) from a sample of them.

    Counted as for a layer that learns, whose own gain is solved for: for a frozen one, less is computed.
    """
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
