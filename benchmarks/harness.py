"""The harness of the benchmarks: interleaved timing, ratios, and a table, a JSON file and a plot for every run.

The machines are shared and their speed drifts, so alternatives are always timed in turn within one process, a round at
a time, and compared round by round: a figure is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["Figures", "Section", "arguments", "paired", "ratio", "report", "stoppable"]

RESULTS = Path(__file__).parent / "results"
_FILE_WIDTH = 160  # of tables that are not shown on a terminal

Figures = dict[str, list[float]]
"""Seconds per call, one value a round, by the name of what was timed."""


@dataclass(frozen=True)
class Section:
    """One more table of a benchmark, below its first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def print(self, console: Console) -> None:
        """Show it."""
        table = Table(title=self.title)
        for column in self.columns:
            table.add_column(column, justify="left" if column == self.columns[0] else "right")
        for row in self.rows:
            table.add_row(*map(_shown, row))
        console.print(table)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return {"title": self.title, "columns": list(self.columns), "rows": [list(row) for row in self.rows]}


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3f}" if abs(cell) < 100 else f"{cell:.1f}"


def arguments(
    description: str, extend: Callable[[argparse.ArgumentParser], None] = lambda _: None, rounds: int = 40
) -> argparse.Namespace:
    """The command line of every benchmark; `extend` adds a benchmark's own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds; the figures are medians over them")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file and the plot")
    extend(parser)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


@contextmanager
def stoppable() -> Iterator[None]:
    """Measurements that Ctrl-C, or a SIGINT, ends early: what was measured before is reported."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has programs in the background ignore it
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: what was measured until now follows", flush=True)


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
    gc.collect()  # and left on: what collects in a user's program collects here
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            function, count = alternatives[name], calls[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            synchronise()
            figures[name].append((time.perf_counter() - start) / count)
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
        "command": _command(sys.argv),
    }


def _command(words: Sequence[str]) -> str:
    """How to measure the same; where the files went is nobody else's business."""
    where = words.index("--results") if "--results" in words else len(words)
    return " ".join([f"python -m benchmarks.{Path(words[0]).stem}", *words[1:where], *words[where + 2 :]])


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
    plot: Callable[..., None],
    options: argparse.Namespace,
    *,
    sections: Sequence[Section] = (),
    panels: tuple[int, int] = (1, 1),
) -> None:
    """Print the tables and write `<name>.json` and `.png` (with the device's type in the name, unless the CPU).

    `plot` gets one `Axes` for each of the rows times columns of `panels`; one panel has the title of the benchmark, of
    several each has its own. `options` come from :func:`arguments`.
    """
    about = machine(options.device)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for section in (Section(title, columns, rows), *sections):
        section.print(console)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    options.results.mkdir(parents=True, exist_ok=True)
    stem = name if options.device == "cpu" else f"{name}-{options.device.split(':')[0]}"
    document = {
        "machine": about,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "details": dict(details),
    }
    if sections:
        document["sections"] = [section.to_json() for section in sections]
    (options.results / f"{stem}.json").write_text(_compact(json.dumps(document, indent=1)) + "\n")
    down, across = panels
    size = (8, 4.5) if panels == (1, 1) else (max(9, 6 * across), max(4.5, 3 * down))
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    plot(*axes.flat)
    if panels == (1, 1):
        axes[0, 0].set_title(title)
    else:
        figure.suptitle(title)
    figure.savefig(options.results / f"{stem}.png", dpi=120)
    plt.close(figure)


def _compact(text: str) -> str:
    """Indented JSON with lists of numbers on one line."""
    return re.sub(r"\[\s+(?:-?\d[\d.eE+-]*,?\s+)+\]", lambda match: " ".join(match[0].split()), text)
