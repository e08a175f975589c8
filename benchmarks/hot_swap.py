"""The cost of a hot swap to a training loop that does not stop for it: every step timed, before, during and after.

A kernel is requested, compiled into the model, loaded, committed, used and unloaded again while the model trains, on
one core; compile workers run on the others. The peers do the same: a module swap under plain `torch.compile`, and
PEFT's hotswap of a LoRA in a model prepared for it. Goals: the worst step at most twice the median, at most 0.3 s lost
in all, and nothing paid while no kernel is there.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import Section, arguments, ratio, report, stoppable
from benchmarks.step_trace import PHASES, StepTrace
from benchmarks.workloads import WORKLOADS

WAYS = {"esper": "Esper", "swap": "module swap", "peft": "PEFT"}
GOALS = {"worst": 2.0, "lost": 0.3, "idle": 1.0}
COLUMNS = (
    "case", "median step, ms", "worst step, ms", "worst / median", "steps lost", "seconds lost",
    "control: worst / median", "control: seconds lost", "request to active, s", "idle / plain",
)  # fmt: skip
MEDIAN_COLUMNS = (
    "case", "before", "preparing", "with the kernel", "after", "control", "steps meanwhile", "lost to slower steps, s",
)  # fmt: skip


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    if options.quick:
        options.steps, options.rounds = 60, 6
    failures = Failures()
    details: dict[str, Any] = {"goals": GOALS, "models": {}}
    with tempfile.TemporaryDirectory() as folder, stoppable():
        for name in options.models:
            sides = details["models"][name] = {}
            measure(sides, name, Path(folder), options, failures)
    write(details, options)
    failures.finish()


def write(details: dict[str, Any], options: argparse.Namespace) -> None:
    """Print and write what has been measured so far."""
    details = copy.deepcopy(details)
    cases = {
        (name, way): f"{WORKLOADS[name].title}, {WORKLOADS[name].blocks} blocks: {title}"
        for name, sides in details["models"].items()
        for way, title in WAYS.items()
        if way in sides
    }
    details["cases"] = {case: name for (name, _), case in cases.items()}
    traces = {key: StepTrace.from_json(details["models"][key[0]][key[1]]["trace"]) for key in cases}
    idle = {key: _idle(details["models"][key[0]].get("idle"), key[1]) for key in cases}
    for trace, key in ((trace, key) for key, trace in traces.items()):  # the control is in the figures
        details["models"][key[0]][key[1]]["trace"] = trace.without_control().to_json()
    report(
        "hot_swap",
        "A kernel comes and goes while the model trains",
        COLUMNS,
        [_row(case, traces[key], idle[key]) for key, case in cases.items()],
        details,
        lambda *axes: plot(axes, traces),
        options,
        sections=[
            Section("Median step of each phase, ms", MEDIAN_COLUMNS, [_medians(c, traces[k]) for k, c in cases.items()])
        ],
        panels=(max(len(details["models"]), 1), 1),
    )


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="which models")
    parser.add_argument("--steps", type=int, default=300, help="steps before, with the kernel, and after")
    parser.add_argument("--quick", action="store_true", help="60 steps, 6 rounds")


def measure(results: dict[str, Any], name: str, folder: Path, options: argparse.Namespace, failures: Failures) -> None:
    """All sides of one model, each in a process of its own, into `results`.

    What is compiled before training begins is compiled by the first of them; each of the others starts with a copy of
    its folder of compiled code, so that no side finds what another compiled while it trained.
    """
    common = {"workload": name, "device": options.device, "threads": options.threads}
    platform = str(folder / "platform")
    compiled = folder / name
    compiled.mkdir()
    sides = {
        "idle": {"rounds": options.rounds, "platform": platform},
        "esper": {"steps": options.steps, "platform": platform},
        "swap": {"steps": options.steps},
        "peft": {"steps": options.steps},
    }
    for side, arguments_ in sides.items():
        cache = compiled if side == "idle" else Path(shutil.copytree(compiled, folder / f"{name}-{side}"))
        result = apart(f"benchmarks.hot_swap_sides:{side}_side", cache, **common, **arguments_)
        if not isinstance(failures.note(f"{name}, {side}", result), Failed):
            results[side] = result


def _idle(figures: Any, way: str) -> float | None:
    return None if figures is None or way == "swap" else ratio(figures, way, "plain")


def _row(case: str, trace: StepTrace, idle: float | None) -> tuple[Any, ...]:
    ordinary, control = trace.median("before"), statistics.median(trace.phase("control"))
    return (
        case, ordinary * 1e3, trace.worst * 1e3, trace.worst / ordinary, trace.lost / ordinary, trace.lost,
        trace.control_worst / control, trace.control_lost, trace.request_to_active, "" if idle is None else idle,
    )  # fmt: skip


def _medians(case: str, trace: StepTrace) -> tuple[Any, ...]:
    medians = [trace.median(name) * 1e3 if len(trace.phase(name)) else "" for name in PHASES]
    return (case, *medians, len(trace.phase("preparing")), trace.slowed)


def plot(axes: tuple[Axes, ...], traces: Mapping[tuple[str, str], StepTrace]) -> None:
    """One panel a model: step times over the time since the request, Esper's phases shaded."""
    names = list(dict.fromkeys(name for name, _ in traces))
    for panel, name in zip(axes, names, strict=False):
        for (model, way), trace in traces.items():
            if model != name:
                continue
            ends, moment = [], -sum(trace.phase("before"))
            for duration in trace.durations[: trace.ended]:
                moment += duration
                ends.append(moment)
            shown = [duration * 1e3 for duration in trace.durations[: trace.ended]]
            panel.plot(ends, shown, "." if way != "esper" else "-", markersize=3, linewidth=0.8, label=WAYS[way])
            if way == "esper":
                bounds = (trace.requested, trace.in_force, trace.unloaded, trace.ended)
                moments = [ends[bound - 1] for bound in bounds]
                for start, end, colour in zip(moments, moments[1:], ("0.92", "0.82", "0.96"), strict=False):
                    panel.axvspan(start, end, color=colour, zorder=0)
                panel.axhline(
                    GOALS["worst"] * trace.median("before") * 1e3, color="black", linewidth=0.6, linestyle=":"
                )
        panel.set(yscale="log", ylabel="step, ms", title=WORKLOADS[name].title)
        panel.legend(fontsize=7, loc="upper right")
    shades = "shaded: preparing, with the kernel, unloaded (Esper); dotted: the goal"
    axes[-1].set_xlabel(f"seconds since the request; {shades}", fontsize=8)


if __name__ == "__main__":
    main()
