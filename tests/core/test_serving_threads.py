"""Several threads run one model while another changes it, as where a model is served beside its training."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, load, outputs
from tests.kernel_shelf import KernelShelf
from tests.models import Twice

_SECONDS = 3.0


@pytest.fixture(autouse=True)
def busy_machine() -> Iterator[None]:
    """Threads take turns fifty times as often as they do by default, in the middle of anything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@contextmanager
def _served(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Iterator[list[object]]:
    """Three threads call `run(x)`; what they got, each different output once, and what they raised."""
    stop, found = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            try:
                output = outputs(run, x)
                if not any(isinstance(each, torch.Tensor) and torch.equal(each, output) for each in found):
                    found.append(output)
            except Exception as error:  # noqa: BLE001  # shown by the assertions of the tests
                found.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _is_one_of(output: object, allowed: list[torch.Tensor]) -> bool:
    return isinstance(output, torch.Tensor) and any(torch.equal(output, each) for each in allowed)


def _named(output: object, wrong: dict[str, torch.Tensor]) -> object:
    """What an output is, where that can be told."""
    if not isinstance(output, torch.Tensor):
        return output
    return next((name for name, each in wrong.items() if torch.allclose(output, each)), output)


@pytest.fixture(params=["module", "fx", "compiled"])
def served(
    request: pytest.FixtureRequest, shelf: KernelShelf, fresh_dynamo: None
) -> tuple[esper.MorphableModel, nn.Module]:
    mode = "module" if request.param == "compiled" else request.param
    model = esper.wrap(Twice(), platform=shelf.platform, mode=mode)
    compiled = request.param == "compiled"
    return model, torch.compile(model, backend="esper", options={"inner": "eager"}) if compiled else model


def test_threads_that_serve_see_whole_plans_while_kernels_come_and_go(
    shelf: KernelShelf, served: tuple[esper.MorphableModel, nn.Module]
) -> None:
    model, run = served
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    allowed, halves = [outputs(run, x)], [outputs(model.layer, x).tanh()]
    load(model, "layer", 0, kernel, alpha=0.5)
    allowed.append(outputs(run, x))
    halves.append(outputs(model.layer, x).tanh())
    wrong = {"without the kernel, then with it": outputs(model.layer, halves[0]).tanh()}
    model.unload_kernel("layer", 0)
    outputs(run, x)
    wrong["with the kernel, then without it"] = outputs(model.layer, halves[1]).tanh()
    end = time.monotonic() + _SECONDS
    with _served(run, x) as found:
        while time.monotonic() < end:
            assert model.request_kernel("layer", 0, kernel, alpha=0.5).result(30)
            assert torch.equal(outputs(run, x), allowed[1])
            assert model.unload_kernel("layer", 0)
            assert torch.equal(outputs(run, x), allowed[0])
    assert [_named(output, wrong) for output in found if not _is_one_of(output, allowed)] == []


def test_an_alpha_counts_at_once_while_other_threads_read_it(
    shelf: KernelShelf, served: tuple[esper.MorphableModel, nn.Module]
) -> None:
    model, run = served
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    load(model, "layer", 0, kernel, alpha=0.0)
    alphas, allowed = (0.0, 0.25, 0.5, 1.0), []
    for alpha in alphas:
        model.set_alpha("layer", 0, alpha)
        allowed.append(outputs(run, x))
    end, old = time.monotonic() + _SECONDS, 0
    with _served(run, x):
        while time.monotonic() < end:
            for alpha, expected in zip(alphas, allowed, strict=True):
                model.set_alpha("layer", 0, alpha)
                old += not torch.equal(outputs(run, x), expected)
    assert old == 0


def test_many_layers_change_together_under_threads_that_serve(shelf: KernelShelf, fresh_dynamo: None) -> None:
    host = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())))
    model = esper.wrap(host, platform=shelf.platform, mode="module", commit="manual")
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    allowed = [outputs(model, x)]
    end = time.monotonic() + _SECONDS
    with _served(model, x) as found:
        for turn in range(1000):
            for name in model.kasmina_layers:
                if turn % 2:
                    assert model.unload_kernel(name, 0)
                else:
                    assert model.request_kernel(name, 0, kernel, alpha=0.5).result(30)
            assert len(model.commit()) == 6
            after = outputs(model, x)
            if turn == 0:
                allowed.append(after)
            assert torch.equal(after, allowed[1 - turn % 2])
            if time.monotonic() > end:
                break
    assert [output for output in found if not _is_one_of(output, allowed)] == []
