"""Cycles of low-rank kernels: trained, folded into the frozen host, started anew; against one LoRA and full training.

A small character model whose embeddings never learn is trained in full for a fifth of the steps, then frozen, as in
ReLoRA (Lialin et al. 2023, arXiv:2307.05695). One LoRA learns for all other steps; or four do in turn, each fossilized,
which folds it into its layer's weight, before the next one starts from zero. AdamW, its rate constant and then falling
to zero over the last fifth; kernels warm up over 20 steps.

What is to be seen: loss against the number of parameters that learn at a time. There is no goal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import nn

import esper
from benchmarks.growing import Arm, Pair, comparison_section, constant, interval, load, shown
from benchmarks.growth_characters import CharacterModel, Text, linear_layers, low_rank_parameters, step_flops
from benchmarks.harness import arguments, report, stoppable

WARM, STEPS, CYCLES, REWARM = 600, 2400, 4, 20
RATE, LOW_RANK_RATE = 2e-3, 5e-3
LORA, RELORA = (2, 8), (2, 8)
RANDOM = f"{CYCLES} cycles, rank {RELORA[-1]}, at three random layers"


def falling(progress: float) -> float:
    """Constant for four fifths, then linearly to zero."""
    return min(1.0, 5.0 * (1.0 - progress))


class Experiment:
    """One seed: the host after its warm start, and all ways to go on."""

    def __init__(self, seed: int, platform: esper.Platform) -> None:
        self.seed, self.platform, self.text = seed, platform, Text.load()
        self.warm = CharacterModel(self.text.characters, seed)
        self.layers = linear_layers(self.warm)
        self.full_step = step_flops(self.layers)
        self.learning = sum(each.numel() for each in self.warm.parameters() if each.requires_grad)
        self._train(self.warm, WARM, constant)
        self.spent = WARM * self.full_step

    def _train(self, model: nn.Module, steps: int, factor: Callable[[float], float]) -> None:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / steps))
        batches = self.text.batches(self.seed)
        for _ in range(steps):
            self._step(model, optimizer, scheduler, next(batches))

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, batch: Any) -> None:
        contexts, following = batch
        optimizer.zero_grad()
        F.cross_entropy(model(contexts), following).backward()
        optimizer.step()
        scheduler.step()

    def never(self) -> tuple[float, float, float, float]:
        """Loss, FLOPs, seconds and parameters of the host that learns no more."""
        return self.text.loss(self.warm), self.spent, 0.0, 0.0

    def full(self, steps: int) -> tuple[float, float, float, float]:
        """The same of training in full from the beginning, the schedule at its end."""
        start, model = time.perf_counter(), CharacterModel(self.text.characters, self.seed)
        self._train(model, steps, falling)
        return self.text.loss(model), steps * self.full_step, time.perf_counter() - start, float(self.learning)

    def low_rank(self, rank: int, cycles: int, places: int | None = None) -> tuple[float, float, float, float, float]:
        """The same of kernels in turn, at `places` random layers or at all; and how far folding moved the outputs."""
        start = time.perf_counter()
        host = CharacterModel(self.text.characters, self.seed)
        host.load_state_dict(self.warm.state_dict())
        model = esper.wrap(
            host.requires_grad_(False), seeds_per_layer=cycles, telemetry_enabled=False, commit="manual",
            platform=self.platform,
        )  # fmt: skip
        optimizer = torch.optim.AdamW([{"params": []}], lr=LOW_RANK_RATE)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step / STEPS))
        model.attach_optimizer(optimizer, scheduler, warmup=REWARM, warmup_start=0.0, peak=1.0)
        batches, generator = self.text.batches(self.seed + 1000), torch.Generator().manual_seed(self.seed)
        looked_at, _ = next(self.text.batches(self.seed + 2000))
        flops, moved, learning = self.spent, 0.0, 0
        for cycle in range(cycles):
            order = torch.randperm(len(self.layers), generator=generator)[:places].tolist()
            ranks = {name: rank for at, name in enumerate(self.layers) if at in order}
            learning = max(learning, low_rank_parameters(self.layers, ranks))
            kernels = {(name, cycle): self._kernel(name, rank, cycle) for name in ranks}
            load(model, kernels, self.platform)
            for _ in range(STEPS // cycles):
                self._step(model, optimizer, scheduler, next(batches))
            flops += STEPS // cycles * step_flops(self.layers, ranks)
            if cycle < cycles - 1:
                moved = max(moved, self._fold(model, kernels, looked_at))
        return self.text.loss(model), flops, time.perf_counter() - start, float(learning), moved

    def _kernel(self, name: str, rank: int, cycle: int) -> esper.Blueprint:
        seed = 10_000 * self.seed + 100 * cycle + list(self.layers).index(name)
        return esper.Blueprint.low_rank(*self.layers[name], rank=rank, seed=seed)

    def _fold(self, model: esper.MorphableModel, kernels: Iterable[tuple[str, int]], contexts: torch.Tensor) -> float:
        """Make kernels part of their layers' weights; returns the largest change of an output."""
        with torch.no_grad():
            before = model(contexts)
            for layer, seed in kernels:
                model.fossilize(layer, seed)
            model.commit()
            return float((model(contexts) - before).abs().max())


