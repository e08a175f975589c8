"""Teacher and student, GradMax's setting: a hidden layer grows from 5 to 10 neurons, by one every 200 steps.

The teacher is 10-10-10 without biases, its weights uniform in [-1, 1]; 1000 samples, full batches, SGD at 0.1, 1500
steps (Evci et al. 2022, arXiv:2201.05125, and its notebook). With Esper the student is a linear layer of zeros, frozen,
and its hidden neurons are kernels beside it: one of 5 to begin with, then five of 1.

The goal, over 10 seeds: `selected` ends at no more than 0.6 times the loss of the random identity start, at no more
than 1.3 times that of 10 neurons from the beginning, and no higher than gromo's best method.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import esper
from benchmarks.growing import (
    Arm,
    Pair,
    comparison_section,
    constant,
    decayed,
    goal_section,
    interval,
    load,
    probe_flops,
    shown,
    steps_of,
)  # fmt: skip
from benchmarks.growth_teacher_gromo import GROMO, GromoStudent
from benchmarks.harness import Section, arguments, report, stoppable
from esper.growth import Probe, gradmax, selected

FEATURES, SMALL, BIG, SAMPLES = 10, 5, 10, 1000
EVERY, AFTER, RATE = 200, 500, 0.1
STEPS = EVERY * (BIG - SMALL) + AFTER
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
STARTS = {"relu": ("selected", "random"), "silu": ("selected", "gradmax", "random")}
"""Esper's `gradmax` needs a slope at 0, which torch's ReLU does not have; gromo brings one that does."""
SCRATCH = "10 from scratch, equal steps"
NAMES = {"selected": "Esper: selected", "gradmax": "Esper: gradmax", "random": "Esper: random identity start"}


@dataclass(frozen=True)
class Task:
    """Samples, what the teacher makes of them, and the first weights of small and big students."""

    activation: str
    x: Tensor
    y: Tensor
    small: tuple[Tensor, Tensor]
    big: tuple[Tensor, Tensor]
    seed: int

    @classmethod
    def made(cls, activation: str, seed: int) -> Task:
        """A teacher of its own for each seed."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound: float, *shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) * bound

        def student(hidden: int) -> tuple[Tensor, Tensor]:  # Glorot's, as in the notebook
            bound = math.sqrt(6 / (FEATURES + hidden))
            return uniform(bound, hidden, FEATURES), uniform(bound, FEATURES, hidden)

        x = torch.randn(SAMPLES, FEATURES, generator=generator)
        first, last = uniform(1.0, BIG, FEATURES), uniform(1.0, FEATURES, BIG)
        y = ACTIVATIONS[activation]()(x @ first.T) @ last.T
        return cls(activation, x, y, student(SMALL), student(BIG), seed)

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean squared error of all samples."""
        return F.mse_loss(model(self.x), self.y)


@dataclass
class Run:
    """What one arm made of one seed."""

    losses: list[float] = field(default_factory=list)
    flops: float = 0.0
    seconds: float = 0.0
    growths: list[float] = field(default_factory=list)
    """Seconds of each growth, the probe included."""
    gradients: list[float] = field(default_factory=list)
    """The norm of a new neuron's gradient at its first step."""


def step_flops(hidden: int, carrier: bool = False) -> float:
    """Of a training step: both products forward, both to weights, one to hidden neurons; and the layer of zeros."""
    return 10.0 * SAMPLES * FEATURES * hidden + (2.0 * SAMPLES * FEATURES**2 if carrier else 0.0)


def plain(task: Task, hidden: int, steps: int, schedule: Callable[[float], float] = constant) -> Run:
    """A student of one size from the beginning to the end."""
    run, start = Run(), time.perf_counter()
    model = nn.Sequential(
        nn.Linear(FEATURES, hidden, bias=False), ACTIVATIONS[task.activation](), nn.Linear(hidden, FEATURES, bias=False)
    )
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), task.small if hidden == SMALL else task.big, strict=True):
            parameter.copy_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps_of(optimizer, lambda: task.loss(model), steps, schedule, run.losses)
    run.losses.append(float(task.loss(model).detach()))
    run.flops, run.seconds = steps * step_flops(hidden), time.perf_counter() - start
    return run


