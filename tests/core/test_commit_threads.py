"""Law 3 with several threads: control on one, training on another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import Twice, mlp

Run = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("mode", ["fx", "module", "compiled"])
def test_every_forward_sees_one_plan_while_another_thread_loads_and_unloads(
    shelf: KernelShelf, mode: str, fresh_dynamo: None
) -> None:
    model = esper.wrap(Twice(), platform=shelf.platform, mode="fx" if mode == "compiled" else mode)  # type: ignore[arg-type]  # a text among the parameters
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model
    allowed = [outputs(run, x)]
    load(model, "layer", 0, kernel, alpha=0.5)
    allowed.append(outputs(run, x))
    model.unload_kernel("layer", 0)
    done, problems = threading.Event(), []

    def control() -> None:
        try:
            for _ in range(20):
                assert asyncio.run(model.load_kernel("layer", 0, kernel, alpha=0.5))
                assert model.unload_kernel("layer", 0)
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            problems.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=control)
    thread.start()
    seen = [outputs(run, x)]
    while not done.is_set():
        seen.append(outputs(run, x))
    thread.join()
    assert problems == []
    kinds = {next((i for i, each in enumerate(allowed) if torch.equal(output, each)), None) for output in seen}
    assert None not in kinds
    outputs(run, x)
    assert states(model)["layer"][0] == "DORMANT"


def test_training_goes_on_while_another_thread_loads(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform)
    kernels = [shelf.put(blueprint(seed=seed)).id for seed in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    done, loaded = threading.Event(), []

    def control() -> None:
        for step in range(12):
            future = model.request_kernel("0", step % 2, kernels[step % 3], alpha=0.5, trainable=True)
            loaded.append(future.result(30))
        done.set()

    thread = threading.Thread(target=control)
    thread.start()
    steps = 0
    while not done.is_set() or steps < 20:
        x = torch.randn(16, 8)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    thread.join()
    assert loaded == [True] * 12
    model(torch.randn(2, 8))
    assert states(model)["0"] == ["ACTIVE", "ACTIVE"]
    held = {seed.kernel.artifact_id for seed in model.runtime.plan.seeds()}
    assert held == {kernels[10 % 3], kernels[11 % 3]}


def test_a_load_awaited_beside_the_thread_that_runs_the_model_waits_for_its_next_forward(shelf: KernelShelf) -> None:
    host = mlp(8, 6, 4)
    inside, go_on = threading.Event(), threading.Event()
    model = esper.wrap(host, platform=shelf.platform)
    kernel, x, results = shelf.put(blueprint()).id, torch.randn(5, 8), []
    model.get_submodule("0").register_forward_pre_hook(lambda *_: (inside.set(), go_on.wait(30))[:0] or None)

    def train() -> None:
        results.extend(model(x) for _ in range(2))

    thread = threading.Thread(target=train)
    thread.start()  # a notebook that trains in a thread: the model was made here, and runs there
    assert inside.wait(30)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    assert states(model)["0"][0] == "LOADING"
    go_on.set()
    thread.join()
    assert torch.equal(results[0], host(x))
    assert not torch.allclose(results[1], results[0])
    assert states(model)["0"][0] == "ACTIVE"


def test_loads_from_several_threads_at_once(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 6, 6), seeds_per_layer=2, platform=shelf.platform)
    first, later = shelf.put(blueprint(8, 6)).id, shelf.put(blueprint(6, 6)).id
    x = torch.randn(5, 8)
    model(x)
    layers = {"0": first, "2": later, "4": later}
    results: dict[tuple[str, int], bool] = {}

    def request(layer: str, seed: int) -> None:
        results[layer, seed] = asyncio.run(model.load_kernel(layer, seed, layers[layer], alpha=0.25))

    threads = [threading.Thread(target=request, args=(layer, seed)) for layer in layers for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [True] * 6
    model(x)
    assert states(model) == {layer: ["ACTIVE", "ACTIVE"] for layer in layers}


class Halted(nn.Module):
    """Two layers, and between them a stop that compilers cannot look into, nor torch.fx for its second assertion."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    @torch._dynamo.disable
    def halt(self, x: torch.Tensor) -> torch.Tensor:
        self.arrived.set()
        assert self.go_on.wait(30)
        assert x.isfinite().all()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.halt(self.first(x).tanh()))


def _recording_gradients(run: Run, x: torch.Tensor) -> torch.Tensor:
    return run(x).detach()


def _of_other_rows(run: Run, x: torch.Tensor) -> torch.Tensor:
    return outputs(run, x.repeat(2, 1))[: len(x)]


def _with_a_default_device(run: Run, x: torch.Tensor) -> torch.Tensor:
    with torch.device("cpu"):
        return outputs(run, x)


