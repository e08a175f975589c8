"""What only a CUDA device can show."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper
from esper import Blueprint
from esper.growth import Probe
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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_enters_the_optimizer_and_leaves_it_without_waiting_for_the_device(
    compiled: bool, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    model = esper.wrap(mlp(8, 6, 4).cuda(), platform=shelf.platform, commit="manual")
    run = torch.compile(model, backend="esper") if compiled else model
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, foreach=True)
    model.attach_optimizer(optimizer)
    x = torch.randn(16, 8, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()

    def load() -> None:
        assert model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True).result(60)

    def unload() -> None:
        model.unload_kernel("0", 0)

    for change in (load, unload, load):  # whatever is compiled is compiled in these
        step()
        change()
        model.commit()
        step()
    for change in (unload, load):
        change()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.commit()
            step()
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    seeds = list(model.seed_parameters())
    assert seeds
    assert {id(each) for each in seeds} <= {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert all(optimizer.state[each]["exp_avg"].is_cuda for each in seeds)


def test_half_precision_with_a_scaler_trains_kernels(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4).cuda(), platform=shelf.platform)
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5, trainable=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.attach_optimizer(optimizer)
    run = torch.compile(model, backend="esper")
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    x, y = torch.randn(32, 8, device="cuda"), torch.randn(32, 4, device="cuda")
    before = [each.detach().clone() for each in model.seed_parameters()]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (run(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.seed_parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_probe_measures_on_the_device(compiled: bool, fresh_dynamo: None) -> None:
    host = mlp(8, 6, 4)
    found = {}
    x = torch.randn(32, 8)
    for device in ("cpu", "cuda"):
        model = esper.wrap(copy.deepcopy(host).to(device))
        run = torch.compile(model, backend="esper") if compiled and device == "cuda" else model
        with Probe(model) as probe:
            run(x.to(device)).square().mean().backward()
        found[device] = probe["0"]
    for name in ("inputs", "cross", "gradients"):
        ours, expected = (getattr(found[device], name).cpu() for device in ("cuda", "cpu"))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp", "ddp compiled"])
def test_a_rank_of_nccl_grows(way: str, nccl: None, shelf: KernelShelf, fresh_dynamo: None) -> None:
    host = mlp(8, 6, 4).cuda()
    alone = esper.wrap(copy.deepcopy(host), platform=shelf.platform)
    model = esper.wrap(host, platform=shelf.platform)
    if way == "fsdp":
        fully_shard(model)
    run = model if way == "fsdp" else DistributedDataParallel(model)
    if way == "ddp compiled":
        run = torch.compile(run, backend="esper")
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id
    x, y = torch.randn(32, 8, device="cuda"), torch.randn(32, 4, device="cuda")
    losses = {}
    for each, forward in ((model, run), (alone, alone)):
        optimizer = torch.optim.SGD(each.parameters(), 0.05)
        each.attach_optimizer(optimizer)
        losses[each] = []
        for step in range(12):
            if step == 4:
                request = each.request_kernel("0", 0, kernel, alpha=0.5, trainable=True)
                assert request.result(60)
            loss = (forward(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[each].append(float(loss.detach()))
    assert model.kasmina_layers["0"].state.in_force(0)
    assert losses[model] == pytest.approx(losses[alone], rel=1e-3, abs=1e-4)