class EsperStudent:
    """Hidden neurons as kernels beside a linear layer of zeros."""

    def __init__(self, task: Task, platform: esper.Platform) -> None:
        self.task, self.platform, self.seeds = task, platform, 0
        nothing = nn.Linear(FEATURES, FEATURES, bias=False)
        nn.init.zeros_(nothing.weight)
        self.model = esper.wrap(
            nn.Sequential(nothing).requires_grad_(False), seeds_per_layer=BIG - SMALL + 1, telemetry_enabled=False,
            commit="manual", platform=platform,
        )  # fmt: skip
        self.optimizer = torch.optim.SGD([{"params": []}], lr=RATE)
        self.model.attach_optimizer(self.optimizer)
        first = esper.Blueprint.from_graph(
            self.neurons(SMALL).graph, {"down.weight": task.small[0], "up.weight": task.small[1]}
        )
        self.add(first)

    def neurons(self, count: int) -> esper.Blueprint:
        """So many neurons, with a random start."""
        seed = 1000 * self.task.seed + self.seeds
        return esper.Blueprint.bottleneck(
            FEATURES, FEATURES, rank=count, activation=self.task.activation, bias=False, seed=seed
        )

    def add(self, blueprint: esper.Blueprint) -> None:
        """Load neurons and let them learn."""
        load(self.model, {("0", self.seeds): blueprint}, self.platform)
        self.seeds += 1

    def grow(self, start: str) -> float:
        """One more neuron; returns the FLOPs of finding its weights."""
        blueprint, flops = self.neurons(1), 0.0
        if start != "random":
            with Probe(self.model) as probe:
                self.optimizer.zero_grad()
                self.task.loss(self.model).backward()
            statistics = probe["0"]
            blueprint = (
                gradmax(statistics, blueprint) if start == "gradmax" else selected(statistics, blueprint).blueprint
            )
            flops = step_flops(SMALL + self.seeds - 1, carrier=True)
            flops += probe_flops(SAMPLES, FEATURES, FEATURES, 1 if start == "selected" else 0)
        self.add(blueprint)
        return flops

    def newest_gradient(self) -> float:
        """The norm of the gradient of the neuron that came last."""
        newest = self.optimizer.param_groups[-1]["params"]
        return math.sqrt(sum(float(each.grad.square().sum()) for each in newest))


def grown(task: Task, start: str, make: Callable[[], Any], carrier: bool) -> Run:
    """A student that grows; `make()` has `model`, `optimizer`, `grow(start)` and `newest_gradient()`."""
    run, began = Run(), time.perf_counter()
    student = make()
    for hidden in range(SMALL, BIG + 1):
        count = EVERY if hidden < BIG else AFTER
        steps_of(student.optimizer, lambda: task.loss(student.model), count, seen=run.losses)
        run.flops += count * step_flops(hidden, carrier)
        if hidden < BIG:
            growth = time.perf_counter()
            run.flops += student.grow(start)
            run.growths.append(time.perf_counter() - growth)
            student.optimizer.zero_grad()
            task.loss(student.model).backward()  # to look at, and not part of the method
            run.gradients.append(student.newest_gradient())
    run.losses.append(float(task.loss(student.model).detach()))
    run.seconds = time.perf_counter() - began
    return run


