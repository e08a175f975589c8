"""What forwards that commits overtake may still need, and how long it is kept."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, outputs
from tests.core.test_serving_threads import Twice
from tests.kernel_shelf import KernelShelf

Run = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=["module", "compiled"])
def made(request: pytest.FixtureRequest, shelf: KernelShelf, fresh_dynamo: None) -> list[Any]:
    """A model and what runs it, in a list that a test may empty."""
    model = esper.wrap(Twice(), platform=shelf.platform, telemetry_enabled=False)
    compiled = request.param == "compiled"
    return [model, torch.compile(model, backend="esper", options={"inner": "eager"}) if compiled else model]


@contextmanager
def _idle_thread(once: Callable[[], object]) -> Iterator[None]:
    """A thread that calls `once` and then lives on, as those of a pool do."""
    ran, end = threading.Event(), threading.Event()
    todo = [once]

    def live() -> None:
        todo.pop()()
        ran.set()
        end.wait(60)

    thread = threading.Thread(target=live)
    thread.start()
    assert ran.wait(30)
    yield
    end.set()
    thread.join()


def _comes_and_goes(model: esper.MorphableModel, run: Run, x: torch.Tensor, kernel: str) -> weakref.ref[nn.Module]:
    assert model.request_kernel("layer", 0, kernel, alpha=0.5).result(30)
    outputs(run, x)
    (seed,) = model.runtime.plan.seeds()
    assert model.unload_kernel("layer", 0)
    outputs(run, x)
    outputs(run, x)
    return weakref.ref(seed.kernel.module)


def test_an_unloaded_kernel_is_freed(shelf: KernelShelf, made: list[Any]) -> None:
    model, run = made
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    outputs(run, x)
    unloaded = _comes_and_goes(model, run, x, kernel)
    gc.collect()
    assert unloaded() is None


def test_kernels_that_come_and_go_are_freed_while_a_thread_of_before_idles(shelf: KernelShelf, made: list[Any]) -> None:
    model, run = made
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    before = outputs(run, x)
    with _idle_thread(lambda: outputs(run, x)):
        unloaded = [_comes_and_goes(model, run, x, kernel) for _ in range(6)]
        gc.collect()
        assert [each() is None for each in unloaded[:-1]] == [True] * 5
        assert torch.equal(outputs(run, x), before)


def test_a_model_is_freed_while_a_thread_that_ran_it_idles(shelf: KernelShelf, made: list[Any]) -> None:
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    runs, other = [made[1]], esper.wrap(Twice(), platform=shelf.platform)
    other_run = torch.compile(other, backend="esper", options={"inner": "eager"})
    outputs(other_run, x)  # a model of the same class, whose compiled graph is the same one
    with _idle_thread(lambda: outputs(runs.pop(), x)):
        unloaded, runtime = _comes_and_goes(*made, x, kernel), weakref.ref(made[0].runtime)
        made.clear()
        gc.collect()
        gc.collect()  # of what the first one let go
        assert runtime() is None
        assert unloaded() is None


def test_a_forward_that_very_many_commits_overtake_ends_as_it_began(shelf: KernelShelf) -> None:
    model = esper.wrap(Twice(), platform=shelf.platform, telemetry_enabled=False)
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    before = outputs(model, x)
    arrived, go_on = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []
    calls = []

    def stop_at_the_second(*_: object) -> None:
        if threading.current_thread() is thread:
            calls.append(True)
            if len(calls) == 2:
                arrived.set()
                assert go_on.wait(120)

    model.get_submodule("layer").register_forward_pre_hook(stop_at_the_second)
    thread = threading.Thread(target=lambda: results.append(outputs(model, x)))
    thread.start()
    assert arrived.wait(30)
    for _ in range(500):
        assert model.request_kernel("layer", 0, kernel, alpha=0.5).result(30)
        outputs(model, x)
        assert model.unload_kernel("layer", 0)
        outputs(model, x)
    go_on.set()
    thread.join()
    assert torch.equal(results[0], before)
