"""Several ranks that train one model in DistributedDataParallel and change it while they do, eager, on gloo or nccl.

Goals: steps with nothing to agree about take as long as those of a plain model in DDP (1.00); the worst step at a swap
is at most twice the median, beside a swap of the module with DDP made anew; parameters are bit-identical among ranks
after 200 steps with three swaps, and those of one process on the joined batch to float tolerance; ranks that ask for a
swap up to 2 s apart have it at the same forward in 100 of 100 swaps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import Section, arguments, report

GOALS = {"idle": 1.0, "worst": 2.0, "among_ranks": 0.0}
_SIDES = "benchmarks.ranks_sides"


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=40)
    if options.quick:
        options.workloads, options.sizes, options.steps, options.rounds, options.swaps = ["mlp"], [2], 60, 5, 5
    failures = Failures()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in options.sizes:
            for workload in options.workloads:
                figures[f"{workload}, {size} ranks"] = together(
                    "training_side", size, Path(name), failures, workload=workload, device=options.device,
                    steps=options.steps, rounds=options.rounds,
                )  # fmt: skip
            figures[f"swaps, {size} ranks"] = together(
                "agreement_side", size, Path(name), failures, swaps=options.swaps, longest=options.longest
            )
    report(
        "ranks",
        "Training in DDP, with three swaps",
        (
            "workload",
            "step, ms",
            "idle / plain",
            "worst at a swap / median",
            "of a module swap",
            "among ranks",
            "to one",
        ),
        list(training_rows(figures)),
        {"goals": GOALS, "figures": figures},
        lambda axes: plot(axes, figures),
        options,
        sections=[swap_section(figures)],
    )
    failures.finish()


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", nargs="+", default=["mlp", "llama"], help="models")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--steps", type=int, default=200, help="steps with three swaps in them")
    parser.add_argument("--swaps", type=int, default=100, help="swaps that ranks ask for at different times")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds by which one may ask later than another")
    parser.add_argument("--quick", action="store_true", help="an MLP on two ranks, and little of all")


def together(side: str, size: int, folder: Path, failures: Failures, **options: Any) -> list[Any]:
    """What each of `size` ranks returns, which run side by side in processes of their own."""
    rendezvous = folder / f"rendezvous-{side}-{size}-{options.get('workload', '')}"

    def rank(number: int) -> Any:
        return apart(
            f"{_SIDES}:{side}", folder / "cache", rank=number, size=size, rendezvous=str(rendezvous),
            platform=str(folder / f"platform-{side}"), **options,
        )  # fmt: skip

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, range(size)))
    return [failures.note(f"{side}, {options.get('workload', '')} rank {i}", each) for i, each in enumerate(results)]


def _found(figures: Mapping[str, Any], kind: str) -> Iterable[tuple[str, list[Any]]]:
    for name, ranks in figures.items():
        if name.startswith("swaps") == (kind == "swaps") and not any(isinstance(each, Failed) for each in ranks):
            yield name, ranks


def training_rows(figures: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
    """The slowest rank counts, as all wait for it."""
    for name, ranks in _found(figures, "training"):
        yield (
            name,
            max(each["step"] for each in ranks) * 1e3,
            max(each["idle"] for each in ranks),
            max(each["worst"] / each["step"] for each in ranks),
            max(each["peer"]["worst"] / each["peer"]["step"] for each in ranks),
            max(each["among_ranks"] for each in ranks),
            f"{max(each['to_one'] for each in ranks):.1e}",
        )


def swap_section(figures: Mapping[str, Any]) -> Section:
    """Whether swaps came at one forward, and how long they took from the last rank's request."""
    rows = []
    for name, ranks in _found(figures, "swaps"):
        forwards = list(zip(*(each["forwards"] for each in ranks), strict=True))
        last = [min(each) for each in zip(*(each["seconds"] for each in ranks), strict=True)]
        same = sum(len(set(each)) == 1 for each in forwards)
        rows.append((name, f"{same} of {len(forwards)}", statistics.median(last) * 1e3, max(last) * 1e3))
    columns = ("ranks", "swaps at one forward", "median from the last request, ms", "longest, ms")
    return Section("Swaps that ranks ask for at different times", columns, rows)


def plot(axes: Axes, figures: Mapping[str, Any]) -> None:
    """The worst step at a swap, of Esper and of a module swap."""
    found = list(_found(figures, "training"))
    names = [name for name, _ in found]
    for shift, label in ((-0.2, "esper"), (0.2, "module swap and DDP anew")):
        heights = [
            max((each if shift < 0 else each["peer"])["worst"] / each["step"] for each in ranks) for _, ranks in found
        ]
        axes.bar([place + shift for place in range(len(names))], heights, 0.4, label=label)
    axes.axhline(GOALS["worst"], linestyle=":", color="grey")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="worst step at a swap / median", ylim=(0, None))
    axes.legend()


if __name__ == "__main__":
    main()
