"""The cost of getting a kernel: from the cache, from a file, and when there are more kernels than the cache holds.

`python -m benchmarks.kernel_cache [--quick]` prints tables and writes `kernel_cache.json` and `kernel_cache.png` to
`benchmarks/results/`.

Hits are compared with a plain dictionary and with `functools.lru_cache` in the same run, misses with `torch.load` of
the same weights, which checks nothing. The working-set cliff is that of any LRU cache: below the capacity every request
is a hit; a cycle through one kernel more makes every request a miss, while skewed requests lose only what they rarely
ask for.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import json
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from esper.artifacts import Artifact, Blueprint, build_artifact
from esper.artifacts.signing import SigningKey, TrustStore, artifact_message
from esper.execution.kernel_cache import KernelCache
from esper.execution.sources import FetchedKernel, UnknownKernelError

RESULTS = Path(__file__).parent / "results"
GOAL_US = 10.0
CAPACITY = 16


class SignedFolder:
    """A kernel source over a folder of artifact files, each signed."""

    def __init__(self, folder: Path, artifacts: Sequence[Artifact]) -> None:
        key = SigningKey.generate()
        self._folder = folder
        self._trust = TrustStore([key.public_bytes])
        self._signatures = {artifact.id: key.sign(artifact_message(artifact.id)) for artifact in artifacts}
        self.delay = 0.0
        for artifact in artifacts:
            (folder / artifact.id).write_bytes(artifact.data)

    def resolve(self, reference: str) -> str:
        raise UnknownKernelError(f"this source knows no names: {reference!r}")

    def fetch(self, artifact_id: str) -> FetchedKernel:
        time.sleep(self.delay)
        return FetchedKernel((self._folder / artifact_id).read_bytes(), self._signatures[artifact_id])

    def attachment(self, artifact_id: str, target_key: str) -> None:  # noqa: ARG002  # there are none
        return None

    def trust(self) -> TrustStore:
        return self._trust


@dataclass(frozen=True)
class Latency:
    """Microseconds per call."""

    what: str
    median_us: float
    p99_us: float
    worst_us: float
    calls: int


def measure(what: str, call: Callable[[], object], calls: int) -> Latency:
    """Time `calls` single calls; the clock itself, about 0.05 µs, is included."""
    for _ in range(min(calls, 1000)):
        call()
    clock, samples = time.perf_counter_ns, []
    for _ in range(calls):
        start = clock()
        call()
        samples.append(clock() - start)
    samples.sort()
    return Latency(
        what, statistics.median(samples) / 1e3, samples[int(0.99 * (calls - 1))] / 1e3, samples[-1] / 1e3, calls
    )


# ---- hits ----------------------------------------------------------------------------------------------------------


def hit_latencies(cache: KernelCache, source: SignedFolder, ids: Sequence[str], calls: int) -> list[Latency]:
    """A kernel that is cached, asked for in every way there is, beside the least that a look-up can cost."""
    wanted, missing = ids[0], ids[-1]
    kernel = cache.fetch(wanted)
    table, view = {wanted: kernel}, cache.view("layer")
    lru = functools.lru_cache(maxsize=CAPACITY)(cache.fetch)

    def hit_and_unpin() -> None:
        cache.fetch(wanted, pin=True)
        cache.unpin(wanted)

    results = [
        measure("peer: dict look-up", lambda: table[wanted], calls),
        measure("peer: functools.lru_cache", lambda: lru(wanted), calls),
        measure("fetch", lambda: cache.fetch(wanted), calls),
        measure("fetch through a layer's view", lambda: view.fetch(wanted), calls),
        measure("fetch with pin, then unpin", hit_and_unpin, calls),
        asyncio.run(_awaited(cache, wanted, calls)),
    ]
    cache.pin(wanted)  # it stays while the others come and go
    with _fetching(cache, missing, source, delay=0.05):
        results.append(
            measure("fetch, while another thread waits for a slow source", lambda: cache.fetch(wanted), calls)
        )
    with _fetching(cache, missing, source, delay=0.0):
        results.append(
            measure("fetch, while another thread verifies without pause", lambda: cache.fetch(wanted), calls)
        )
    return results


async def _awaited(cache: KernelCache, artifact_id: str, calls: int) -> Latency:
    clock, samples = time.perf_counter_ns, []
    for _ in range(calls):
        start = clock()
        await cache.load_kernel(artifact_id)
        samples.append(clock() - start)
    samples.sort()
    return Latency(
        "await load_kernel",
        statistics.median(samples) / 1e3,
        samples[int(0.99 * (calls - 1))] / 1e3,
        samples[-1] / 1e3,
        calls,
    )


@contextmanager
def _fetching(cache: KernelCache, artifact_id: str, source: SignedFolder, delay: float) -> Iterator[None]:
    """Meanwhile, a thread makes misses of `artifact_id`, one after the other, whose source takes `delay` seconds."""
    stop, started = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            started.set()
            cache.fetch(artifact_id)
            cache.clear_cache()

    source.delay = delay
    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        source.delay = 0.0


# ---- misses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miss:
    """Milliseconds to get a kernel that is not cached."""

    size_mb: float
    cache_ms: float
    torch_load_ms: float

    @property
    def ratio(self) -> float:
        return self.cache_ms / self.torch_load_ms


def miss_latencies(folder: Path, rounds: int) -> list[Miss]:
    """Fetch from a file, hash, check signature, graph, shapes and values; against `torch.load` of the same weights."""
    found = []
    for features, rank in ((32, 8), (256, 64), (1024, 256), (2048, 1024)):
        artifact = build_artifact(Blueprint.bottleneck(features, features, rank, start="kaiming"))
        cache = KernelCache(512, source=SignedFolder(folder, [artifact]))
        plain = folder / "plain.pt"
        torch.save(dict(artifact.tensors), plain)
        ours, theirs = [], []
        for _ in range(rounds):  # interleaved, so that both see the same machine
            cache.clear_cache()
            start = time.perf_counter()
            cache.fetch(artifact.id)
            middle = time.perf_counter()
            torch.load(io.BytesIO(plain.read_bytes()), weights_only=True)
            theirs.append(time.perf_counter() - middle)
            ours.append(middle - start)
        found.append(Miss(len(artifact.data) / 2**20, statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3))
    return found


# ---- the working set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One working set: how often a request was a hit, and microseconds per request."""

    pattern: str
    kernels: int
    hit_rate: float
    mean_us: float


