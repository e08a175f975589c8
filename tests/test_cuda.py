"""What only a CUDA device can show."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from tests.kernel_shelf import KernelShelf
from tests.models import mlp, small_transformer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True])
def test_a_swap_in_a_training_model_never_waits_for_the_device(
    compiled: bool, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = esper.wrap(mlp(8, 6, 4).cuda(), platform=shelf.platform, commit="manual")
    run = torch.compile(model, backend="esper") if compiled else model
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    x = torch.randn(16, 8, device="cuda")
    run(x).sum().backward()
    assert model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True).result(60)
    model.commit()
    run(x).sum().backward()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for alpha in (0.25, 1.0):
            model.set_alpha("0", 0, alpha)
            run(x).sum().backward()
        model.unload_kernel("0", 0)
        model.commit()
        run(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_training_thread_times_no_configurations_of_a_new_kernels_code(
    shelf: KernelShelf, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    model = esper.wrap(mlp(8, 6, 4).cuda(), platform=shelf.platform)
    run = torch.compile(model, backend="esper")
    x = torch.randn(16, 8, device="cuda")
    run(x).sum().backward()
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=3, start="kaiming", activation="gelu")).id
    assert model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True).result(250)
    timed: list[object] = []
    monkeypatch.setattr(CachingAutotuner, "autotune_to_one_config", lambda *arguments, **_: timed.append(arguments))
    run(x).sum().backward()
    assert model.kasmina_layers["0"].state.in_force(0)
    assert timed == []


def test_blocks_that_are_compiled_by_themselves_take_kernels(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(nn.Sequential(*(mlp(8, 6, 8) for _ in range(3))).cuda(), platform=shelf.platform)
    x = torch.randn(5, 8, device="cuda")
    eager = copy.deepcopy(model)
    assert esper.compile_blocks(model) == ["0", "1", "2"]
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    for name in (None, "1.0", "2.0"):
        for each in (model, eager):
            if name is not None:
                assert asyncio.run(each.load_kernel(name, 0, kernel, alpha=0.5, trainable=True))
            each.zero_grad()
            each(x).square().sum().backward()
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
        for ours, expected in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_a_model_that_moves_to_the_device_takes_its_seeds_along(shelf: KernelShelf, fresh_dynamo: None) -> None:
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=shelf.platform)
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    x = torch.randn(5, 8)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    expected = model(x)
    model.cuda()
    assert model.runtime.state.device.type == "cuda"
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="esper")
    torch.testing.assert_close(compiled(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_dormant_is_bit_identical_on_the_device(fresh_dynamo: None) -> None:
    host = small_transformer().cuda()
    wrapped = esper.wrap(copy.deepcopy(host))
    x = torch.randn(2, 5, 16, device="cuda")
    assert torch.equal(wrapped(x), host(x))
    ours, theirs = torch.compile(wrapped, backend="esper"), torch.compile(host)
    assert torch.equal(ours(x), theirs(x))
