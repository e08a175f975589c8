"""Laws 2 and 7: the thread that trains waits neither for a load in progress nor for the device."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper import Blueprint
from esper.artifacts import TrustStore
from esper.execution import background
from esper.execution.sources import FetchedKernel, KernelSource
from esper.growth import Probe
from tests.kernel_shelf import KernelShelf
from tests.models import mlp
from tests.services.programs import Program


class HostReads(TorchDispatchMode):
    """Refuses every operation that needs a tensor's value on the host."""

    refused = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::item")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name().split(".")[0] in self.refused:
            raise AssertionError(f"{func.name()} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


def test_the_guard_of_these_tests_notices_a_host_read() -> None:
    with pytest.raises(AssertionError, match="on the host"), HostReads():
        torch.ones(1).item()


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_forward_backward_and_commit_read_no_tensor_on_the_host(mode: str, shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode=mode, commit="manual")  # type: ignore[arg-type]  # a text among the parameters
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    ramp = esper.LinearRamp(0.0, 1.0, 2)
    request = model.request_kernel("0", 0, kernel, alpha=ramp, trainable=True, isolate=True)
    assert request.result(30)
    x = torch.randn(3, 8)
    with HostReads():
        for change in (lambda: None, model.commit, lambda: model.set_alpha("0", 0, 0.5), model.get_model_stats):
            change()
            model(x).sum().backward()
        model.unload_kernel("0", 0)
        model.commit()
        model(x).sum().backward()
        model.explain()


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda each: torch.optim.SGD(each, lr=torch.tensor(0.1))])
def test_an_attached_optimizer_follows_a_commit_without_reading_a_tensor(make: Any, shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, commit="manual")
    optimizer = make(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    model.attach_optimizer(optimizer, warmup=2)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    request = model.request_kernels("*", {"0": kernel, "2": shelf.put(Blueprint.affine(6, 4)).id}, trainable=True)
    assert request.result(30)
    with HostReads():
        model.commit()
        assert len(optimizer.param_groups) == 2
        model(torch.randn(3, 8)).sum().backward()
        model.unload_kernels()
        model.commit()
    assert len(optimizer.param_groups) == 1


def test_a_probe_reads_no_tensor_while_batches_go_by() -> None:
    model = esper.wrap(mlp(8, 6, 4))
    with HostReads(), Probe(model, rows=4) as probe:
        for _ in range(3):
            model(torch.randn(3, 8)).sum().backward()
    assert probe["0"].count == 9


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_step_and_its_commit_read_no_tensor_on_the_host(
    inner: str, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    compiled = torch.compile(model, backend="esper", options={"inner": inner})
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    x = torch.randn(3, 8)
    compiled(x)
    assert asyncio.run(model.load_kernel("0", 0, kernel, trainable=True))
    compiled(x)  # compiles the variant, which looks at constants of its own
    model.unload_kernel("0", 0)
    items = []

    def count(self: torch.Tensor) -> Any:
        items.append(self)
        return original(self)

    original = torch.Tensor.item
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", count)
        compiled(x).sum().backward()
        assert asyncio.run(model.load_kernel("0", 0, kernel, trainable=True))
        compiled(x).sum().backward()
        model.set_alpha("0", 0, 0.25)
        compiled(x).sum().backward()
    assert items == []


class Slow:
    """A source that does not answer until it is let."""

    def __init__(self, source: KernelSource) -> None:
        self._source = source
        self.asked, self.go_on = threading.Event(), threading.Event()

    def _wait(self) -> None:
        self.asked.set()
        assert self.go_on.wait(60)

    def resolve(self, reference: str) -> str:
        self._wait()
        return self._source.resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        self._wait()
        return self._source.fetch(artifact_id)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        self._wait()
        return self._source.attachment(artifact_id, target_key)

    def trust(self) -> TrustStore | None:
        self._wait()
        return self._source.trust()


def _in_time(work: Callable[[], object]) -> None:
    """`work` ends by itself, on a thread of its own, while everything that it must not wait for stands still."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_a_hanging_store_holds_up_nothing_but_its_own_load(shelf: KernelShelf) -> None:
    ready = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=1)).id
    late = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=2)).id
    layer = esper.KasminaLayer(0, 4, 8, 6, source=(source := Slow(shelf.platform.kernel_source)))
    source.go_on.set()
    assert asyncio.run(layer.load_kernel(0, ready, trainable=True))
    source.go_on.clear()
    source.asked.clear()
    request = layer.request_kernel(1, late)
    assert source.asked.wait(30)
    x = torch.randn(3, 8)

    def train() -> None:
        for step in range(20):
            layer(x).sum().backward()
            layer.set_alpha(0, step / 20)
            layer.get_layer_stats()
        assert layer.unload_kernel(0)
        layer(x)

    _in_time(train)
    assert not request.done()
    source.go_on.set()
    assert request.result(30)


_heard: list[tuple[int, str]] | None = None
_SLOW_WORK = ("open", "import", "exec", "compile", "sqlite3.connect", "socket.connect", "subprocess.Popen")


def _hear(event: str, _: object) -> None:
    if _heard is not None and event in _SLOW_WORK:
        _heard.append((threading.get_ident(), event))


def test_a_request_opens_imports_and_compiles_nothing_on_the_thread_that_asks(shelf: KernelShelf) -> None:
    global _heard
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=4)).id
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    model(torch.randn(3, 8))
    sys.addaudithook(_hear)  # for good: they cannot be removed
    _heard = []
    try:
        request = model.request_kernel("0", 0, kernel, trainable=True)
        heard, here = list(_heard), threading.get_ident()
        assert request.result(100)
        assert {event for thread, event in _heard if thread != here}, "the load does, elsewhere"
        assert [event for thread, event in heard if thread == here] == []
    finally:
        _heard = None


@pytest.mark.slow
def test_a_load_leaves_the_interpreter_to_others_again_and_again(
    shelf: KernelShelf, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: Counter[str] = Counter()
    sleep = time.sleep

    def counting(seconds: float) -> None:
        rested[threading.current_thread().name] += 1
        sleep(seconds)

    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=5)).id
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    compiled = torch.compile(model, backend="esper")
    compiled(torch.randn(3, 8))
    monkeypatch.setattr(time, "sleep", counting)
    monkeypatch.setattr(background, "_LONGEST_WORK", 0.0)  # pieces of less than a millisecond go together
    assert model.request_kernel("0", 0, kernel, trainable=True).result(200)
    assert rested["esper-fetching"] > 5, "between the pieces of reading and checking it"
    assert rested["esper-staging"] > 6, "between the pieces of looking for the variant and loading it"


FIRST_LOAD = """
import gc, sys
from torch import nn
import esper

full = []
with esper.Platform.embedded(sys.argv[1]) as platform:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=platform)
    gc.collect()
    gc.callbacks.append(lambda phase, about: full.append(phase) if about["generation"] == 2 else None)
    modules = set(sys.modules)
    assert model.request_kernel("0", 0, sys.argv[2]).result(100), model.kasmina_layers["0"].seed_errors
print(len(set(sys.modules) - modules) > 100, full, gc.isenabled())
"""


@pytest.mark.slow
def test_the_first_load_imports_much_and_has_nobody_wait_for_a_full_collection(shelf: KernelShelf) -> None:
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=3)).id
    assert Program(FIRST_LOAD, shelf.root, kernel).finish() == ["True [] True"]
