"""Ten LoRA adapters swapped in turn in a compiled llama, training and inference, by Esper and by PEFT's hotswap.

Goals: worst step while swapping and steady step below PEFT's, a dormant model as fast as the plain one, and a swap to
another adapter of a known structure staged within 50 ms, off the training thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.adapters_sides import write_adapters
from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import Section, arguments, ratio, report

GOALS = {"worst_to_peft": 1.0, "step_to_peft": 1.0, "idle": 1.0, "staged_ms": 50.0}
KINDS = ("training", "inference")
_MODULE = "benchmarks.adapters_sides"


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=20)
    if options.quick:
        options.depth, options.adapters, options.steps, options.rounds = 1, 3, 10, 3
    failures = Failures()
    figures: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder / "adapters", options.workload, options.depth, options.rank, options.adapters)
        for kind in KINDS:
            for side, found in measured(kind, folder, options).items():
                failures.note(f"{side}, {kind}", found)
                figures[kind][side] = {"failed": found.reason} if isinstance(found, Failed) else found
    report(
        "adapters",
        f"{options.adapters} LoRA adapters in turn, on all layers of attention",
        ("what", "side", "steady step, ms", "worst step of a swap, ms", "a typical one, ms", "swap, ms", "worst, ms"),
        list(swap_rows(figures)),
        {"goals": GOALS, "figures": figures},
        lambda *axes: plot(axes, figures),
        options,
        sections=[goal_section(figures), import_section(figures)],
        panels=(1, 2),
    )
    failures.finish()


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=["llama"], default="llama", help="which model")
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--adapters", type=int, default=10, help="how many")
    parser.add_argument("--steps", type=int, default=100, help="steps between two swaps")
    parser.add_argument("--quick", action="store_true", help="one block and three adapters, to try it in some minutes")
    parser.add_argument("--cache", type=Path, help="compiled code is kept there and found again; by default it is not")


def measured(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of both sides while they swap, of both in turn with an adapter, and of both while idle."""
    what = {
        "workload": options.workload, "device": options.device, "depth": options.depth, "threads": options.threads,
        "training": kind == "training",
    }  # fmt: skip
    platform = str(folder / "platform")
    swapping = {**what, "steps": options.steps, "adapters": str(folder / "adapters")}
    in_turn = {**what, "rounds": options.rounds, "platform": platform}
    cache = options.cache or folder / kind  # for all sides: most of the time is the C++ compiler's

    def measured(side: str, **arguments: Any) -> Any:
        return apart(f"{_MODULE}:{side}_side", cache, **arguments)

    return {
        "esper": measured("esper", **swapping, platform=platform),
        "peft": measured("peft", **swapping),
        "steady": measured("steady", **in_turn, adapters=str(folder / "adapters")),
        "idle": measured("idle", **in_turn, rank=options.rank),
    }


def swap_rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Steps and swaps of each side, in milliseconds."""
    for kind, sides in figures.items():
        for side in ("esper", "peft"):
            found = sides[side]
            if "failed" in found:
                yield kind, side, found["failed"], "", "", "", ""
            else:
                names = ("step", "worst", "typical_worst", "latency", "latency_worst")
                yield kind, side, *(found[name] * 1e3 for name in names)


def goal_section(figures: Mapping[str, Mapping[str, Any]]) -> Section:
    """The figures that have a goal."""
    rows: list[tuple[Any, ...]] = []
    for kind, sides in figures.items():
        ours, theirs, steady, idle = (sides[name] for name in ("esper", "peft", "steady", "idle"))
        if "failed" not in ours and "failed" not in theirs:
            worst = ours["worst"] / theirs["worst"]
            rows.append((f"{kind}: worst step of a swap, esper / peft", worst, GOALS["worst_to_peft"]))
        if "failed" not in steady:
            rows.append((f"{kind}: steady step, esper / peft", ratio(steady, "esper", "peft"), GOALS["step_to_peft"]))
        if "failed" not in ours:
            for figure, name in (("staged after", "latency"), ("staged again after", "latency_again")):
                rows.append((f"{kind}: {figure}, ms", ours[name] * 1e3, GOALS["staged_ms"]))
        if "failed" not in idle:
            rows.append((f"{kind}: idle, esper / plain", ratio(idle, "esper", "plain"), GOALS["idle"]))
            rows.append((f"{kind}: idle, peft / plain", ratio(idle, "peft", "plain"), ""))
    return Section("Ratios", ("figure", "value", "goal"), rows)


def import_section(figures: Mapping[str, Mapping[str, Any]]) -> Section:
    """What it takes to make kernels of an adapter, which is done once and in the background."""
    rows = [
        (kind, sides["esper"]["import_first"], sides["esper"]["import_next"])
        for kind, sides in figures.items()
        if "failed" not in sides["esper"]
    ]
    return Section("From an adapter's folder to its kernels, s", ("what", "the first", "another"), rows)


def plot(axes: tuple[Axes, ...], figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Steady and worst steps, side by side."""
    for axis, (kind, sides) in zip(axes, figures.items(), strict=True):
        found = {side: sides[side] for side in ("esper", "peft") if "failed" not in sides[side]}
        places = range(len(found))
        axis.bar([each - 0.2 for each in places], [each["step"] * 1e3 for each in found.values()], 0.4, label="steady")
        worst = [each["worst"] * 1e3 for each in found.values()]
        axis.bar([each + 0.2 for each in places], worst, 0.4, label="worst of a swap")
        axis.set_xticks(list(places), list(found))
        axis.set(ylabel="ms a step", title=kind, ylim=(0, None))
        axis.legend()


if __name__ == "__main__":
    main()
