"""Counts, latencies and health signals, and what they cost a forward: nothing at any site."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import GatedPlatform, blueprint, load, outputs
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

HEALTH = "telemetry.seed.health"
MODES = ["fx", "module", "compiled"]


@pytest.fixture
def platform(shelf: KernelShelf) -> GatedPlatform:
    return GatedPlatform(shelf)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8)


def wrapped(platform: GatedPlatform, host: nn.Module | None = None, **options: Any) -> esper.MorphableModel:
    return esper.wrap(host or mlp(8, 6, 4), seeds_per_layer=2, platform=platform, **options)  # type: ignore[arg-type]  # keywords from a dict or parameters


def runner(model: esper.MorphableModel, mode: str) -> Callable[..., Any]:
    return torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model


def stats(model: esper.MorphableModel, name: str) -> Any:
    return [layer[name] for layer in model.get_model_stats()["layers"].values()]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_health_signal_every_hundred_executions(
    platform: GatedPlatform, x: torch.Tensor, mode: str, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = wrapped(platform, mode="module" if mode == "module" else "fx")
    run = runner(model, mode)
    for _ in range(99):
        run(x)
    assert model.runtime.telemetry is not None
    model.runtime.telemetry.look()
    assert platform.oona.of(HEALTH) == []
    run(x)
    wait_for(lambda: len(platform.oona.of(HEALTH)) == 2)  # the thread that looks found it
    first, second = platform.oona.of(HEALTH)
    assert [(each.layer_id, each.layer_name) for each in (first, second)] == [(0, "0"), (1, "2")]
    assert (first.seed_count, first.active_seed_count, first.error_count) == (2, 0, 0)
    assert first.cache_hit_rate == 0.0
    assert first.avg_execution_latency_μs == 0.0  # the first sample is taken by the next forward
    dormant_memory = first.memory_usage_mb

    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5)
    load(model, "0", 1, shelf.put(blueprint()).id, alpha=0.5)
    assert not model.request_kernel("0", 0, "ab" * 32).result(30)
    for _ in range(100):
        run(x)
    wait_for(lambda: len(platform.oona.of(HEALTH)) == 4)
    signal = platform.oona.of(HEALTH)[2]
    assert (signal.layer_name, signal.active_seed_count, signal.error_count) == ("0", 2, 1)
    assert signal.cache_hit_rate == pytest.approx(1 / 3)
    assert signal.memory_usage_mb > dormant_memory
    assert stats(model, "execution_count") == [200, 200]


@pytest.mark.parametrize("mode", MODES)
def test_latencies_are_sampled_and_forwards_that_are_timed_compute_the_same(
    platform: GatedPlatform, x: torch.Tensor, mode: str, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = wrapped(platform, mode="module" if mode == "module" else "fx")
    load(model, "0", 1, shelf.put(blueprint()).id, alpha=0.5)
    run = runner(model, mode)
    x.requires_grad_()
    expected = run(x)
    assert stats(model, "avg_latency_μs") == [0.0, 0.0]
    for _ in range(100):
        run(x)
    assert model.runtime.telemetry is not None
    model.runtime.telemetry.look()
    timed = run(x)
    assert torch.equal(timed, expected)
    timed.sum().backward()
    assert all(latency > 0 for latency in stats(model, "avg_latency_μs"))
    before = stats(model, "avg_latency_μs")
    run(x), run(x)
    assert stats(model, "avg_latency_μs") == before
    assert stats(model, "execution_count") == [104, 104]


def test_the_state_notes_the_latency_of_active_seeds(
    platform: GatedPlatform, x: torch.Tensor, shelf: KernelShelf
) -> None:
    model = wrapped(platform, nn.Sequential(nn.Linear(512, 512)))
    load(model, "0", 1, shelf.put(blueprint(512, 512)).id, alpha=0.5)
    inputs = torch.randn(2048, 512)  # long enough to count in whole microseconds
    model(inputs)
    assert model.runtime.telemetry is not None
    model.runtime.telemetry.look()
    for _ in range(100):
        model(inputs[:1])
    model.runtime.telemetry.look()
    model(inputs)
    layer = model.kasmina_layers["0"]
    assert layer.state.latency_μs(1) > 0
    assert layer.state.latency_μs(0) == 0
    assert int(layer.state.exec_latency_μs[1]) == layer.state.latency_μs(1)


class Uneven(nn.Module):
    """One layer runs twice, one once, one only when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, everything: bool = False) -> torch.Tensor:
        x = self.once(self.twice(self.twice(x)))
        return self.never(x) if everything else x


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_executions_are_those_of_the_layer(platform: GatedPlatform, x: torch.Tensor, mode: str) -> None:
    model = wrapped(platform, Uneven(), mode=mode)
    telemetry = model.runtime.telemetry
    assert telemetry is not None
    for _ in range(100):
        model(x)
    telemetry.look()  # asks for a sample, which finds out how often each layer runs in a forward
    model(x)
    assert stats(model, "execution_count") == [202, 101, 0]