def requests(pattern: str, ids: Sequence[str], count: int) -> list[str]:
    """`count` requests for `ids`: one after the other, evenly at random, or the n-th most popular 1/n as often."""
    chance = random.Random(0)
    if pattern == "cycle":
        return [ids[index % len(ids)] for index in range(count)]
    weights = [1.0] * len(ids) if pattern == "uniform" else [1.0 / (rank + 1) for rank in range(len(ids))]
    return chance.choices(ids, weights, k=count)


def working_set(source: SignedFolder, ids: Sequence[str], count: int) -> list[Point]:
    """A cache of `CAPACITY` kernels, asked for from fewer to twice as many."""
    points = []
    for pattern in ("cycle", "uniform", "zipf"):
        for kernels in (4, 8, 12, 14, 15, 16, 17, 18, 20, 24, 32):
            cache = KernelCache(512, CAPACITY, source=source)
            wanted = requests(pattern, ids[:kernels], count)
            for artifact_id in ids[:kernels]:  # not counted: everything is asked for a first time
                cache.fetch(artifact_id)
            warm = cache.view("warm")
            start = time.perf_counter()
            for artifact_id in wanted:
                warm.fetch(artifact_id)
            seconds = time.perf_counter() - start
            points.append(Point(pattern, kernels, warm.get_cache_stats()["cache_hit_rate"], seconds / count * 1e6))
    return points


# ---- report --------------------------------------------------------------------------------------------------------


