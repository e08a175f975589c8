"""What a grower costs: the time of a step while it waits, its share of a run's FLOPs, and the longest step of a growth.

A character model of two residual blocks, 192-384-192, on the text of `growth_depth`: 370,000 parameters, compiled with
`backend="esper"`, AdamW, a rate that warms up, stays and decays. The grower has its own defaults but for `first` and
`until`, which go by the schedule, and a `compute_share` of 3 %; eight batches to probe with and two to judge by, of the
size that is trained on. Every step is timed, with all that the grower does in it, by the clock and by the processor's
time of the thread that trains, and beside it the same run without a grower, whose longest step by the clock is what the
machine does by itself.

The goals: a step takes as long with a grower that waits as without one; probes, scores, judgements and trials in vain
are less than 3 % of the FLOPs; and no step of the run takes longer than five ordinary ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import esper
from benchmarks.growth_characters import BATCH, CONTEXT, EMBEDDING, Block, Text, linear_layers, step_flops
from benchmarks.growth_depth import schedule
from benchmarks.harness import Section, arguments, paired, ratio, report, stoppable
from esper.growth import GrowthRecord

WIDTH, INNER, BLOCKS, RATE, SEEDS_PER_LAYER = 192, 384, 2, 2e-3, 2
PROBED, JUDGED, BUDGET = 8, 2, 100_000
FIRST, UNTIL = 0.05, 0.75
"""Parts of the run."""
IDLE, SHARE, WORST = 1.0, 0.03, 5.0
PHASES = ("waiting", "probing", "scoring and staging", "coming into force", "on trial", "judging", "after a judgement")
SETTLING = 25
"""Steps after a judgement, in which a kernel that stays becomes a part of the model, or one that goes leaves it."""


def network(characters: int, seed: int) -> nn.Module:
    """Embeddings that never learn, a projection of a context's, blocks, and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(characters, EMBEDDING).requires_grad_(False),
        nn.Flatten(),
        nn.Linear(CONTEXT * EMBEDDING, WIDTH),
        *(Block(WIDTH, INNER) for _ in range(BLOCKS)),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, characters),
    )


