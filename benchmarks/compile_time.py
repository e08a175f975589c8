"""Waiting times for compiled code: with seeds and without, from nothing, from the caches, and for a kernel.

Goals: compiling a wrapped model at most 1.10 times as long as compiling the plain one; with `cold_start="eager"` a
first step at most 1.1 times as long as Dynamo's own trace of the plain model and a step with what it traced, which is
the least that `torch.compile` allows; nothing compiled by the second process that runs the same script.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import Section, arguments, report
from benchmarks.step_trace import StepTrace
from benchmarks.workloads import WORKLOADS

GOALS = {"ratio": 1.10, "first": 1.1, "compilations": 0}
BACKENDS = ("inductor", "esper")
DEPTHS = (2, 6, 12, 24)
_SIDES = "benchmarks.compile_time_sides"
_BLOCKS = {"llama": 12}
"""Blocks of models that are deeper here than elsewhere, and timed once when nothing is compiled."""


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=3)
    if options.quick:
        options.rounds, options.models, options.depths, options.steps = 1, options.models[:1], [2, 6], 60
    failures = Failures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiling = {each: compile_times(each, folder, options, failures) for each in options.models}
        starts = {each: cold_start(each, folder, options, failures) for each in options.models}
        processes = both_processes(options.models[0], folder, options, failures)
        depths = {each: to_active(each, folder, options, failures) for each in options.depths}
    rows = [row for each, figures in compiling.items() for row in compile_rows(each, figures)]
    report(
        "compile_time",
        "From torch.compile to the end of the first training step, s",
        ("case", "inductor, plain", "esper, dormant", "ratio"),
        rows,
        {"goals": GOALS, "compiling": compiling, "starts": starts, "processes": processes, "depths": depths},
        lambda *axes: plot(axes, rows, depths),
        options,
        sections=[start_section(starts), process_section(processes), depth_section(depths)],
        panels=(1, 2),
    )
    failures.finish()


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", choices=list(WORKLOADS), default=["mlp", "transformer", "llama"], help="which models"
    )
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS), help="blocks of the MLP")
    parser.add_argument("--steps", type=int, default=150, help="steps before and after a kernel is requested")
    parser.add_argument("--quick", action="store_true", help="one round, the first model, 2 and 6 blocks")


# ---- measuring -----------------------------------------------------------------------------------------------------


def compile_times(
    workload: str, folder: Path, options: argparse.Namespace, failures: Failures
) -> dict[str, list[float]]:
    """Seconds of a first step by "backend, cold" and "backend, warm", one value a round.

    Cold is with an empty folder of compiled code, warm a second process with the folder that the first has filled.
    """
    figures: dict[str, list[float]] = {f"{each}, {kind}": [] for each in BACKENDS for kind in ("cold", "warm")}
    for round_ in range(options.rounds):
        for backend in BACKENDS if round_ % 2 == 0 else BACKENDS[::-1]:
            is_long = workload in _BLOCKS
            cache = folder / f"compile-{workload}-{backend}-{0 if is_long else round_}"
            for kind in ("warm",) if is_long and round_ else ("cold", "warm"):
                seconds = apart(
                    f"{_SIDES}:first_step_side", cache, workload=workload, device=options.device, backend=backend,
                    threads=options.threads, blocks=_BLOCKS.get(workload),
                )  # fmt: skip
                if not isinstance(failures.note(f"{workload}, {backend}, {kind}", seconds), Failed):
                    figures[f"{backend}, {kind}"].append(seconds)
    return figures


def cold_start(workload: str, folder: Path, options: argparse.Namespace, failures: Failures) -> Any:
    """What `cold_start_side` measures with nothing compiled before, or the reason why not."""
    result = apart(
        f"{_SIDES}:cold_start_side", folder / f"start-{workload}", workload=workload, device=options.device,
        threads=options.threads, blocks=_BLOCKS.get(workload),
    )  # fmt: skip
    return _or_reason(failures.note(f"{workload}, cold_start", result))


def both_processes(workload: str, folder: Path, options: argparse.Namespace, failures: Failures) -> dict[str, Any]:
    """A training run in which a kernel comes and goes, and the same again in another process: what each compiled."""
    results = {}
    for which in ("first", "second"):
        result = apart(
            "benchmarks.hot_swap_sides:esper_side", folder / "processes", workload=workload, device=options.device,
            steps=options.steps, platform=str(folder / "platform"), with_control=False,
            threads=options.threads,
        )  # fmt: skip
        result = failures.note(f"{which} process", result)
        results[which] = _or_reason(result)
        if not isinstance(result, Failed):
            results[which]["request_to_active"] = StepTrace.from_json(result.pop("trace")).request_to_active
    return results


def to_active(blocks: int, folder: Path, options: argparse.Namespace, failures: Failures) -> Any:
    """The figures of a kernel's way into an MLP of `blocks` blocks, with nothing compiled before."""
    result = apart(
        "benchmarks.hot_swap_sides:esper_side", folder / f"depth-{blocks}", workload="mlp", device=options.device,
        steps=options.steps, platform=str(folder / "platform"), blocks=blocks, with_control=False,
        threads=options.threads,
    )  # fmt: skip
    if isinstance(failures.note(f"{blocks} blocks", result), Failed):
        return _or_reason(result)
    trace = StepTrace.from_json(result["trace"])
    return {
        "first_step": result["first_step"],
        "request_to_active": trace.request_to_active,
        "steps_meanwhile": len(trace.phase("preparing")),
        "median": trace.median("before"),
        "worst": trace.worst,
    }


