"""The cost of active seeds, against the same network written by hand in plain PyTorch, both compiled by Inductor.

By hand, a layer holds its kernels as modules and blends them in a loop, with `torch.lerp` and alphas from a buffer.
With `batch_seeds` off, Esper inlines the kernels one by one, as the loop does; the goal is at most 1.02. With it on,
kernels of one blueprint at one layer run as one batched product where that pays; from 4 seeds on, the goal is to be
faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.apart import Failed, Failures, apart
from benchmarks.harness import arguments, ratio, report, stoppable

GOALS = {"one by one": 1.02, "batched": 1.0}
KINDS = ("forward", "training")


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    if options.quick:
        options.seeds, options.rounds = options.seeds[:2], 6
    failures = Failures()
    rows: list[tuple[str, float, float, float]] = []
    details: dict[str, Any] = {"goals": GOALS}
    with tempfile.TemporaryDirectory() as folder, stoppable():
        for seeds in options.seeds:
            for batching in GOALS:
                figures = apart(
                    "benchmarks.active_overhead_sides:active_side", Path(folder) / f"seeds-{seeds}", seeds=seeds,
                    batch_seeds=batching == "batched", device=options.device, rounds=options.rounds,
                    platform=str(Path(folder) / "platform"), threads=options.threads,
                )  # fmt: skip
                if isinstance(failures.note(f"{seeds} seeds, {batching}", figures), Failed):
                    continue
                for kind in KINDS:
                    case = f"{seeds} seed{'' if seeds == 1 else 's'} a layer, {batching}, {kind}"
                    details[case] = {"seeds": seeds, "batching": batching, **figures[kind]}
                    times = {side: statistics.median(figures[kind][side]) * 1e6 for side in ("hand", "esper")}
                    rows.append((case, times["hand"], times["esper"], ratio(figures[kind], "esper", "hand")))

    def plot(axes: Axes) -> None:
        axes.barh([row[0] for row in rows][::-1], [row[3] for row in rows][::-1])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("Esper / by hand, median of paired rounds")
        axes.tick_params(axis="y", labelsize=7)

    report(
        "active_overhead",
        "Active seeds against the same network written by hand",
        ("case", "by hand, μs", "esper, μs", "ratio"),
        rows,
        details,
        plot,
        options,
    )
    failures.finish()


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 4, 16], help="active seeds at every layer")
    parser.add_argument("--quick", action="store_true", help="the first two numbers of seeds, 6 rounds")


if __name__ == "__main__":
    main()