class Trainer:
    """One model, compiled, with its optimizer and batches."""

    def __init__(self, seed: int, steps: int, platform: esper.Platform) -> None:
        self.text = Text.load()
        host = network(self.text.characters, seed)
        self.flops = step_flops(linear_layers(host))
        self.parameters = sum(each.numel() for each in host.parameters() if each.requires_grad)
        self.model = esper.wrap(host, seeds_per_layer=SEEDS_PER_LAYER, telemetry_enabled=False, platform=platform)
        self.compiled: Any = torch.compile(self.model, backend="esper")
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=RATE)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(min(step, steps - 1) / steps)
        )
        self.batches = self.text.batches(seed)
        self.seed = seed

    def grower(self, **options: Any) -> esper.Grower:
        """With batches of its own."""
        others = self.text.batches(self.seed + 1000)
        probed, judged = list(islice(others, PROBED)), list(islice(others, JUDGED))
        return esper.Grower(
            self.model, self.optimizer, _loss, scheduler=self.scheduler, budget=BUDGET, probe_batches=probed,
            judge_batches=judged, step_flops=self.flops, seed=self.seed, compute_share=SHARE, **options,
        )  # fmt: skip

    def step(self) -> Tensor:
        """One step of training."""
        loss = _loss(self.compiled, next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Run:
    """Seconds of every step, what the grower did, and what a step of training computes."""

    durations: Sequence[float]
    worked: Sequence[float]
    """The processor's time of the same."""
    history: Sequence[GrowthRecord]
    flops: float
    moments: float
    forward: float

    @property
    def median(self) -> float:
        return statistics.median(self.durations)

    @property
    def worst(self) -> float:
        """In ordinary steps."""
        return max(self.durations) / self.median

    @property
    def worst_worked(self) -> float:
        """The same, by the processor's time."""
        return max(self.worked) / statistics.median(self.worked)

    def worst_by_phase(self) -> dict[str, float]:
        """In ordinary steps, for the phases there were."""
        found: dict[str, float] = {}
        for phase, seconds in zip(phases(self.history, len(self.durations)), self.durations, strict=True):
            found[phase] = max(found.get(phase, 0.0), seconds / self.median)
        return {phase: found[phase] for phase in PHASES if phase in found}

    def worked_by_phase(self) -> dict[str, tuple[float, float]]:
        """The longest step and the median one of each phase, in ordinary ones, by the processor's time."""
        found: dict[str, list[float]] = {}
        ordinary = statistics.median(self.worked)
        for phase, seconds in zip(phases(self.history, len(self.worked)), self.worked, strict=True):
            found.setdefault(phase, []).append(seconds / ordinary)
        return {phase: (max(found[phase]), statistics.median(found[phase])) for phase in PHASES if phase in found}

    @property
    def extra(self) -> float:
        """FLOPs that training without a grower does not take."""
        shares = [(each.compute_share, each.step) for each in self.history if each.compute_share is not None]
        return max((share / (1 - share) * step * self.flops for share, step in shares), default=0.0)

    @property
    def share(self) -> float:
        """Of the run's FLOPs, those of kernels in training not counted."""
        return self.extra / (self.extra + len(self.durations) * self.flops)

    def parts(self) -> dict[str, float]:
        """The share of each thing that a grower does."""
        probes = sum(each.event in ("chosen", "nothing") for each in self.history)
        judgements = sum(each.loss_with is not None for each in self.history)
        whole = self.extra + len(self.durations) * self.flops
        parts = {
            "probes": probes * PROBED * (self.flops + self.moments) / whole,
            "judgements": judgements * JUDGED * 2 * self.forward / whole,
        }
        return {**parts, "scores, and trials in vain": self.share - sum(parts.values())}


def phases(history: Sequence[GrowthRecord], steps: int) -> list[str]:
    """What a grower was at in each step, the first of which is step 1, by its records."""
    found = ["waiting"] * steps

    def fill(phase: str, first: int, last: int) -> None:
        for step in range(max(first, 1), min(last, steps) + 1):
            found[step - 1] = phase

    since = 0
    for record in history:
        if record.event in ("chosen", "nothing"):
            fill("probing", record.step - PROBED + 1, record.step)
        elif record.event == "in force":
            fill("scoring and staging", since + 1, record.step - 1)
            fill("coming into force", record.step, record.step)
        elif record.loss_with is not None:
            fill("on trial", since + 1, record.step - JUDGED)
            fill("judging", record.step - JUDGED + 1, record.step)
            fill("after a judgement", record.step + 1, record.step + SETTLING)
        since = record.step
    if history and history[-1].event == "chosen":  # which is still being compiled
        fill("scoring and staging", since + 1, steps)
    return found


def idle(rounds: int, platform: esper.Platform) -> tuple[float, float]:
    """The time of a step with a grower that waits, in steps without; and seconds of the grower's own part."""
    plain, grown = Trainer(0, 10**6, platform), Trainer(0, 10**6, platform)
    grower = grown.grower(first=10**9)
    figures = paired({"without": plain.step, "with": lambda: grower.step(grown.step())}, rounds, seconds=0.1)
    loss = plain.step().detach()
    alone = statistics.median(paired({"alone": lambda: grower.step(loss)}, rounds, seconds=0.01)["alone"])
    return ratio(figures, "with", "without"), alone


def timed(trainer: Trainer, steps: int, grower: esper.Grower | None, pause: float = 0.0) -> Run:
    """Train, and time each step; with a `pause` between two of them while a kernel is compiled."""
    trainer.step()
    durations, worked = [], []
    for _ in range(steps):
        start, before = time.perf_counter(), time.thread_time()
        loss = trainer.step()
        if grower is not None:
            grower.step(loss)
        durations.append(time.perf_counter() - start)
        worked.append(time.thread_time() - before)
        if pause and grower is not None and grower.history and grower.history[-1].event == "chosen":
            time.sleep(pause)
    sizes = linear_layers(trainer.model).values()
    moments = sum(2.0 * BATCH * ((i + 1) ** 2 + o**2 + o * (i + 1)) for i, o in sizes)
    forward = sum(2.0 * BATCH * i * o for i, o in sizes)
    return Run(durations, worked, () if grower is None else grower.history, trainer.flops, moments, forward)


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=30)
    runs: dict[int, Run] = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        idles = idle(options.rounds, platform)
        control = timed(Trainer(0, options.steps, platform), options.steps, None)
        for seed in range(options.seeds):
            trainer = Trainer(seed, options.steps, platform)
            grower = trainer.grower(first=round(FIRST * options.steps), until=round(UNTIL * options.steps))
            runs[seed] = timed(trainer, options.steps, grower, options.pause)
            print(grower, flush=True)
            grower.close()
    write(options, idles, control, runs, trainer.parameters)


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="runs with a grower")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between steps while a kernel is compiled, on a busy machine"
    )