def test_without_telemetry_nothing_is_counted_or_sent(
    platform: GatedPlatform, x: torch.Tensor, shelf: KernelShelf
) -> None:
    before = _lookers()
    model = wrapped(platform, telemetry_enabled=False)
    assert model.runtime.telemetry is None
    assert _lookers() <= before
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5)
    assert not model.request_kernel("0", 1, "ab" * 32).result(30)
    for _ in range(120):
        model(x)
    assert platform.oona.messages == []
    assert stats(model, "execution_count") == [0, 0]
    assert stats(model, "avg_latency_μs") == [0.0, 0.0]
    assert stats(model, "active_seeds") == [1, 0]


def _lookers() -> set[threading.Thread]:
    gc.collect()  # those of models that are gone go with them
    return {thread for thread in threading.enumerate() if thread.name == "esper-telemetry"}


def test_all_models_share_the_thread_that_looks(platform: GatedPlatform, x: torch.Tensor) -> None:
    models = [wrapped(platform) for _ in range(3)]
    models.append(copy.deepcopy(models[0]))
    assert len(_lookers()) == 1
    for model in models:
        for _ in range(100):
            model(x)
    wait_for(lambda: len(platform.oona.of(HEALTH)) == 2 * len(models))


_MANY = """
import gc, threading, time
from torch import nn
import esper

def lookers():
    return sum(thread.name == "esper-telemetry" for thread in threading.enumerate())

for _ in range(2):
    models = [esper.wrap(nn.Linear(2, 2)) for _ in range(50)]
    assert lookers() == 1, lookers()
    del models
    gc.collect()
    end = time.monotonic() + 20
    while lookers():
        assert time.monotonic() < end
        time.sleep(0.02)
"""


@pytest.mark.slow
def test_the_thread_that_looks_goes_with_the_last_model_and_comes_with_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", _MANY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _python_calls(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """The Python functions of Esper's that a forward enters, and how often."""
    seen: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "esper" in frame.f_globals.get("__name__", ""):
            seen[frame.f_code.co_qualname] += 1

    sys.setprofile(profile)
    try:
        outputs(model, x)
    finally:
        sys.setprofile(None)
    return seen


def test_a_dormant_forward_runs_no_code_of_ours_at_any_site(platform: GatedPlatform, x: torch.Tensor) -> None:
    few, many = (wrapped(platform, mlp(8, *[8] * depth), mode="fx") for depth in (2, 12))
    calls = []
    for model in (few, many):
        for _ in range(3):
            outputs(model, x)
        calls.append(_python_calls(model, x))
    assert calls[0] == calls[1]
    assert sum(calls[0].values()) <= 5  # forward, what notes that it begins (three), and the function generated for it


def test_a_layer_that_stands_alone_reports(platform: GatedPlatform, x: torch.Tensor) -> None:
    layer = esper.KasminaLayer(5, 2, 8, 6, sink=platform.oona, source=platform.kernel_source, layer_name="own")
    for _ in range(100):
        layer(x)
    wait_for(lambda: platform.oona.of(HEALTH))
    (signal,) = platform.oona.of(HEALTH)
    assert (signal.layer_id, signal.layer_name, signal.seed_count) == (5, "own", 2)
    assert torch.equal(layer(x), layer.default_transform(x))
    figures = layer.get_layer_stats()
    assert figures["execution_count"] == 101
    assert figures["avg_latency_μs"] > 0
    quiet = esper.KasminaLayer(0, 2, 8, 6, telemetry_enabled=False, sink=platform.oona)
    for _ in range(100):
        quiet(x)
    assert quiet.get_layer_stats()["execution_count"] == 0


@pytest.mark.slow
def test_a_signal_that_is_due_while_another_thread_imports_the_platform_is_no_trouble(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.execution.half_imported_platform"]
    environment = {**os.environ, "ESPER_PLATFORM__ROOT": str(tmp_path)}
    root = Path(__file__).parents[2]
    run = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    assert (run.returncode, run.stdout) == (0, "heard\n"), run.stderr
    assert "telemetry failed" not in run.stderr
