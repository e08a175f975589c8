"""Size without search: one grower with one set of constants on eight tasks, beside five sizes chosen by hand.

A linear model is given to `esper.Grower`, which adds hidden units beside it, eight or sixteen at a time, keeps what
lowers the loss on data that is not trained on, and stops by itself. The sizes chosen by hand are the same model with 2
to 128 hidden units from the beginning. All train for as many steps with Adam, its rate falling to zero over the last
fifth.

The goal: within one point of the best of the five sizes on every task, for at most a third of the FLOPs of the five
together; and the final size follows that of the teacher (Spearman's correlation of at least 0.8).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from scipy.stats import spearmanr
from torch import Tensor, nn

import esper
from benchmarks.growing import Arm, Pair, comparison_section, goal_section, interval, shown
from benchmarks.growth_size_tasks import BATCH, TASKS, TEACHERS, Task
from benchmarks.harness import Section, arguments, report, stoppable

STEPS, DECAY, RATE = 1000, 0.8, 3e-3
SIZES = (2, 8, 32, 64, 128)
WIDTHS, PROBED = (8, 16), 16
CONSTANTS = {
    "budget": 10**6, "first": 50, "cooldown": 20, "ramp": 20, "trial": 40, "lead": 0, "patience": 3,
    "proposals": 64, "margin": 0.1, "widths": WIDTHS, "until": int(STEPS * DECAY) - 100,
}  # fmt: skip
"""Of the grower, for every task; the others are its own defaults."""
POINTS, SHARE, FOLLOWS = 1.0, 1 / 3, 0.8


class Model(nn.Module):
    """A linear model with hidden units beside it."""

    def __init__(self, task: Task, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(task.features, task.outputs)
        self.hidden: nn.Module | None = None
        if hidden:
            self.hidden = nn.Sequential(nn.Linear(task.features, hidden), nn.ReLU(), nn.Linear(hidden, task.outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if self.hidden is None else y + self.hidden(x)


def step_flops(task: Task, hidden: int) -> float:
    """Of one step: forward, to all weights, and to the hidden units."""
    layers = task.features * task.outputs * 2 + hidden * (task.features * 2 + task.outputs * 3)
    return 2.0 * BATCH * layers


def falling(progress: float) -> float:
    """Constant for four fifths, then linearly to zero."""
    return min(1.0, (1.0 - progress) / (1.0 - DECAY))


@dataclass
class Run:
    """What one way made of one seed of a task."""

    points: float
    flops: float
    seconds: float
    hidden: int


def train(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, seed: int,
    after: Callable[[Tensor], None] = lambda _: None,
) -> None:  # fmt: skip
    """Steps on random batches; `after` is told each loss."""
    batches = task.batches(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        optimizer.step()
        scheduler.step()
        after(loss)


def _scheduled(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step / steps))


def fixed(task: Task, hidden: int, seed: int, steps: int = STEPS) -> Run:
    """One size from the beginning to the end."""
    start, model = time.perf_counter(), Model(task, hidden, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    train(task, model, optimizer, _scheduled(optimizer, steps), steps, seed)
    return Run(task.points(model), steps * step_flops(task, hidden), time.perf_counter() - start, hidden)


def grown(task: Task, seed: int, platform: esper.Platform, start: Literal["selected", "random"]) -> Run:
    """A linear model that is given to a grower."""
    began = time.perf_counter()
    model = esper.wrap(Model(task, 0, seed), seeds_per_layer=STEPS // 80, telemetry_enabled=False, platform=platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    scheduler = _scheduled(optimizer, STEPS)
    probing = list(islice(task.batches(seed + 5000), PROBED))
    probe_batches = [_joined(probing[first : first + 4]) for first in range(0, PROBED, 4)]
    grower = esper.Grower(
        model, optimizer, task.loss, scheduler=scheduler, probe_batches=probe_batches,
        judge_batches=[task.judged], start=start, family=_units, seed=seed, step_flops=step_flops(task, 0),
        **CONSTANTS,
    )  # fmt: skip
    train(task, model, optimizer, scheduler, STEPS, seed, grower.step)
    seconds = time.perf_counter() - began
    flops, hidden = flops_of(task, grower.history)
    grower.close()
    return Run(task.points(model), flops, seconds, hidden)


def _joined(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    return x, y


def _units(layer: esper.KasminaLayer, width: int) -> esper.Blueprint:
    return esper.Blueprint.bottleneck(layer.input_dim, layer.output_dim, rank=width, activation="relu")


def flops_of(task: Task, history: Sequence[Any]) -> tuple[float, int]:
    """Those of a run that grew, probes and judgements included as the grower counted them; and its final size."""
    hidden, since, spent, extra = 0, 0, 0.0, 0.0
    for record in history:
        if record.event in ("in force", "unloaded"):
            spent += (record.step - since) * step_flops(task, hidden)
            since, hidden = record.step, hidden + (record.width if record.event == "in force" else -record.width)
        if record.compute_share is not None:  # of a run whose steps cost what the grower was told
            share, told = record.compute_share, record.step * step_flops(task, 0)
            extra = max(extra, share / (1 - share) * told)
    return spent + (STEPS - since) * step_flops(task, hidden) + extra, hidden


NEVER, SCRATCH, EQUAL = "never grown", "final size from scratch, equal steps", "final size from scratch, equal FLOPs"
GROWN, RANDOM = "the grower", "the grower, random starts"


def arms_of(name: str, seeds: int, platform: esper.Platform) -> dict[str, Arm]:
    """Every way over so many seeds of one task."""
    arms: dict[str, Arm] = {}

    def note(arm: str, run: Run) -> Run:
        arms.setdefault(arm, Arm(arm)).add(run.points, run.flops, run.seconds, hidden=run.hidden)
        return run

    for seed in range(seeds):
        task = TASKS[name](seed)
        note(NEVER, fixed(task, 0, seed))
        for size in SIZES:
            note(f"{size}", fixed(task, size, seed))
        run = note(GROWN, grown(task, seed, platform, "selected"))
        note(RANDOM, grown(task, seed, platform, "random"))
        note(SCRATCH, fixed(task, run.hidden, seed))
        note(EQUAL, fixed(task, run.hidden, seed, round(run.flops / step_flops(task, run.hidden))))
    return arms


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    results: dict[str, dict[str, Arm]] = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for name in options.tasks:
            results[name] = arms_of(name, options.seeds, platform)
    tasks = list(results.items())
    report(
        "growth_size",
        f"Size without search, {options.seeds} seeds",
        (
            "task",
            "the grower, points",
            "its size",
            "best of five sizes, points",
            "its size",
            "FLOPs / the sweep's",
            "s",
        ),
        [row_of(*each) for each in tasks],
        {"arms": {name: [vars(arm) for arm in arms.values()] for name, arms in results.items()}},
        lambda *axes: plot(axes, results),
        options,
        sections=[
            Section("All sizes, points", ("task", NEVER, *map(str, SIZES)), [sizes_row(*each) for each in tasks]),
            Section("Controls, points", ("task", SCRATCH, EQUAL, RANDOM), [control_row(*each) for each in tasks]),
            goal_section(goals_of(results)),
            comparison_section(pair for each in tasks for pair in others_of(*each)),
        ],
        panels=(1, 2),
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="splits of the data and first weights")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))


def best_of(arms: Mapping[str, Arm]) -> Arm:
    """The size that was best on the test, in the mean over seeds: the choice of one who knows it."""
    return max((arms[f"{size}"] for size in SIZES), key=lambda arm: arm.mean)


def share_of(arms: Mapping[str, Arm]) -> float:
    """FLOPs of the grower as a share of those of all five sizes."""
    return sum(arms[GROWN].flops) / sum(sum(arms[f"{size}"].flops) for size in SIZES)


def row_of(name: str, arms: Mapping[str, Arm]) -> tuple[Any, ...]:
    """A task."""
    ours, best = arms[GROWN], best_of(arms)
    sizes = shown(ours.more["hidden"], 0)
    seconds = sum(ours.seconds) / len(ours.seconds)
    return name, shown(ours.figures, 1), sizes, shown(best.figures, 1), best.name, share_of(arms), seconds


def sizes_row(name: str, arms: Mapping[str, Arm]) -> tuple[Any, ...]:
    """A task, by size."""
    return name, shown(arms[NEVER].figures, 1), *(shown(arms[f"{size}"].figures, 1) for size in SIZES)


def control_row(name: str, arms: Mapping[str, Arm]) -> tuple[Any, ...]:
    """A task, by control."""
    return name, *(shown(arms[each].figures, 1) for each in (SCRATCH, EQUAL, RANDOM))


def goals_of(results: Mapping[str, Mapping[str, Arm]]) -> list[tuple[Any, ...]]:
    """What was to be shown."""
    rows = []
    for name, arms in results.items():
        pairs = zip(arms[GROWN].figures, best_of(arms).figures, strict=True)
        mean, half = interval([ours - theirs for ours, theirs in pairs])
        verdict = "met" if mean >= -POINTS else "missed"
        verdict += ", within the interval" if abs(mean + POINTS) <= half else ""
        rows.append((f"{name}: points beside the best size", f"{mean:.2f}", f"at least -{POINTS:g}", verdict))
        share = share_of(arms)
        rows.append(
            (f"{name}: FLOPs / the sweep's", f"{share:.3f}", "at most 0.333", "met" if share <= SHARE else "missed")
        )
    widths = [width for name, width in TEACHERS.items() if name in results for _ in results[name][GROWN].figures]
    sizes = [size for name in TEACHERS if name in results for size in results[name][GROWN].more["hidden"]]
    if len(set(widths)) > 1 and len(set(sizes)) > 1:
        found = float(spearmanr(widths, sizes).statistic)
        verdict = "met" if found >= FOLLOWS else "missed"
        rows.append(("size and teacher's width, Spearman", f"{found:.2f}", f"at least {FOLLOWS:g}", verdict))
    return rows


def others_of(name: str, arms: Mapping[str, Arm]) -> list[Pair]:
    """The grower beside the controls."""
    others = (NEVER, SCRATCH, EQUAL, RANDOM)
    return [Pair(f"{name}: {GROWN} / {each}", arms[GROWN].figures, arms[each].figures, more=True) for each in others]


def plot(axes: tuple[Axes, ...], results: Mapping[str, Mapping[str, Arm]]) -> None:
    """Points that the best size has more than every other, and FLOPs; the grower's final sizes."""
    for name, arms in results.items():
        best, sweep = best_of(arms).mean, sum(sum(arms[f"{size}"].flops) for size in SIZES)
        (mark,) = axes[0].plot(share_of(arms), arms[GROWN].mean - best, "o", label=name)
        shares = [sum(arms[f"{size}"].flops) / sweep for size in SIZES]
        axes[0].plot(
            shares, [arms[f"{size}"].mean - best for size in SIZES], ".--", color=mark.get_color(), linewidth=0.6
        )
    axes[0].axhline(-POINTS, linestyle=":", color="grey")
    axes[0].axvline(SHARE, linestyle=":", color="grey")
    axes[0].set(xlabel="share of the sweep's FLOPs", ylabel="points beside the best size", ylim=(-12, 3))
    axes[0].set_title("the grower (large) and the five sizes")
    axes[0].legend(fontsize=7)
    places = range(len(results))
    sizes = [interval(arms[GROWN].more["hidden"]) for arms in results.values()]
    axes[1].bar(places, [mean for mean, _ in sizes], yerr=[half for _, half in sizes], capsize=3)
    axes[1].set_xticks(list(places), list(results), rotation=40, ha="right", fontsize=7)
    axes[1].set(ylabel="hidden units that the grower kept", title="final sizes")


if __name__ == "__main__":
    main()
