"""What becomes of a load into a compiled model when something happens meanwhile, or goes wrong."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.compiler.agreement import agrees, load, put
from tests.compiler.unsendable import Checkpointed, OwnOperator
from tests.compiler.variants import AMPLE, compilations, in_force, jobs, paused_workers, train, train_until, wait_until
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]
Grown = tuple[esper.MorphableModel, nn.Module, Tensor]


@pytest.fixture
def grown(shelf: KernelShelf, empty_store: Path) -> Grown:
    """A compiled model that has made a step, its compiled form, and an input."""
    model = esper.wrap(mlp(4, 4, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    train(run, x)
    return model, run, x


def state(model: esper.MorphableModel, seed: int = 0, layer: str = "0") -> str:
    return model.kasmina_layers[layer].state.lifecycle(seed).name


def test_a_load_that_is_called_off_answers_before_it_is_compiled(grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    kernel = put(shelf, 4, 4)
    with paused_workers():
        first = model.request_kernel("0", 0, kernel, alpha=0.5)
        behind = model.request_kernel("2", 1, put(shelf, 4, 2), alpha=0.5)
        train(run, x)
        assert (first.done(), behind.done()) == (False, False)
        assert model.unload_kernel("2", 1)
        assert behind.result(AMPLE) is False
        assert model.unload_kernel("0", 0)
        assert first.result(AMPLE) is False
        assert (state(model), state(model, 1, "2")) == ("DORMANT", "DORMANT")
        agrees(run, model, x)
    assert in_force(model) == ["host compile"]
    load(model, "0", 0, kernel)
    agrees(run, model, x)


def test_of_two_loads_into_one_seed_the_later_one_counts(grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    one, two = put(shelf, 4, 4), put(shelf, 4, 4, rank=2)
    with paused_workers():
        first = model.request_kernel("0", 0, one, alpha=0.5)
        second = model.request_kernel("0", 0, two, alpha=0.5)
        assert first.result(AMPLE) is False
        train(run, x)
    assert second.result(AMPLE)
    agrees(run, model, x)
    assert [seed.kernel.artifact_id for seed in model.runtime.plan.seeds()] == [two]
    assert state(model) == "ACTIVE"


def test_many_threads_load_and_unload_one_seed_while_steps_go_on(grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    kernels = [put(shelf, 4, 4, seed=seed) for seed in range(4)]
    problems: list[BaseException] = []

    def control(kernel: str) -> None:
        try:
            for _ in range(3):
                model.request_kernel("0", 0, kernel, alpha=0.5).result(AMPLE)
                model.unload_kernel("0", 0)
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            problems.append(error)

    threads = [threading.Thread(target=control, args=(kernel,)) for kernel in kernels]
    for thread in threads:
        thread.start()
    train_until(lambda: not any(thread.is_alive() for thread in threads), run, x)
    assert problems == []
    model.unload_kernel("0", 0)
    agrees(run, model, x)
    assert state(model) == "DORMANT"
    load(model, "0", 0, kernels[0])
    agrees(run, model, x)


def test_a_load_asked_for_inside_a_backward(grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    kernel, loaded = put(shelf, 4, 4), []

    def hook(gradient: Tensor) -> None:
        loaded.append(asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5, trainable=True)))
        assert state(model) == "LOADING"

    x = x.clone().requires_grad_()
    output = run(x)
    output.register_hook(hook)
    output.square().sum().backward()
    assert loaded == [True]
    expected = outputs_of_host(model, x)
    torch.testing.assert_close(output, expected)
    agrees(run, model, x)
    assert state(model) == "ACTIVE"


def outputs_of_host(model: esper.MorphableModel, x: Tensor) -> Tensor:
    output: Tensor = esper.unwrap(model)(x)
    return output


class Refusing(nn.Module):
    """Raises between its two layers when told so, outside of compiled graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.refuses = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.check()
        y: Tensor = self.second(x)
        return y

    @torch.compiler.disable
    def check(self) -> None:
        if self.refuses:
            raise ArithmeticError("not today")


def test_a_forward_that_raises_while_a_kernel_is_staged(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(Refusing(), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    agrees(run, model, x)
    for layer, out in (("first", 4), ("second", 2)):
        assert model.request_kernel(layer, 0, put(shelf, 4, out), alpha=0.5, trainable=True).result(AMPLE)
        assert state(model, layer=layer) == "LOADING"
        model.refuses = True
        with pytest.raises(ArithmeticError, match="not today"):
            train(run, x)
        model.refuses = False
        agrees(run, model, x)
        assert state(model, layer=layer) == "ACTIVE"
    assert in_force(model) == ["worker", "worker"]


def test_two_seeds_of_which_one_is_unloaded(grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    with model.runtime.lock:  # so that both are compiled together, and neither ever alone
        futures = [model.request_kernel("0", seed, put(shelf, 4, 4, rank=2 + seed), alpha=0.5) for seed in (0, 1)]
    assert all(future.result(AMPLE) for future in futures)
    agrees(run, model, x)
    before, done = compilations(), jobs()
    with paused_workers():
        assert model.unload_kernel("0", 0)
        agrees(run, model, x)
        assert [state(model, seed) for seed in (0, 1)] == ["ACTIVE", "ACTIVE"]
    while state(model) == "ACTIVE":
        train(run, x)
    agrees(run, model, x)
    assert [state(model, seed) for seed in (0, 1)] == ["DORMANT", "ACTIVE"]
    assert in_force(model) == ["worker"]
    assert (compilations(), jobs()) == (before, done + 1)


@pytest.mark.parametrize("again", [False, True])
def test_the_model_is_cast_while_a_load_is_compiled(again: bool, grown: Grown, shelf: KernelShelf) -> None:
    model, run, x = grown
    with paused_workers():
        future = model.request_kernel("0", 0, put(shelf, 4, 4), alpha=0.5, trainable=True)
        wait_until(lambda: model.compile_report().graphs[0].waiting, "the beginning of a compilation")
        model.double()
        if again:
            train(run, x.double())
    assert future.result(AMPLE), model.kasmina_layers["0"].seed_errors
    agrees(run, model, x.double())
    assert state(model) == "ACTIVE"
    model.float()
    agrees(run, model, x)
    load(model, "0", 0, put(shelf, 4, 4, rank=2))
    agrees(run, model, x)


def test_a_model_that_is_dropped_while_a_load_is_compiled_is_freed(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 4, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    train(run, x)
    gone = weakref.ref(model)
    with paused_workers():
        future = model.request_kernel("0", 0, put(shelf, 4, 4), alpha=0.5, trainable=True)
        del model, run
        gc.collect()
    assert future.result(AMPLE) in (True, False)
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("host", [OwnOperator, Checkpointed])
def test_a_graph_that_workers_cannot_have_is_compiled_at_the_commit(
    host: type[nn.Module], shelf: KernelShelf, empty_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = esper.wrap(host(), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    agrees(run, model, x)
    layer, out = ("linear", 2) if host is OwnOperator else ("first", 6)
    for rank in (2, 3):
        future = model.request_kernel(layer, 0, put(shelf, 4, out, rank=rank), alpha=0.5, trainable=True)
        assert future.result(AMPLE)
        agrees(run, model, x)
        assert in_force(model) == ["in process"]
    reasons = {variant.reason for variant in model.compile_report().graphs[0].variants}
    assert any(("twice" if host is OwnOperator else "checkpoint") in reason for reason in reasons), reasons
    assert model.unload_kernel(layer, 0)
    agrees(run, model, x)
    assert in_force(model) == ["host compile"]
    assert caplog.text.count("cannot be given to a compile worker") == 1