def write(
    options: argparse.Namespace, idles: tuple[float, float], control: Run, runs: dict[int, Run], parameters: int
) -> None:
    """Tables, JSON and the plot."""
    title = f"A grower beside a compiled character model of {parameters:,} parameters, {options.steps:,} steps"
    columns = (
        "run",
        "growths kept",
        "probes",
        "median step, ms",
        "worst / median",
        "by the processor",
        "worst while",
        "of FLOPs",
    )
    plain = ("", "", 1e3 * control.median, f"{control.worst:.1f}", f"{control.worst_worked:.1f}", "", "")
    rows: list[tuple[Any, ...]] = [("without a grower", *plain)]
    rows += [_row(seed, run) for seed, run in runs.items()]
    worst, share = (max(values) for values in ([run.worst for run in runs.values()], [r.share for r in runs.values()]))
    worked = max(run.worst_worked for run in runs.values())
    goals = [
        ("a step with a waiting grower / without", f"{idles[0]:.3f}", f"{IDLE:.2f}", _verdict(idles[0] < IDLE + 0.005)),
        ("the grower's part of it, μs / a step's", f"{1e6 * idles[1]:.1f} / {1e6 * control.median:.0f}", "", ""),
        ("probes, scores and trials of all FLOPs", f"{share:.1%}", f"under {SHARE:.0%}", _verdict(share < SHARE)),
        ("worst step / median, by the clock", f"{worst:.1f}", f"at most {WORST:g}", _verdict(worst <= WORST)),
        ("the same by the processor's time", f"{worked:.1f}", f"at most {WORST:g}", _verdict(worked <= WORST)),
    ]
    report(
        "growth_cost",
        title,
        columns,
        rows,
        {
            "idle": idles,
            "control": _details(control),
            "runs": {seed: {**_details(run), "parts": run.parts()} for seed, run in runs.items()},
        },
        lambda axes: plot(axes, runs[0]),
        options,
        sections=[
            Section("Goals, by the worst of the runs", ("goal", "measured", "wanted", "verdict"), goals),
            Section(
                "By the processor's time: the longest step of each phase in ordinary ones (the median one)",
                *_by_phase(runs),
            ),
            Section(
                "Shares of the FLOPs", ("run", *runs[0].parts()), [_shares(seed, run) for seed, run in runs.items()]
            ),
        ],
    )


def _row(seed: int, run: Run) -> tuple[Any, ...]:
    by_phase = run.worst_by_phase()
    times = f"{run.worst:.1f}", f"{run.worst_worked:.1f}"
    kept = sum(each.event == "kept" for each in run.history)
    probes = sum(each.event in ("chosen", "nothing") for each in run.history)
    while_ = max(by_phase, key=lambda phase: by_phase[phase])
    return f"seed {seed}", kept, probes, 1e3 * run.median, *times, while_, f"{run.share:.1%}"


def _shares(seed: int, run: Run) -> tuple[str, ...]:
    return f"seed {seed}", *(f"{part:.2%}" for part in run.parts().values())


def _by_phase(runs: dict[int, Run]) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
    rows = []
    for phase in PHASES:
        cells = []
        for run in runs.values():
            found = run.worked_by_phase().get(phase)
            cells.append("" if found is None else f"{found[0]:.1f} ({found[1]:.1f})")
        rows.append((phase, *cells))
    return ("phase", *(f"seed {seed}" for seed in runs)), rows


def _details(run: Run) -> dict[str, Any]:
    return {
        "microseconds": [round(1e6 * each) for each in run.durations],
        "worked": [round(1e6 * each) for each in run.worked],
        "history": [each.state() for each in run.history],
        "share": run.share,
        "worst": run.worst_by_phase(),
    }


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def plot(axes: Axes, run: Run) -> None:
    """The time of each step, coloured by what the grower was at."""
    found = phases(run.history, len(run.durations))
    for phase in PHASES:
        steps = [step for step, each in enumerate(found) if each == phase]
        if steps:
            axes.scatter(steps, [run.worked[step] / statistics.median(run.worked) for step in steps], s=4, label=phase)
    axes.axhline(WORST, color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel="processor's time, ordinary steps", yscale="log")
    axes.set_yticks([1, 2, 3, 5], ["1", "2", "3", "5"])
    axes.yaxis.set_minor_formatter("")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
