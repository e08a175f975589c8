"""What tests ask about a compiled model: where its variants came from, and who compiled what."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import psutil  # type: ignore[import-untyped]  # psutil ships no types
from torch import Tensor
from torch._dynamo.utils import counters

import esper
from esper.compiler.report import GraphReport
from esper.compiler.workers import default_workers, workers_so_far

__all__ = [
    "AMPLE",
    "compilations",
    "in_force",
    "jobs",
    "origins",
    "paused_workers",
    "train",
    "train_until",
    "wait_until",
    "workers",
]

AMPLE = 200.0
"""Seconds that nothing here takes."""


def train(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """A step without an optimizer, for a graph that also has the gradient of `x`; the loss."""
    loss = run(x.detach().requires_grad_()).square().sum()
    loss.backward()
    return loss.item()


def train_until(done: Callable[[], object], run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Make steps until `done()`; how many it were. The pauses leave the processor to the workers."""
    steps = 0
    while not done():
        train(run, x)
        steps += 1
        time.sleep(0.01)
    return steps


def compilations() -> dict[str, int]:
    """What Dynamo, AOTAutograd and Inductor have been asked to compile in this process."""
    counted = {
        f"{part} {what}": n for part in ("frames", "stats", "aot_autograd") for what, n in counters[part].items()
    }
    return {**counted, **{what: n for what, n in counters["inductor"].items() if what.startswith("fxgraph_cache")}}


def jobs() -> int:
    """How many compilations workers have done for this process."""
    counted = workers_so_far()
    return 0 if counted is None else counted.done


def origins(model: esper.MorphableModel) -> list[list[str]]:
    """For each graph of a model that has sites, where its variants came from, sorted."""
    return [sorted(variant.origin for variant in graph.variants) for graph in _graphs(model)]


def in_force(model: esper.MorphableModel) -> list[str]:
    """For each graph of a model that has sites, where the variant in force came from; "" if there is none."""
    return [next((variant.origin for variant in graph.variants if variant.in_force), "") for graph in _graphs(model)]


def _graphs(model: esper.MorphableModel) -> list[GraphReport]:
    gc.collect()  # graphs that Dynamo has dropped
    return [graph for graph in model.compile_report().graphs if graph.sites]


def workers(pid: int | None = None) -> list[psutil.Process]:
    """The compile workers of a process, or of this one, that run."""
    found = []
    for each in psutil.Process(pid).children():
        try:
            if "esper.compiler.worker_process" in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = AMPLE) -> None:
    """Fails, saying `what` did not happen, if `condition` does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def paused_workers() -> Iterator[list[psutil.Process]]:
    """This process's compile workers, stopped until the end: what they are given waits."""
    default_workers().warm()
    wait_until(workers, "the start of a worker")
    stopped = workers()
    for each in stopped:
        each.suspend()
    try:
        yield stopped
    finally:
        for each in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
