"""Kernels behind blocks of compiled models, and in them: workers compile, and the process that trains does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from tests.compiler.agreement import agrees, load, unload
from tests.compiler.variants import compilations, in_force, jobs, origins, train_until
from tests.kernel_shelf import KernelShelf
from tests.models import TransformerBlock

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]

W = 8


def test_workers_compile_kernels_behind_and_inside_of_a_block(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(nn.Sequential(TransformerBlock(W, 2)), [TransformerBlock, nn.Linear], platform=shelf.platform)
    run, x = torch.compile(model, backend="esper", fullgraph=True), torch.randn(2, 3, W)
    agrees(run, model, x)
    assert in_force(model) == ["host compile"]
    before, done = compilations(), jobs()
    behind = shelf.put(Blueprint.deepen(W, W, 4, start="kaiming")).id
    inside = shelf.put(Blueprint.bottleneck(2 * W, W, 3, start="kaiming")).id
    load(model, "0", 0, behind, alpha=0.5, trainable=True)
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    load(model, "0.fc2", 1, inside, alpha=0.25, trainable=True)
    agrees(run, model, x)
    assert model.fossilize("0", 0)
    agrees(run, model, x)
    train_until(lambda: model.kasmina_layers["0"].state.lifecycle(0).name == "FOSSILIZED", run, x)
    agrees(run, model, x)
    unload(model, "0.fc2", 1)
    agrees(run, model, x)
    assert jobs() == done + 4
    assert set(origins(model)[0]) == {"host compile", "worker"}
    assert compilations() == before


def test_blocks_that_are_compiled_one_by_one_share_what_is_behind_them(shelf: KernelShelf, empty_store: Path) -> None:
    host = nn.Sequential(*[TransformerBlock(W, 2) for _ in range(3)], nn.Linear(W, 2))
    model = esper.wrap(host, [TransformerBlock, nn.Linear], platform=shelf.platform)
    assert esper.compile_blocks(model) == ["0", "1", "2"]
    x = torch.randn(2, 3, W)
    model(x).sum().backward()
    before, done = compilations(), jobs()
    kernel = shelf.put(Blueprint.deepen(W, W, 4)).id
    want = model(x).detach()
    assert model.request_kernels(["0", "1", "2"], kernel, trainable=True).result()
    torch.testing.assert_close(model(x), want)
    model(x).square().sum().backward()
    for name in "012":
        assert any(
            each.grad is not None and each.grad.any() for each in model.kasmina_layers[name].kernel_parameters(0)
        )
    assert jobs() == done + 2  # the first block has an input without gradient, the others share a graph
    assert compilations() == before
