"""First calls of compiled models, each in a process that has compiled nothing else; `benchmarks.apart` calls these."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import esper
from benchmarks.workloads import WORKLOADS, training_step

__all__ = ["cold_start_side", "first_step_side"]

_LR = 1e-4
_EAGER_STEPS = 100
_FOLLOWING = 200


def _ready_to_compile(device: str) -> None:
    """Have torch import its compiler, look for g++, and start its own processes, which the first compilation does."""
    torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(8, device=device))
    torch._dynamo.reset()


def _timed(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def first_step_side(workload: str, device: str, backend: str, blocks: int | None = None) -> float:
    """Seconds from the call of `torch.compile` to the end of the first training step.

    `backend` is "inductor" for the plain model, "esper" for the wrapped one without kernels; wrapping is not timed.
    """
    what = WORKLOADS[workload]
    model = what.model(device, blocks)
    if backend == "esper":
        model = esper.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    _ready_to_compile(device)
    return _timed(lambda: training_step(what.bound(torch.compile(model, backend=backend), device), optimizer)(), device)


def cold_start_side(workload: str, device: str, blocks: int | None = None) -> dict[str, Any]:
    """Seconds of an eager training step of the host, and of the first ones of a model that starts eagerly.

    "step" is the median of the eager ones, "trace" the first step of the host under Dynamo alone, "first" begins with
    the call of `torch.compile`, "worst" is the longest until the compiled graphs are in force and 200 steps have passed
    since, "compiled" is when that was. The host is traced twice, and the second time counts: Dynamo was used before
    then, as it was before it meets the wrapped model.
    """
    what = WORKLOADS[workload]
    host = what.model(device, blocks)
    _ready_to_compile(device)
    eager = training_step(what.bound(host, device), torch.optim.SGD(host.parameters(), lr=_LR))
    ordinary = statistics.median(_timed(eager, device) for _ in range(_EAGER_STEPS))
    trace = 0.0
    for _ in range(2):
        traced = what.model(device, blocks)
        start = time.perf_counter()
        step = training_step(
            what.bound(torch.compile(traced, backend="eager"), device), torch.optim.SGD(traced.parameters(), lr=_LR)
        )
        trace = (time.perf_counter() - start) + _timed(step, device)
        torch._dynamo.reset()
    model = esper.wrap(what.model(device, blocks))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    start = time.perf_counter()
    compiled = torch.compile(model, backend="esper", options={"cold_start": "eager"})
    step = training_step(what.bound(compiled, device), optimizer)
    first = (time.perf_counter() - start) + _timed(step, device)
    following: list[float] = []
    while not _compiled(model):
        following.append(_timed(step, device))
    arrived = time.perf_counter() - start
    following += [_timed(step, device) for _ in range(_FOLLOWING)]
    return {
        "step": ordinary,
        "trace": trace,
        "first": first,
        "worst": max(following),
        "compiled": arrived,
        "steps": len(following),
    }


def _compiled(model: esper.MorphableModel) -> bool:
    graphs = model.compile_report().graphs
    variants = [variant for graph in graphs for variant in graph.variants if variant.in_force]
    return bool(variants) and all(variant.origin in ("worker", "store") for variant in variants)