def show(console: Console, hits: list[Latency], misses: list[Miss], points: list[Point]) -> None:
    """The tables."""
    table = Table(title=f"A hit, µs (goal: under {GOAL_US:g})")
    for column in ("request", "median", "99 %", "worst"):
        table.add_column(column, justify="left" if column == "request" else "right")
    for hit in hits:
        table.add_row(hit.what, f"{hit.median_us:.2f}", f"{hit.p99_us:.2f}", f"{hit.worst_us:.0f}")
    console.print(table)
    table = Table(title="A miss, from a file on a warm disk, ms")
    for column in ("artifact, MB", "KernelCache", "torch.load, nothing checked", "ratio"):
        table.add_column(column, justify="right")
    for miss in misses:
        table.add_row(f"{miss.size_mb:.2f}", f"{miss.cache_ms:.2f}", f"{miss.torch_load_ms:.2f}", f"{miss.ratio:.1f}")
    console.print(table)
    table = Table(title=f"The working set, in a cache of {CAPACITY} kernels")
    table.add_column("kernels in use", justify="right")
    patterns = list(dict.fromkeys(point.pattern for point in points))
    for pattern in patterns:
        table.add_column(f"{pattern}: hit rate", justify="right")
        table.add_column("µs a request", justify="right")
    for kernels in dict.fromkeys(point.kernels for point in points):
        row = [
            point for pattern in patterns for point in points if (point.pattern, point.kernels) == (pattern, kernels)
        ]
        table.add_row(str(kernels), *(text for p in row for text in (f"{p.hit_rate:.0%}", f"{p.mean_us:.1f}")))
    console.print(table)


def plot(path: Path, hits: list[Latency], points: list[Point]) -> None:
    """Hit latencies against the goal, and the cliff."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    labels = [hit.what for hit in hits]
    left.barh(labels, [hit.median_us for hit in hits], label="median")
    left.plot([hit.p99_us for hit in hits], labels, "k|", markersize=12, label="99 %")
    left.axvline(GOAL_US, color="tab:red", linestyle="--", label="goal")
    left.set(xlabel="µs", title="A hit", xscale="log")
    left.invert_yaxis()
    left.legend(fontsize=8)
    for pattern in dict.fromkeys(point.pattern for point in points):
        mine = [point for point in points if point.pattern == pattern]
        kernels = [point.kernels for point in mine]
        middle.plot(kernels, [point.hit_rate for point in mine], "o-", label=pattern)
        right.plot(kernels, [point.mean_us for point in mine], "o-", label=pattern)
    for axes, label in ((middle, "hit rate"), (right, "µs per request")):
        axes.axvline(CAPACITY, color="grey", linestyle=":", label="capacity")
        axes.set(xlabel="kernels in use", ylabel=label, title=f"Working set: {label}")
        axes.legend(fontsize=8)
    right.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    quick = parser.parse_args().quick
    calls, rounds, count = (5_000, 5, 200) if quick else (50_000, 25, 2_000)
    console = Console()
    with tempfile.TemporaryDirectory() as name, console.status("measuring"):
        folder = Path(name)
        artifacts = [build_artifact(Blueprint.bottleneck(64, 64, 16, start="kaiming", seed=seed)) for seed in range(33)]
        source, ids = SignedFolder(folder, artifacts), [artifact.id for artifact in artifacts]
        hits = hit_latencies(KernelCache(512, source=source), source, ids, calls)
        misses = miss_latencies(folder, rounds)
        points = working_set(source, ids[:-1], count)
    show(console, hits, misses, points)
    fetch = next(hit for hit in hits if hit.what == "fetch")
    met = fetch.median_us < GOAL_US
    console.print(f"a hit takes {fetch.median_us:.2f} µs: the goal of {GOAL_US:g} µs is {'met' if met else 'missed'}")
    RESULTS.mkdir(exist_ok=True)
    report = {
        "command": "python -m benchmarks.kernel_cache" + (" --quick" if quick else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "goal_us": GOAL_US,
        "goal_met": met,
        "hits": [asdict(hit) for hit in hits],
        "misses": [asdict(miss) | {"ratio": miss.ratio} for miss in misses],
        "working_set": {"capacity": CAPACITY, "points": [asdict(point) for point in points]},
    }
    (RESULTS / "kernel_cache.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    plot(RESULTS / "kernel_cache.png", hits, points)


if __name__ == "__main__":
    main()
