"""What the benchmarks share: interleaved timing, ratios, and a table, a JSON file and a plot for every run.

The machines are shared and their speed drifts, so alternatives are always timed in turn within one process, a round at
a time, and compared round by round: a figure is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["Figures", "arguments", "paired", "ratio", "report"]

RESULTS = Path(__file__).parent / "results"

Figures = dict[str, list[float]]
"""Seconds per call, one value a round, by the name of what was timed."""


def arguments(description: str) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=40, help="rounds; the figures are medians over them")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def paired(alternatives: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.05) -> Figures:
    """Time `alternatives` in turn; each gets about `seconds` in each of `rounds` rounds, in changing order."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    calls = {}
    for name, function in alternatives.items():
        for _ in range(3):
            function()
        synchronise()
        start = time.perf_counter()
        for _ in range(5):
            function()
        synchronise()
        calls[name] = max(1, int(seconds / max((time.perf_counter() - start) / 5, 1e-7)))
    figures: Figures = {name: [] for name in alternatives}
    names = list(alternatives)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                function, count = alternatives[name], calls[name]
                start = time.perf_counter()
                for _ in range(count):
                    function()
                synchronise()
                figures[name].append((time.perf_counter() - start) / count)
    finally:
        gc.enable()
    return figures


def ratio(figures: Figures, of: str, to: str) -> float:
    """The median over rounds of `of` divided by `to`."""
    return statistics.median(a / b for a, b in zip(figures[of], figures[to], strict=True))


def machine(device: str) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    details: Mapping[str, Any],
    plot: Callable[[Axes], None],
    device: str = "cpu",
) -> None:
    """Print a table and write `results/<name>.json` and `.png` (with the device's type in the name, unless the CPU)."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    about = machine(device)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    RESULTS.mkdir(exist_ok=True)
    stem = name if device == "cpu" else f"{name}-{device.split(':')[0]}"
    document = {
        "machine": about,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "details": dict(details),
    }
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    plot(axes)
    axes.set_title(title)
    figure.savefig(RESULTS / f"{stem}.png", dpi=120)
    plt.close(figure)
