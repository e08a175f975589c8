"""Depth under a warm-up/stable/decay schedule: a character model grows from one block to eight, in one step.

Residual MLP blocks of 96-192-96 on the text of Python's own help; AdamW at 2e-3, 2 % of the steps warm-up, the last
20 % a decay to zero. Half-way through, seven `deepen` kernels come behind the one block, with an identity start: the
model's function is what it was, and each computes what a block does. Their optimizer state is new, their rate warms up
over 50 steps, and everything else goes on as it was.

The goals, over five seeds and four lengths of training: the very same outputs at the moment of growth; at equal FLOPs
never worse than eight blocks from scratch; and on the longest, at most 2 % above eight blocks for equal steps, at 60 %
of their FLOPs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import esper
from benchmarks.growing import Arm, Pair, comparison_section, goal_section, interval, load, shown
from benchmarks.growth_characters import INNER, WIDTH, CharacterModel, Text, linear_layers, step_flops
from benchmarks.harness import Section, arguments, report, stoppable

SMALL, BIG, BUDGETS = 1, 8, (400, 800, 1600, 3200)
RATE, REWARM, GROWN_AT = 2e-3, 50, 0.5
BEHIND, ANYWHERE = ("blocks.0",), ("project", "blocks.0")
"""The layers whose outputs get blocks behind them: where a ninth block would stand, and where one may stand."""
NEVER, SCRATCH, EQUAL = (
    "never grown: 1 block",
    "8 blocks from scratch, equal steps",
    "8 blocks from scratch, equal FLOPs",
)
GROWN, RANDOM_PLACE, RANDOM_START = "Esper: deepen, identity start", "random places", "random blocks, by hand"


def schedule(progress: float) -> float:
    """Warm-up over 2 %, then constant, then linearly to zero over the last 20 %."""
    return min(1.0, progress / 0.02, 5.0 * (1.0 - progress))


@dataclass(frozen=True)
class Run:
    """What one way to train ended at; `moved` is the largest change of an output at the moment of growth."""

    loss: float
    flops: float
    seconds: float
    moved: float | None = None


class Experiment:
    """One seed and one length of training."""

    def __init__(self, seed: int, steps: int, platform: esper.Platform) -> None:
        self.seed, self.steps, self.platform, self.text = seed, steps, platform, Text.load()
        self.costs = {n: step_flops(linear_layers(self._new(n))) for n in (SMALL, BIG)}

    def _new(self, blocks: int) -> CharacterModel:
        return CharacterModel(self.text.characters, self.seed, blocks)

    def scratch(self, blocks: int, steps: int) -> Run:
        """So many blocks from the beginning to the end."""
        start, model = time.perf_counter(), self._new(blocks)
        self._steps(model, *self._optimizer(model, steps), steps)
        return Run(self.text.loss(model), steps * self.costs[blocks], time.perf_counter() - start)

    def grown(self, places: Sequence[str]) -> Run:
        """Kernels behind layers drawn among `places`, half-way through."""
        start = time.perf_counter()
        model = esper.wrap(
            self._new(SMALL), list(ANYWHERE), seeds_per_layer=BIG - SMALL, telemetry_enabled=False, commit="manual",
            platform=self.platform,
        )  # fmt: skip
        optimizer, scheduler = self._optimizer(model, self.steps)
        model.attach_optimizer(optimizer, scheduler, warmup=REWARM, warmup_start=0.0, peak=1.0)
        before = round(GROWN_AT * self.steps)
        batches = self._steps(model, optimizer, scheduler, before)
        contexts, _ = next(self.text.batches(self.seed + 2000))
        with torch.no_grad():
            outputs = model(contexts)
        load(model, self._kernels(places), self.platform)
        with torch.no_grad():
            moved = float((model(contexts) - outputs).abs().max())
        self._steps(model, optimizer, scheduler, self.steps - before, batches)
        return Run(self.text.loss(model), self._grown_flops(before), time.perf_counter() - start, moved)

    def _kernels(self, places: Sequence[str]) -> Mapping[tuple[str, int], esper.Blueprint]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [places[int(torch.randint(len(places), (), generator=generator))] for _ in range(BIG - SMALL)]
        return {
            (place, drawn[:at].count(place)): esper.Blueprint.deepen(
                dict(project=256, **{"blocks.0": WIDTH})[place], WIDTH, hidden=INNER, seed=100 * self.seed + at
            )
            for at, place in enumerate(drawn)
        }

    def by_hand(self) -> Run:
        """As one grows without a library: seven blocks with random weights and a new optimizer in a new model."""
        start, small, before = time.perf_counter(), self._new(SMALL), round(GROWN_AT * self.steps)
        batches = self._steps(small, *self._optimizer(small, self.steps), before)
        model = self._new(BIG)
        missing = model.load_state_dict(small.state_dict(), strict=False).missing_keys
        assert len(missing) == (BIG - SMALL) * len(list(small.blocks[0].parameters()))
        optimizer, scheduler = self._optimizer(model, self.steps, done=before)
        contexts, _ = next(self.text.batches(self.seed + 2000))
        with torch.no_grad():
            moved = float((model(contexts) - small(contexts)).abs().max())
        self._steps(model, optimizer, scheduler, self.steps - before, batches)
        return Run(self.text.loss(model), self._grown_flops(before), time.perf_counter() - start, moved)

    def _grown_flops(self, before: int) -> float:
        return before * self.costs[SMALL] + (self.steps - before) * self.costs[BIG]

    def _optimizer(self, model: nn.Module, steps: int, done: int = 0) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule((done + step) / steps))

    def _steps(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        count: int,
        batches: Any = None,
    ) -> Any:
        """Train so many steps; returns the batches that are still to come."""
        batches = batches or self.text.batches(self.seed)
        for _ in range(count):
            contexts, following = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(contexts), following).backward()
            optimizer.step()
            scheduler.step()
        return batches


def arms_of(seeds: int, steps: int, platform: esper.Platform, controls: bool) -> list[Arm]:
    """Every arm over so many seeds; growth at random places and with random blocks only as `controls`."""
    arms: dict[str, Arm] = {}

    def note(name: str, run: Run) -> Run:
        more = {} if run.moved is None else {"moved": run.moved}
        arms.setdefault(name, Arm(name)).add(run.loss, run.flops, run.seconds, **more)
        return run

    for seed in range(seeds):
        experiment = Experiment(seed, steps, platform)
        note(NEVER, experiment.scratch(SMALL, steps))
        note(SCRATCH, experiment.scratch(BIG, steps))
        grown = note(GROWN, experiment.grown(BEHIND))
        note(EQUAL, experiment.scratch(BIG, round(grown.flops / experiment.costs[BIG])))
        if controls:
            note(RANDOM_PLACE, experiment.grown(ANYWHERE))
            note(RANDOM_START, experiment.by_hand())
    return list(arms.values())


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    results: dict[int, list[Arm]] = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for steps in options.budgets:
            results[steps] = arms_of(options.seeds, steps, platform, controls=steps == max(options.budgets))
    report(
        "growth_depth",
        f"A character model, 1 to {BIG} blocks at half of the steps, {options.seeds} seeds",
        ("steps", "way", "validation, nats", "FLOPs, relative", "seconds", "outputs moved by growth, at most"),
        [row for steps, arms in results.items() for row in rows_of(steps, arms)],
        {"arms": {steps: [vars(arm) for arm in arms] for steps, arms in results.items()}},
        lambda axes: plot(axes, results),
        options,
        sections=sections_of(results),
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="first weights and batches")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="steps of training")


def rows_of(steps: int, arms: Sequence[Arm]) -> list[tuple[Any, ...]]:
    """One row an arm."""
    whole = _mean(next(arm for arm in arms if arm.name == SCRATCH).flops)
    return [
        (
            steps, arm.name, shown(arm.figures, 4), f"{_mean(arm.flops) / whole:.2f}", _mean(arm.seconds),
            f"{max(arm.more['moved']):.1e}" if "moved" in arm.more else "",
        )
        for arm in arms
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sections_of(results: Mapping[int, Sequence[Arm]]) -> list[Section]:
    """The goals, and what there is no goal for."""
    goals: list[tuple[Any, ...]] = []
    pairs: list[Pair] = []
    for steps, arms in results.items():
        by_name = {arm.name: arm.figures for arm in arms}
        grown = by_name[GROWN]
        goals.append(Pair(f"{steps} steps: grown / 8 blocks at equal FLOPs", grown, by_name[EQUAL]).goal(1.0))
        pairs += [Pair(f"{steps} steps: grown / {NEVER}", grown, by_name[NEVER])]
        if steps == max(results):
            goals.append(Pair(f"{steps} steps: grown / 8 blocks at equal steps", grown, by_name[SCRATCH]).goal(1.02))
        pairs += [
            Pair(f"{steps} steps: grown / {name}", grown, by_name[name])
            for name in (RANDOM_PLACE, RANDOM_START)
            if name in by_name
        ]
    return [goal_section(goals), comparison_section(pairs)]


def plot(axes: Axes, results: Mapping[int, Sequence[Arm]]) -> None:
    """Loss against FLOPs, a line an arm."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for arms in results.values():
        for arm in arms:
            lines.setdefault(arm.name, []).append((_mean(arm.flops) / 1e12, *interval(arm.figures)))
    for name, points in lines.items():
        axes.errorbar(*zip(*points, strict=True), fmt="o-" if len(points) > 1 else "x", capsize=3, label=name)
    axes.set(xlabel="TFLOP", ylabel="validation, nats a character", xscale="log")
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