def arms_of(activation: str, seeds: int, platform: esper.Platform, curves: dict[str, list[list[float]]]) -> list[Arm]:
    """Every arm over so many seeds; the seeds that were done if it is stopped."""
    arms: dict[str, Arm] = {}

    def note(name: str, run: Run) -> Run:
        more = {"growth_seconds": sum(run.growths) / len(run.growths)} if run.growths else {}
        if run.gradients:
            more["gradient"] = sum(run.gradients) / len(run.gradients)
        arms.setdefault(name, Arm(name)).add(run.losses[-1], run.flops, run.seconds, **more)
        curves.setdefault(name, []).append(run.losses[:: STEPS // 100])
        return run

    for seed in range(seeds):
        task = Task.made(activation, seed)
        note("never grown: 5 neurons", plain(task, SMALL, STEPS))
        note(SCRATCH, plain(task, BIG, STEPS))
        spent = {}
        for start in STARTS[activation]:
            run = grown(task, start, lambda task=task: EsperStudent(task, platform), carrier=True)
            spent[start] = note(NAMES[start], run).flops
        equal = round(spent["selected"] / step_flops(BIG))
        note("10 from scratch, equal FLOPs, decayed", plain(task, BIG, equal, decayed))
        for method in GROMO:
            run = grown(task, method, lambda task=task: GromoStudent(task, RATE, step_flops), carrier=False)
            note(f"gromo: {method}", run)
    return list(arms.values())


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    results: dict[str, list[Arm]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for activation in options.activations:
            start = time.perf_counter()
            EsperStudent(Task.made(activation, 0), platform).grow("random")  # compiles what all others share
            first[activation] = time.perf_counter() - start
            curves[activation] = {}
            results[activation] = arms_of(activation, options.seeds, platform, curves[activation])
    if not GROMO:
        print("gromo is not installed, so its rows are left out: pip install gromo==0.1.0")
    goals = [goal for activation, arms in results.items() for goal in goals_of(activation, arms)]
    others = [pair for activation, arms in results.items() for pair in others_of(activation, arms)]
    columns = ("student", "final MSE", "GFLOP", "seconds", "gradient of a new neuron")
    tables = [(activation, rows_of(arms)) for activation, arms in results.items()]
    compiled = Section(
        "Seconds once, before: two structures of kernels compiled", ("activation", "s"), list(first.items())
    )
    report(
        "growth_teacher",
        f"Teacher and student, {tables[0][0]}: 5 to 10 neurons, {options.seeds} seeds",
        columns,
        tables[0][1],
        {"arms": {name: [vars(arm) for arm in arms] for name, arms in results.items()}, "first": first},
        lambda *axes: plot(axes, curves),
        options,
        sections=[
            *(Section(f"The same with {name}", columns, rows) for name, rows in tables[1:]),
            goal_section(goals),
            comparison_section(others),
            compiled,
        ],
        panels=(1, len(curves)),
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=10, help="teachers, each with students of its own")
    parser.add_argument("--activations", nargs="+", choices=list(ACTIVATIONS), default=list(ACTIVATIONS))


def rows_of(arms: list[Arm]) -> list[tuple[Any, ...]]:
    """One row an arm."""
    return [
        (
            arm.name, shown(arm.figures), sum(arm.flops) / len(arm.flops) / 1e9, sum(arm.seconds) / len(arm.seconds),
            shown(arm.more["gradient"]) if "gradient" in arm.more else "",
        )
        for arm in arms
    ]  # fmt: skip


def best_of_gromo(arms: Sequence[Arm]) -> Arm | None:
    """Its method that ended lowest."""
    theirs = [arm for arm in arms if arm.name.startswith("gromo: ")]
    return min(theirs, key=lambda arm: arm.mean, default=None)


def goals_of(activation: str, arms: Sequence[Arm]) -> list[tuple[Any, ...]]:
    """What was to be shown."""
    by_name = {arm.name: arm for arm in arms}
    against = [(by_name[NAMES["random"]], 0.6), (by_name[SCRATCH], 1.3)]
    best = best_of_gromo(arms)
    if best is not None:
        against.append((best, 1.0))
    ours = by_name[NAMES["selected"]]
    return [Pair(f"{activation}: selected / {arm.name}", ours.figures, arm.figures).goal(at) for arm, at in against]


def others_of(activation: str, arms: Sequence[Arm]) -> list[Pair]:
    """`selected` beside every other arm."""
    ours = next(arm for arm in arms if arm.name == NAMES["selected"])
    return [Pair(f"{activation}: selected / {arm.name}", ours.figures, arm.figures) for arm in arms if arm is not ours]


def plot(axes: tuple[Axes, ...], curves: Mapping[str, Mapping[str, list[list[float]]]]) -> None:
    """Loss over steps, the mean over seeds, with the interval shaded."""
    for axis, (activation, arms) in zip(axes, curves.items(), strict=True):
        for name, runs in arms.items():
            points = [interval(column) for column in zip(*runs, strict=False)]
            steps = [index * (STEPS // 100) for index in range(len(points))]
            (line,) = axis.plot(steps, [mean for mean, _ in points], label=name)
            low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axis.set(title=activation, xlabel="step", ylabel="MSE", yscale="log", xlim=(0, STEPS * 1.02))
        axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
