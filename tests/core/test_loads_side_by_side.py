"""One slow thing holds up one thing: loads whose fetch hangs, and loads that are called off."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esper
from esper.artifacts import Artifact, build_artifact
from esper.execution.sources import FetchedKernel, KernelSourceError
from tests.core.seeds import RecordingSink, blueprint, outputs, states
from tests.kernel_shelf import KernelShelf

_MANY = 40  # more than are fetched at a time


class HangingSource:
    """Has some kernels, and hangs where it is asked for any other, until it is let go."""

    def __init__(self, count: int = 3) -> None:
        self.artifacts: list[Artifact] = [build_artifact(blueprint(8, 8, seed=seed)) for seed in range(count)]
        self.let_go = threading.Event()
        self.asked: list[str] = []

    def resolve(self, reference: str) -> str:
        return reference

    def fetch(self, artifact_id: str) -> FetchedKernel:
        self.asked.append(artifact_id)
        for artifact in self.artifacts:
            if artifact.id == artifact_id and not (artifact is self.artifacts[-1] and len(self.asked) == 1):
                return FetchedKernel(artifact.data, None)
        self.let_go.wait(60)
        raise KernelSourceError("the store has hung up")

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return None

    def trust(self) -> None:
        return None


@pytest.fixture
def source():
    source = HangingSource()
    yield source
    source.let_go.set()


def _model(source: HangingSource, layers: int = 2) -> esper.MorphableModel:
    platform = SimpleNamespace(kernel_source=source, oona=RecordingSink())
    host = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    model = esper.wrap(host, platform=platform, mode="module")  # type: ignore[arg-type]  # all of a platform that wrap reads
    model(torch.randn(2, 8))
    return model


def test_many_fetches_that_hang_hold_up_nothing_else(source: HangingSource) -> None:
    model = _model(source, _MANY)
    hanging = [model.request_kernel(str(layer), 0, f"{layer:064x}") for layer in range(_MANY)]
    other = _model(source)
    for each in (model, other):
        assert each.request_kernel("0", 1, source.artifacts[0].id).result(30)
    assert not any(future.done() for future in hanging)
    for layer in range(_MANY):
        assert model.unload_kernel(str(layer), 0)
    assert [future.result(5) for future in hanging] == [False] * _MANY
    assert model.request_kernel("1", 1, source.artifacts[1].id).result(30)
    model(torch.randn(2, 8))
    assert states(model)["1"][:2] == ["DORMANT", "ACTIVE"]


def test_a_kernel_whose_fetch_hung_and_was_called_off_can_be_asked_for_again(source: HangingSource) -> None:
    model, kernel = _model(source), source.artifacts[-1].id  # it hangs only the first time
    first = model.request_kernel("0", 0, kernel)
    with pytest.raises(TimeoutError):
        first.result(1.5)
    assert model.unload_kernel("0", 0)
    assert first.result(5) is False
    assert model.request_kernel("0", 0, kernel).result(30)


def test_requests_at_once_come_into_force_together(source: HangingSource) -> None:
    model = _model(source, 6)
    futures = [model.request_kernel(str(layer), 0, source.artifacts[layer % 2].id, alpha=0.5) for layer in range(6)]
    assert all(future.result(30) for future in futures)
    version = model.runtime.version
    outputs(model, torch.randn(2, 8))
    assert [state[0] for state in states(model).values()] == ["ACTIVE"] * 6
    assert model.runtime.version == version + 1


def test_kernels_of_many_layers_are_fetched_beside_those_that_hang(source: HangingSource) -> None:
    model = _model(source, _MANY)
    kernels = {str(layer): "f" * 62 + f"{layer:02x}" for layer in range(_MANY - 3)}  # none of which comes
    kernels |= {str(_MANY - 3 + number): artifact.id for number, artifact in enumerate(source.artifacts)}
    request = model.request_kernels(list(kernels), kernels)
    while not set(kernels.values()) <= set(source.asked):
        assert not request.done()
    source.let_go.set()
    assert request.result(30) is False
    assert "hung up" in next(iter(request.errors.values()))
    assert all(state[0] in ("DORMANT", "ERROR_RECOVERY") for state in states(model).values())


class ForgetfulSource(HangingSource):
    """Is told what will be fetched, and cannot look for it in one go."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[list[str]] = []

    def expect(self, artifact_ids: Sequence[str]) -> None:
        self.expected.append(list(artifact_ids))
        raise KernelSourceError("not today")


def test_a_source_is_told_of_kernels_that_are_not_here_and_need_not_find_them() -> None:
    source = ForgetfulSource()
    model, ids = _model(source), [artifact.id for artifact in source.artifacts]
    assert model.request_kernels(["0", "1"], {"0": ids[0], "1": ids[1]}).result(30)
    assert model.request_kernels(["0", "1"], {"0": ids[1], "1": ids[0]}).result(30)
    assert source.expected == [ids[:2]]
    assert source.asked == ids[:2]


def test_kernels_that_take_turns_are_fetched_once(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), platform=shelf.platform, seeds_per_layer=2)
    layers = list(model.kasmina_layers)
    turns = [
        {name: shelf.put(blueprint(8, 8, seed=20 * turn + number)).id for number, name in enumerate(layers)}
        for turn in range(20)
    ]
    for _ in range(2):
        for kernels in turns:
            assert model.request_kernels(layers, kernels).result(30)
            model(torch.randn(2, 8))
    found = [layer.kernel_cache.get_cache_stats() for layer in model.kasmina_layers.values()]
    assert [(each["cache_misses"], each["cache_hits"]) for each in found] == [(20, 20)] * 8


def test_a_load_whose_task_is_cancelled_never_comes_into_force(source: HangingSource) -> None:
    model, x = _model(source), torch.randn(2, 8)
    before = outputs(model, x)

    async def cancelled(kernel: str, wait_until_staged: bool) -> None:
        task = asyncio.ensure_future(model.load_kernel("0", 0, kernel))
        await asyncio.sleep(0)
        if wait_until_staged:
            while not model.runtime.pending:
                pass  # without giving the task a turn
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for kernel, wait_until_staged in (("f" * 64, False), (source.artifacts[0].id, True)):
        asyncio.run(cancelled(kernel, wait_until_staged))
        assert torch.equal(outputs(model, x), before)
        assert states(model)["0"][0] == "DORMANT"
    assert model.request_kernel("0", 0, source.artifacts[0].id).result(30)
    assert not torch.equal(outputs(model, x), before)


@pytest.mark.slow
def test_many_models_share_their_threads_and_these_end(source: HangingSource) -> None:
    before = threading.active_count()
    for _ in range(12):
        model = _model(source)
        assert model.request_kernel("0", 0, source.artifacts[0].id).result(30)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None
    assert threading.active_count() <= before + 12


def test_a_source_that_raises_what_ends_programs_fails_its_load_alone(source: HangingSource) -> None:
    """On a thread where nobody else would hear of it."""
    model = _model(source)
    good, bad = source.artifacts[0].id, source.artifacts[1].id
    fetch = source.fetch

    def fetching(artifact_id: str) -> FetchedKernel:
        if artifact_id == bad:
            raise SystemExit("the store is closed")
        return fetch(artifact_id)

    source.fetch = fetching  # type: ignore[method-assign]
    first, second = model.request_kernel("0", 0, bad), model.request_kernel("1", 0, good)
    assert not first.result(60)
    assert second.result(60)
    assert "SystemExit('the store is closed')" in str(model.kasmina_layers["0"].seed_errors)
