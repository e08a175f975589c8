"""How far a request for kernels is: its stages, from any thread, until it is in force, has failed or was called off."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import esper
from esper import Blueprint
from esper.execution.seeds.progress import Stage
from tests.compiler.variants import wait_until
from tests.core.seeds import blueprint
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


class _Held:
    """An executor that is being made ready until it is let go."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def ready(self, plan: Any, runtime: Any) -> bool:
        return False

    def prepare(self, plan: Any, runtime: Any) -> None:
        self.asked.set()
        assert self.let_go.wait(60)

    def follow(self, plan: Any) -> None: ...

    def install_entry_hook(self) -> None: ...

    def remove_entry_hook(self) -> None: ...


def test_a_request_tells_every_stage_until_it_is_in_force(shelf: KernelShelf, gated: Any, x: Any, kernel: str) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=gated)
    held, gate = _Held(), gated.hold(kernel)
    model.runtime.add_executor(held)
    request = model.request_kernel("0", 0, kernel)
    gated.wait_until_held()
    assert (request.progress().stage, request.progress().layers) == (Stage.FETCHING, ("0",))
    assert str(request.progress()).startswith("fetching for '0', ")
    gate.set()
    assert held.asked.wait(60)
    assert request.progress().stage is Stage.COMPILING_VARIANTS
    held.let_go.set()
    assert request.result(60)
    assert request.progress().stage is Stage.STAGED
    earlier = request.progress().seconds
    model(x)
    final = request.progress()
    assert (final.stage, final.done, final.total, final.reason) == (Stage.IN_FORCE, 1, 1, "")
    assert final.seconds >= earlier > 0
    model.unload_kernel("0", 0)
    model(x)
    assert request.progress() == final  # the clock stands still


def test_what_was_told_is_a_value(model: esper.MorphableModel, kernel: str) -> None:
    told = model.request_kernel("0", 0, kernel).progress()
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.stage = Stage.FAILED  # type: ignore[misc]  # that it cannot be written is what is tested


def test_any_thread_may_ask(gated: Any, kernel: str) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=gated)
    gate = gated.hold(kernel)
    request = model.request_kernel("0", 0, kernel)
    gated.wait_until_held()
    with ThreadPoolExecutor(4) as threads:
        assert {each.stage for each in threads.map(lambda _: request.progress(), range(40))} == {Stage.FETCHING}
    gate.set()
    assert request.result(60)


def test_a_kernel_that_does_not_come_says_why(model: esper.MorphableModel) -> None:
    request = model.request_kernel("0", 0, "nothing")
    assert request.result(60) is False
    told = request.progress()
    assert told.stage is Stage.FAILED
    assert "'nothing'" in told.reason
    assert model.kasmina_layers["0"].seed_errors[0] == told.reason
    assert str(told).startswith("failed for '0', ")
    assert told.reason in str(told)


def test_what_is_replaced_is_called_off(model: esper.MorphableModel, x: Any, kernel: str) -> None:
    held = _Held()
    model.runtime.add_executor(held)
    first = model.request_kernel("0", 0, kernel)
    assert held.asked.wait(60)
    second = model.request_kernel("0", 0, kernel)
    assert first.progress().stage is Stage.CALLED_OFF
    held.let_go.set()
    assert (first.result(60), second.result(60)) == (False, True)
    model(x)
    assert [each.progress().stage for each in (first, second)] == [Stage.CALLED_OFF, Stage.IN_FORCE]


def test_with_manual_commits_it_is_staged_until_then(shelf: KernelShelf, x: Any, kernel: str) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, commit="manual")
    request = model.request_kernel("0", 0, kernel)
    assert request.result(60)
    model(x)
    assert request.progress().stage is Stage.STAGED
    model.commit()
    assert request.progress().stage is Stage.IN_FORCE


# -- many layers -------------------------------------------------------------------------------------------------------


def test_many_layers_are_as_far_as_the_last_of_them(shelf: KernelShelf, gated: Any, x: Any, kernel: str) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=gated)
    late = shelf.put(blueprint(6, 4)).id
    gate = gated.hold(late)
    request = model.request_kernels(None, {"0": kernel, "2": late})
    gated.wait_until_held()
    while request.progress().done == 0:
        assert request.progress().stage is Stage.FETCHING
    told = request.progress()
    assert (told.stage, told.done, told.total, told.layers) == (Stage.FETCHING, 1, 2, ("0", "2"))
    assert str(told).startswith("fetching (1 of 2) for 2 layers, ")
    gate.set()
    assert request.result(60)
    model(x)
    assert str(request.progress()).startswith("in force for 2 layers, ")


def test_one_that_fails_is_why_all_do(model: esper.MorphableModel, kernel: str) -> None:
    request = model.request_kernels(None, {"0": kernel, "2": "nothing"})
    assert request.result(60) is False
    told = request.progress()
    assert told.stage is Stage.FAILED
    assert told.reason == f"'2': {request.errors['2']}"


class _Compiling:
    """A platform whose compiler has the futures of blueprints that it was asked for."""

    def __init__(self, shelf: KernelShelf) -> None:
        self.kernel_source, self.oona = shelf.platform.kernel_source, shelf.platform.oona
        self.futures: dict[Blueprint, Future[Any]] = {}

    def request(self, given: Blueprint) -> Future[Any]:
        return self.futures.setdefault(given, Future())


def test_blueprints_are_counted_while_they_are_compiled(shelf: KernelShelf, x: Any) -> None:
    platform = _Compiling(shelf)
    model = esper.wrap(mlp(8, 8, 8, 4), platform=platform)  # type: ignore[arg-type]  # all of a platform that is used
    request = model.request_kernels(None, lambda site: blueprint(site.in_features, site.out_features))
    told = request.progress()
    assert (told.stage, told.done, told.total) == (Stage.COMPILING_BLUEPRINTS, 0, 2)
    assert str(told).startswith("compiling blueprints (0 of 2) for 3 layers, ")
    first, second = platform.futures.items()
    first[1].set_result(shelf.put(first[0]))
    assert request.progress().done == 1
    second[1].set_result(shelf.put(second[0]))
    assert request.result(60)
    model(x)
    assert request.progress().stage is Stage.IN_FORCE


def test_a_blueprint_that_cannot_be_compiled_is_told(shelf: KernelShelf) -> None:
    platform = _Compiling(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=platform)  # type: ignore[arg-type]  # as above
    request = model.request_kernels("0", blueprint())
    [future] = platform.futures.values()
    future.set_exception(RuntimeError("no such instruction"))
    assert request.result(60) is False
    assert "no such instruction" in request.progress().reason


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_whoever_keeps_a_request_keeps_neither_kernel_nor_model(
    shelf: KernelShelf, x: Any, kernel: str, many: bool
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    request = model.request_kernels("0", kernel) if many else model.request_kernel("0", 0, kernel)
    assert request.result(60)
    model(x)
    runtime, loaded = weakref.ref(model.runtime), weakref.ref(next(model.runtime.plan.seeds()).kernel)
    assert loaded() is not None
    del model

    def gone() -> bool:
        gc.collect()
        return runtime() is None and loaded() is None

    wait_until(gone, "the end of model and kernel", 20.0)  # the threads that staged it had them
    assert request.progress().stage is Stage.IN_FORCE
