"""Latency measurements of a kernel's forward. Runs in the child process, on its one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from esper.artifacts import KernelGraph
from esper.contracts.validation import LatencyMeasurement
from esper.services.tezzeret.validation import CompiledKernel

__all__ = ["measure_latencies"]

_MAX_ELEMENTS = 2**24  # of an input or output; larger kernels are measured on fewer rows
_SAMPLE_SECONDS = 200e-6
_MIN_SAMPLES = 5


def measure_latencies(
    graph: KernelGraph,
    tensors: Mapping[str, Tensor],
    compiled: CompiledKernel | None,
    rows: Sequence[int],
    seconds: float,
) -> tuple[LatencyMeasurement, ...]:
    """Medians over about `seconds` for each number of rows, for the graph and for compiled code if there is any."""
    module = graph.to_module(tensors)
    parameters = [tensors[name] for name in graph.tensor_names]
    widths = (graph.in_features, graph.out_features) if graph.uses_host else (graph.in_features,)
    most = max(1, _MAX_ELEMENTS // max(graph.in_features, graph.out_features))
    results = []
    with torch.no_grad():
        for count in dict.fromkeys(min(each, most) for each in rows):
            inputs = [torch.randn(count, width).to(getattr(torch, graph.dtype)) for width in widths]
            eager = _median(lambda inputs=inputs: module(*inputs), seconds)  # type: ignore[misc]  # a default binds
            attached = None
            if compiled is not None and count >= 2:  # compiled code takes two rows or more
                attached = _median(lambda inputs=inputs: compiled(*inputs, *parameters), seconds)  # type: ignore[misc]  # as above
            results.append(LatencyMeasurement(rows=count, graph_us=eager, attachment_us=attached))
    return tuple(results)


def _median(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of one call: the median over samples of as many calls as make a sample long enough to measure."""
    call()
    once = _time(call, 1)
    calls = max(1, min(1000, int(_SAMPLE_SECONDS / max(once, 1e-9))))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < end:
        samples.append(_time(call, calls) / calls)
    return statistics.median(samples) * 1e6


def _time(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start
