"""The GPU run, of limited length: the tests marked `gpu`, and the headline benchmarks.

Each part is a process of its own and gets the time that is left, at most its own limit; then it is told to stop, and
reports what it has measured. Needs
torch with CUDA, pytest, and what Esper itself needs. `on_gpu.json` says how each part ended; the benchmarks write
their own files, `<name>-cuda.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, machine

COLUMNS = ["part", "state", "seconds", "last line"]
ROOT = Path(__file__).parent.parent
_LEAST = 20.0  # seconds that a part is worth starting with


@dataclass(frozen=True)
class Part:
    """A command and how long it may take, in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and the last line that it printed."""

    part: str
    state: str
    seconds: float
    last_line: str = ""


def parts(results: Path) -> list[Part]:
    """The tests, then the benchmarks, the most telling first."""
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))
    ]

    def benchmark(name: str, limit: float, *options: str) -> Part:
        command = ("-m", f"benchmarks.{name}", "--device", "cuda", "--results", str(results), *options)
        return Part(name, command, limit)

    return [
        Part("tests", ("-m", "pytest", "-m", "gpu", "-q", *marked), 180),
        benchmark("dormant_overhead", 90, "--rounds", "12"),
        benchmark("regions", 150, "--depths", "2", "12", "--whole", "--steps", "50"),
        benchmark("hot_swap", 240, "--models", "mlp", "transformer", "--steps", "200", "--rounds", "6"),
        benchmark("active_overhead", 60, "--quick"),
        benchmark("seed_scaling", 60, "--rounds", "6"),
    ]


def run(part: Part, left: float) -> Outcome:
    """Run a part, for at most its own limit and the time that is left."""
    limit = min(part.limit, left)
    if limit < min(_LEAST, part.limit):
        return Outcome(part.name, "skipped: no time left", 0.0)
    print(f"==== {part.name}: {' '.join(part.command)}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *part.command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    printed, state = "", ""
    try:
        printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that what it started is ended by it
        try:
            printed, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
        state = f"stopped after {limit:.0f} s"
    print(printed, flush=True)
    lines = printed.strip().splitlines() or [""]
    state = state or ("done" if process.returncode == 0 else f"failed: status {process.returncode}")
    return Outcome(part.name, state, time.perf_counter() - started, lines[-1])


def main() -> None:
    every = {part.name: part for part in parts(RESULTS)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=440.0, help="time for all parts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON files and plots")
    parser.add_argument("--parts", nargs="+", choices=list(every), default=list(every), help="which parts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device, and torch sees none: nothing was run")
    end = time.perf_counter() + options.seconds
    options.results.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in parts(options.results.resolve()):
        if part.name in options.parts:
            outcomes.append(run(part, end - time.perf_counter()))
            rows = [list(astuple(each)) for each in outcomes]
            document = {"machine": machine("cuda"), "columns": COLUMNS, "rows": rows}
            (options.results / "on_gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    table = Table(*COLUMNS)
    for each in outcomes:
        table.add_row(each.part, each.state, f"{each.seconds:.0f}", each.last_line[:100])
    Console(width=160).print(table)
    if any(each.state != "done" for each in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
