"""Kernels loaded into compiled models: workers compile, the process that trains does not, and steps go on."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from tests.compiler.agreement import agrees, load, put
from tests.compiler.variants import AMPLE, compilations, in_force, jobs, origins, train_until
from tests.kernel_shelf import KernelShelf
from tests.models import Branching, mlp

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]


def _steps_until(loaded: Future[bool], run: torch.nn.Module, x: torch.Tensor) -> int:
    steps = train_until(loaded.done, run, x)
    assert loaded.result()
    return steps


def test_a_worker_compiles_while_steps_go_on(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper", fullgraph=True), torch.randn(3, 4)
    agrees(run, model, x)
    assert in_force(model) == ["host compile"]
    kernel, done = put(shelf, 4, 6), jobs()
    before = compilations()

    future = model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True)
    assert _steps_until(future, run, x) > 3
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    assert jobs() == done + 1

    assert model.unload_kernel("0", 0)  # the dormant variant is kept
    agrees(run, model, x)
    assert in_force(model) == ["host compile"]
    load(model, "0", 0, kernel)  # the plan that was in force
    agrees(run, model, x)
    load(model, "0", 0, put(shelf, 4, 6, seed=2))  # a kernel of the same structure
    agrees(run, model, x)
    assert jobs() == done + 1
    load(model, "0", 1, kernel, alpha=0.25)  # a second seed
    agrees(run, model, x)
    assert model.unload_kernel("0", 0)  # alone, the second seed has the structure of the first
    agrees(run, model, x)
    assert jobs() == done + 2
    assert origins(model) == [["host compile", "worker", "worker"]]
    assert compilations() == before


def test_graphs_for_training_and_inference_change_in_one_commit(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform, commit="manual")
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    agrees(run, model, x)
    dormant = agrees(run, model, x, within=torch.no_grad)
    assert in_force(model) == ["host compile"] * 2
    before, done = compilations(), jobs()
    assert model.request_kernel("0", 0, put(shelf, 4, 6), alpha=0.5, trainable=True).result(AMPLE)
    assert origins(model) == [["host compile", "worker"]] * 2
    assert jobs() == done + 2
    assert torch.equal(agrees(run, model, x), dormant)
    assert [transition.layer for transition in model.commit()] == ["0"]
    assert in_force(model) == ["worker"] * 2
    agrees(run, model, x)
    agrees(run, model, x, within=torch.no_grad)
    assert jobs() == done + 2
    assert compilations() == before


def test_dynamic_shapes(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run = torch.compile(model, backend="esper", dynamic=True)
    agrees(run, model, torch.randn(3, 4))
    before = compilations()
    load(model, "0", 0, put(shelf, 4, 6))
    for size in (2, 5, 64):
        agrees(run, model, torch.randn(size, 4))
    assert in_force(model) == ["worker"]
    assert compilations() == before


def test_graphs_between_graph_breaks_change_together(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(Branching(), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 8)
    agrees(run, model, x)
    before = compilations()
    kernels = {"first": put(shelf, 8, 8), "second": put(shelf, 8, 4)}
    futures = [model.request_kernel(name, 0, kernel, alpha=0.5) for name, kernel in kernels.items()]
    for future in futures:
        _steps_until(future, run, x)
    agrees(run, model, x)
    assert in_force(model) == ["worker"] * 2
    assert compilations() == before


class CheckpointInCheckpoint(nn.Module):
    """A layer in a checkpoint in a checkpoint, with views. `[*, 4] -> [*, 2]`"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def _inner(self, x: Tensor) -> Tensor:
        return self.first(x.flatten().view(x.shape)).sin()

    def _outer(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._inner, x, use_reentrant=False)
        return self.second(y).cos()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._outer, x, use_reentrant=False)
        return y


def test_checkpoints_in_checkpoints(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(CheckpointInCheckpoint(), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    agrees(run, model, x)
    before = compilations()
    load(model, "first", 0, put(shelf, 4, 6))
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    assert compilations() == before


def test_autocast(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)

    def bf16() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    agrees(run, model, x, within=bf16, rtol=0.05, atol=0.05)
    before = compilations()
    load(model, "0", 0, put(shelf, 4, 6))
    assert agrees(run, model, x, within=bf16, rtol=0.05, atol=0.05).dtype == torch.bfloat16
    assert in_force(model) == ["worker"]
    assert compilations() == before
