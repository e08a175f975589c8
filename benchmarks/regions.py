"""Compiling a model as a whole or block by block: first steps, kernels and steps of llamas of growing depth.

Goals: from the request of a kernel to the first step with it 48 blocks take at most 1.2 times as long as 2, and kernels
in all blocks at most 1.3 times as long as one; a cold first step by blocks at most 0.35 of the whole model's at 24
blocks, and at most 1.1 of the plain model's by blocks; a steady step at most 1.03 of the whole model's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import Section, arguments, report, stoppable

GOALS = {"to_active_flat": 1.2, "all_to_one": 1.3, "first_to_whole": 0.35, "first_to_plain": 1.1, "step_to_whole": 1.03}
SIDES = ("plain, by blocks", "esper, by blocks", "plain, whole", "esper, whole")
_SIDE = "benchmarks.regions_sides:depth_side"


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=1)
    if options.quick:
        options.depths, options.whole, options.steps = [2, 6], [2], 30
    failures = Failures()
    figures: dict[str, dict[int, Any]] = {side: {} for side in SIDES}
    with tempfile.TemporaryDirectory() as name, stoppable():
        for depth in options.depths:
            for side in SIDES:
                if "whole" not in side or depth in options.whole:
                    figures[side][depth] = measured(side, depth, Path(name), options, failures)
    rows = list(first_rows(figures))
    report(
        "regions",
        "First training step of a llama, s",
        ("side", "blocks", "cold", "warm", "steady step, ms", "memory, MiB"),
        rows,
        {"goals": GOALS, "figures": figures},
        lambda *axes: plot(axes, figures),
        options,
        sections=[kernel_section(figures), goal_section(figures)],
        panels=(1, 2),
    )
    failures.finish()


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=["llama", "mlp", "transformer"], default="llama", help="which model")
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 6, 12, 24, 48], help="blocks")
    parser.add_argument("--whole", nargs="*", type=int, default=[2, 6, 12, 24], help="blocks compiled as a whole, too")
    parser.add_argument("--steps", type=int, default=100, help="steps of which the steady one is the median")
    parser.add_argument("--quick", action="store_true", help="2 and 6 blocks, and 2 as a whole")


def measured(side: str, depth: int, folder: Path, options: argparse.Namespace, failures: Failures) -> dict[str, Any]:
    """The figures of one side with nothing compiled before, and its first step in a second process as "warm"."""
    whose, how = side.split(", ")
    cache = folder / f"{whose}-{how}-{depth}".replace(" ", "-")
    results = [
        apart(
            _SIDE, cache, workload=options.workload, device=options.device, depth=depth, wrapped=whose == "esper",
            by_blocks=how == "by blocks", steps=steps, platform=str(folder / "platform"), threads=options.threads,
        )
        for steps in (options.steps, 0)
    ]  # fmt: skip
    for kind, result in zip(("cold", "warm"), results, strict=True):
        if isinstance(failures.note(f"{side}, {depth} blocks, {kind}", result), Failed):
            return {"failed": result.reason}
    cold, warm = results
    return {**cold, "warm": warm["first_step"]}


def first_rows(figures: Mapping[str, Mapping[int, Any]]) -> Iterable[tuple[Any, ...]]:
    """First steps, steady steps and memory, by side and depth."""
    for side, depths in figures.items():
        for depth, found in depths.items():
            if "failed" in found:
                yield side, depth, found["failed"], "", "", ""
            else:
                yield side, depth, found["first_step"], found["warm"], found["step"] * 1e3, found["memory_mib"]


def kernel_section(figures: Mapping[str, Mapping[int, Any]]) -> Section:
    """From the request of a kernel to the first step with it."""
    columns = ("side", "blocks", "one, s", "all blocks, s", "worst / median, one", "worst / median, all")
    rows = [
        (side, depth, *(found[kind]["to_active"] for kind in ("one", "all")),
         *(found[kind]["worst"] / found["step"] for kind in ("one", "all")))
        for side, depths in figures.items()
        for depth, found in depths.items()
        if "one" in found
    ]  # fmt: skip
    return Section("From the request of a kernel, and of one in every block, to the first step with it", columns, rows)


def goal_section(figures: Mapping[str, Mapping[int, Any]]) -> Section:
    """The ratios that have a goal, of the depths that were measured."""
    ours, plain = _found(figures, "esper, by blocks"), _found(figures, "plain, by blocks")
    whole = _found(figures, "esper, whole")
    rows: list[tuple[Any, ...]] = []
    if len(ours) > 1:
        least, most = min(ours), max(ours)
        flat = ours[most]["one"]["to_active"] / ours[least]["one"]["to_active"]
        rows.append((f"request to active, {most} blocks / {least}", flat, GOALS["to_active_flat"]))
        ratio = ours[most]["all"]["to_active"] / ours[most]["one"]["to_active"]
        rows.append((f"kernels in all of {most} blocks / in one", ratio, GOALS["all_to_one"]))
    for depth in sorted(ours.keys() & plain.keys()):
        ratio = ours[depth]["first_step"] / plain[depth]["first_step"]
        rows.append((f"first step, by blocks, {depth} blocks: esper / plain", ratio, GOALS["first_to_plain"]))
    for depth in sorted(ours.keys() & whole.keys()):
        ratio = ours[depth]["first_step"] / whole[depth]["first_step"]
        goal = GOALS["first_to_whole"] if depth >= 24 else ""
        rows.append((f"first step, {depth} blocks: by blocks / whole", ratio, goal))
        ratio = ours[depth]["step"] / whole[depth]["step"]
        rows.append((f"steady step, {depth} blocks: by blocks / whole", ratio, GOALS["step_to_whole"]))
    return Section("Ratios", ("figure", "ratio", "goal"), rows)


def _found(figures: Mapping[str, Mapping[int, Any]], side: str) -> dict[int, Any]:
    return {depth: found for depth, found in figures[side].items() if "failed" not in found}


def plot(axes: tuple[Axes, ...], figures: Mapping[str, Mapping[int, Any]]) -> None:
    """First steps, and the way of a kernel into the model, over depth."""
    left, right = axes
    for side in SIDES:
        found = _found(figures, side)
        if not found:
            continue
        line = "--" if "plain" in side else "-"
        left.plot(list(found), [each["first_step"] for each in found.values()], f"o{line}", label=side)
        if "esper" in side:
            for kind, mark in (("one", "o-"), ("all", "s:")):
                name = f"{side}, {'one block' if kind == 'one' else 'all blocks'}"
                right.plot(list(found), [each[kind]["to_active"] for each in found.values()], mark, label=name)
    left.set(xlabel="blocks", ylabel="s", title="first training step, cold", ylim=(0, None))
    right.set(xlabel="blocks", ylabel="s", title="from request to active", ylim=(0, None))
    for each in axes:
        each.legend(fontsize=7)


if __name__ == "__main__":
    main()