def _or_reason(result: Any) -> Any:
    return {"failed": result.reason} if isinstance(result, Failed) else result


# ---- reporting -----------------------------------------------------------------------------------------------------


def compile_rows(workload: str, figures: Mapping[str, list[float]]) -> Iterable[tuple[Any, ...]]:
    """One row for cold and one for warm; medians over the rounds."""
    for kind in ("cold", "warm"):
        plain, ours = figures[f"inductor, {kind}"], figures[f"esper, {kind}"]
        if plain and ours:
            times = statistics.median(plain), statistics.median(ours)
            yield f"{_titled(workload)}, {kind}", *times, times[1] / times[0]


def _titled(workload: str) -> str:
    what = WORKLOADS[workload]
    return f"{what.title}, {_BLOCKS.get(workload, what.blocks)} blocks"


def start_section(starts: Mapping[str, Any]) -> Section:
    """The first step with `cold_start="eager"`."""
    columns = (
        "case", "eager step, ms", "trace and a step, ms", "first step, ms", "first / trace and step", "worst later, ms",
        "compiled after, s", "steps until then and 200 more",
    )  # fmt: skip
    rows = [
        (
            title, f["step"] * 1e3, f["trace"] * 1e3, f["first"] * 1e3, f["first"] / f["trace"], f["worst"] * 1e3,
            f["compiled"], f["steps"],
        )
        if "failed" not in f
        else (title, f["failed"], *[""] * 6)
        for title, f in ((_titled(name), figures) for name, figures in starts.items())
    ]  # fmt: skip
    return Section('First step under options={"cold_start": "eager"}', columns, rows)


def process_section(processes: Mapping[str, Any]) -> Section:
    """What two processes compiled that run the same script."""
    columns = ("process", "compiled in it", "compiled by workers", "from the store", "first step, s", "to active, s")
    rows = [
        (name, *compilations(f), f["first_step"], f["request_to_active"])
        if "failed" not in f
        else (name, f["failed"], *[""] * 4)
        for name, f in processes.items()
    ]
    return Section("The same script in a second process: compilations", columns, rows)


def compilations(process: Mapping[str, Any]) -> tuple[int, int, int]:
    """How many graphs Inductor compiled in the process, how many its workers did, and how many came from the store."""
    variants = [variant["origin"] for graph in process["report"]["graphs"] for variant in graph["variants"]]
    return process["fxgraph_cache_misses"], variants.count("worker"), variants.count("store")


def depth_section(depths: Mapping[int, Any]) -> Section:
    """From the request of a kernel to the first step with it."""
    columns = (
        "blocks", "first step of the model, s", "request to active, s", "steps meanwhile", "median step, ms",
        "worst / median",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for blocks, figures in depths.items():
        if "failed" in figures:
            rows.append((blocks, figures["failed"], *[""] * 4))
            continue
        worst = figures["worst"] / figures["median"]
        times = figures["first_step"], figures["request_to_active"]
        rows.append((blocks, *times, figures["steps_meanwhile"], figures["median"] * 1e3, worst))
    return Section("From the request of a kernel to the first step with it, MLP", columns, rows)


def plot(axes: tuple[Axes, ...], rows: Iterable[tuple[Any, ...]], depths: Mapping[int, Any]) -> None:
    """First steps side by side, and what a kernel takes by depth."""
    left, right = axes
    rows = list(rows)
    places = range(len(rows))
    left.bar([place - 0.2 for place in places], [row[1] for row in rows], 0.4, label="inductor, plain")
    left.bar([place + 0.2 for place in places], [row[2] for row in rows], 0.4, label="esper, dormant")
    left.set_xticks(list(places), [row[0] for row in rows], rotation=20, fontsize=7)
    left.set(ylabel="s", title="first training step")
    left.legend(fontsize=7)
    measured = {blocks: figures for blocks, figures in depths.items() if "failed" not in figures}
    right.plot(list(measured), [f["first_step"] for f in measured.values()], "s--", label="first step of the model")
    right.plot(list(measured), [f["request_to_active"] for f in measured.values()], "o-", label="request to active")
    right.set(xlabel="blocks", ylabel="s", title="a kernel for an MLP", ylim=(0, None))
    right.legend(fontsize=7)


if __name__ == "__main__":
    main()