@pytest.mark.parametrize(("mode", "telemetry"), [("fx", True), ("fx", False), ("module", True)])
@pytest.mark.parametrize("call", [None, _recording_gradients, _of_other_rows, _with_a_default_device])
def test_what_is_compiled_in_the_middle_of_an_overtaken_forward_goes_on_as_that_began(
    shelf: KernelShelf,
    mode: Any,
    telemetry: bool,
    call: Callable[[Run, torch.Tensor], torch.Tensor] | None,
    fresh_dynamo: None,
) -> None:
    host = Halted()
    model = esper.wrap(host, platform=shelf.platform, mode=mode, telemetry_enabled=telemetry)
    run = torch.compile(model, backend="esper", options={"inner": "eager"})
    kernels, x = [shelf.put(blueprint(8, 8, seed=seed)).id for seed in range(2)], torch.randn(5, 8)
    before = outputs(esper.unwrap(model), x)
    if call is None:  # the first forward of all
        call = outputs
    else:
        outputs(run, x)
    results: list[torch.Tensor] = []
    host.arrived.clear()
    host.go_on.clear()
    thread = threading.Thread(target=lambda: results.append(call(run, x)))
    thread.start()
    assert host.arrived.wait(30)
    for layer, kernel in zip(("first", "second"), kernels, strict=True):
        assert model.request_kernel(layer, 0, kernel, alpha=0.5).result(30)
    model.commit()
    host.go_on.set()
    thread.join()
    torch.testing.assert_close(results[0], before)
    after = outputs(model, x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(call(run, x), after)


def test_a_model_in_one_graph_is_known_as_such_after_the_thread_of_its_first_forward_has_ended(
    shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode="fx", telemetry_enabled=False)
    run, x = torch.compile(model, backend="esper", options={"inner": "eager"}), torch.randn(5, 8)
    thread = threading.Thread(target=lambda: outputs(run, x))
    thread.start()
    thread.join()
    outputs(run, x)
    assert not model.runtime.has_graph_breaks  # so that nothing is done for that where later forwards begin


@pytest.mark.parametrize("mode", ["fx", "module"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_overtaken_forward_ends_as_it_began_in_what_the_overtaking_thread_has_compiled(
    shelf: KernelShelf, mode: Any, alone: bool, fresh_dynamo: None
) -> None:
    host = nn.Sequential(nn.Linear(8, 8), Halted()) if alone else Halted()
    halted = host.get_submodule("1") if alone else host
    assert isinstance(halted, Halted)
    model = esper.wrap(host, platform=shelf.platform, mode=mode)
    options: dict[str, Any] = {"inner": "eager"}
    if alone:
        model.get_submodule("1").compile(backend="esper", options=options)
    run = model if alone else torch.compile(model, backend="esper", options=options)
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    before = outputs(esper.unwrap(model), x)
    results: list[torch.Tensor] = []
    halted.arrived.clear()
    halted.go_on.clear()
    thread = threading.Thread(target=lambda: results.append(outputs(run, x)))
    thread.start()
    assert halted.arrived.wait(30)
    for layer in model.kasmina_layers:
        assert model.request_kernel(layer, 0, kernel, alpha=0.5).result(30)
    model.commit()
    slow, halted.go_on = halted.go_on, threading.Event()
    model.get_submodule("1" if alone else "").go_on = halted.go_on  # type: ignore[assignment]  # an attribute of the host
    halted.go_on.set()
    after = outputs(run, x)
    slow.set()
    thread.join()
    assert not torch.allclose(after, before)
    torch.testing.assert_close(results[0], before)
    torch.testing.assert_close(outputs(run, x), after)


@pytest.mark.parametrize("mode", ["fx", "module", "compiled"])
def test_a_forward_that_another_threads_commit_overtakes_ends_as_it_began(
    shelf: KernelShelf, mode: str, fresh_dynamo: None
) -> None:
    host = Halted()
    model = esper.wrap(host, platform=shelf.platform, mode="fx" if mode == "compiled" else mode)  # type: ignore[arg-type]  # a text among the parameters
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model
    kernels, x = [shelf.put(blueprint(8, 8, seed=seed)).id for seed in range(2)], torch.randn(5, 8)
    before = outputs(run, x)
    results: list[torch.Tensor] = []
    go_again = threading.Event()

    def infer() -> None:
        results.append(outputs(run, x))
        go_again.wait(30)
        results.append(outputs(run, x))

    host.arrived.clear()
    host.go_on.clear()
    thread = threading.Thread(target=infer)
    thread.start()
    assert host.arrived.wait(30)
    for layer, kernel in zip(("first", "second"), kernels, strict=True):
        assert model.request_kernel(layer, 0, kernel, alpha=0.5).result(30)
    model.commit()  # here, while the other thread is between the two layers
    assert states(model)["second"][0] == "ACTIVE"
    host.go_on.set()
    after = outputs(run, x)
    go_again.set()
    thread.join()
    assert not torch.allclose(after, before)
    assert torch.equal(results[0], before)
    assert torch.equal(results[1], after)
    assert model.unload_kernel("first", 0)
    assert model.unload_kernel("second", 0)
    assert torch.equal(outputs(run, x), before)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", ["load", "unload"])
def test_backward_hooks_run_once_in_a_forward_that_another_threads_commit_overtakes(
    shelf: KernelShelf, compiled: bool, change: str, fresh_dynamo: None
) -> None:
    host = Halted()
    model: Any = esper.wrap(host, platform=shelf.platform)
    kernel, x, seen = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8), list[torch.Size]()
    model.second.register_full_backward_hook(lambda _, into, out: seen.append(out[0].shape))
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compiled else model
    if change == "unload":
        load(model, "second", 0, kernel, alpha=0.5)
    for _ in range(2):
        run(x).sum().backward()
    assert len(seen) == 2
    host.arrived.clear()
    host.go_on.clear()
    thread = threading.Thread(target=lambda: run(x).sum().backward())
    thread.start()
    assert host.arrived.wait(30)
    if change == "load":
        assert model.request_kernel("second", 0, kernel, alpha=0.5).result(30)
    else:
        assert model.unload_kernel("second", 0)
    model.commit()
    host.go_on.set()
    thread.join()
    assert len(seen) == 3
    run(x).sum().backward()
    assert len(seen) == 4