def arms_of(seeds: int, platform: esper.Platform) -> list[Arm]:
    """Every arm over so many seeds."""
    arms: dict[str, Arm] = {}

    def note(name: str, loss: float, flops: float, seconds: float, learning: float, moved: float | None = None) -> None:
        more = {} if moved is None else {"moved": moved}
        arms.setdefault(name, Arm(name)).add(loss, flops, seconds, learning=learning, **more)

    for seed in range(seeds):
        experiment = Experiment(seed, platform)
        note("warm start only", *experiment.never())
        for rank in LORA:
            *one, _ = experiment.low_rank(rank, 1)
            note(f"one LoRA, rank {rank}", *one)
        for rank in RELORA:
            cycles = experiment.low_rank(rank, CYCLES)
            note(f"{CYCLES} cycles, rank {rank}", *cycles)
        note(RANDOM, *experiment.low_rank(RELORA[-1], CYCLES, 3))
        note("full training, equal steps", *experiment.full(WARM + STEPS))
        note("full training, equal FLOPs, decayed", *experiment.full(round(cycles[1] / experiment.full_step)))
    return list(arms.values())


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        arms = arms_of(options.seeds, platform)
    report(
        "growth_relora",
        f"Low-rank kernels in cycles, a character model, {options.seeds} seeds",
        ("way", "validation, nats", "parameters that learn", "GFLOP", "seconds", "outputs moved by folding, at most"),
        rows_of(arms),
        {"arms": [vars(arm) for arm in arms]},
        lambda axes: plot(axes, arms),
        options,
        sections=[comparison_section(comparisons(arms))],
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="first weights and batches")


def rows_of(arms: Sequence[Arm]) -> list[tuple[Any, ...]]:
    """One row an arm."""
    return [
        (
            arm.name, shown(arm.figures), f"{max(arm.more['learning']):,.0f}", sum(arm.flops) / len(arm.flops) / 1e9,
            sum(arm.seconds) / len(arm.seconds), f"{max(arm.more['moved']):.0e}" if "moved" in arm.more else "",
        )
        for arm in arms
    ]  # fmt: skip


def comparisons(arms: Sequence[Arm]) -> list[Pair]:
    """Cycles against one LoRA of the same rank, of as much rank in all, and against full training."""
    by_name = {arm.name: arm.figures for arm in arms}
    full = "full training, equal steps"
    pairs = [(rank, other) for rank in RELORA for other in (f"one LoRA, rank {rank}", full)]
    pairs += [(RELORA[0], f"one LoRA, rank {RELORA[0] * CYCLES}"), (RELORA[-1], RANDOM)]
    pairs += [(RELORA[-1], "full training, equal FLOPs, decayed")]
    ours = {rank: f"{CYCLES} cycles, rank {rank}" for rank in RELORA}
    return [Pair(f"{ours[rank]} / {other}", by_name[ours[rank]], by_name[other]) for rank, other in pairs]


def plot(axes: Axes, arms: Sequence[Arm]) -> None:
    """Loss against parameters."""
    groups: dict[str, list[tuple[float, ...]]] = {"one LoRA": [], "cycles": [], "full training": []}
    for arm in arms:
        kind = next((kind for kind in groups if kind in arm.name and "random" not in arm.name), None)
        if kind is not None:
            groups[kind].append((max(arm.more["learning"]), *interval(arm.figures)))
    for kind, points in groups.items():
        axes.errorbar(*zip(*points, strict=True), fmt="o-" if kind != "full training" else "s", capsize=3, label=kind)
    never = next(arm for arm in arms if arm.name == "warm start only")
    axes.axhline(never.mean, linestyle=":", color="grey", label=never.name)
    axes.set(xlabel="parameters that learn at a time", ylabel="validation, nats a character", xscale="log")
    axes.legend()


if __name__ == "__main__":
    main()
