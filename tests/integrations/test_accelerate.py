"""Accelerate prepares wrapped models, trains them in lower precision, and saves and loads what they have grown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import esper
from esper import Blueprint
from esper.execution.lifecycle import SeedLifecycleState
from tests.kernel_shelf import KernelShelf


@pytest.fixture(autouse=True)
def _a_process_of_ones_own() -> Iterator[None]:
    """Accelerate has one precision per process, whatever its next Accelerator is asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _prepared(shelf: KernelShelf, compiled: bool, **options: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    model = esper.wrap(host, platform=shelf.platform)
    if compiled:
        model.compile(backend="esper", options={"inner": "aot_eager"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    model.attach_optimizer(optimizer, scheduler)
    return accelerator, model, optimizer, scheduler


def _train(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, steps: int = 3) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return loss.detach()


def _grow(shelf: KernelShelf, model: Any) -> None:
    kernel = shelf.put(Blueprint.low_rank(8, 6, rank=2, start="kaiming")).id
    assert model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True).result()
    model.commit()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_a_prepared_model_has_grown_is_saved_and_goes_on(
    shelf: KernelShelf, tmp_path: Path, precision: str, compiled: bool
) -> None:
    parts = _prepared(shelf, compiled, mixed_precision=precision)
    accelerator, model, optimizer, _ = parts
    _train(*parts)
    _grow(shelf, model)
    before = [each.detach().clone() for each in model.seed_parameters()]
    _train(*parts)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.seed_parameters(), strict=True))
    accelerator.save_state(str(tmp_path))
    expected = _train(*parts)

    again = _prepared(shelf, compiled, mixed_precision=precision)
    again[0].load_state(str(tmp_path))
    assert again[1].kasmina_layers["0"].state.lifecycle(0) is SeedLifecycleState.ACTIVE
    assert len(again[2].param_groups) == len(optimizer.param_groups) == 2
    torch.testing.assert_close(_train(*again), expected)
    for one, other in zip(model.parameters(), again[1].parameters(), strict=True):
        torch.testing.assert_close(other, one)


def test_gradients_accumulate_over_batches(shelf: KernelShelf) -> None:
    parts = _prepared(shelf, False, gradient_accumulation_steps=2)
    _grow(shelf, parts[1])
    before = [each.detach().clone() for each in parts[1].seed_parameters()]
    _train(*parts, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, parts[1].seed_parameters(), strict=True))
    _train(*parts, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(before, parts[1].seed_parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_learn_in_half_precision_with_a_grad_scaler(shelf: KernelShelf, compiled: bool) -> None:
    torch.manual_seed(0)
    model: Any = esper.wrap(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), platform=shelf.platform)
    if compiled:
        model.compile(backend="esper", options={"inner": "aot_eager"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.attach_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # too large: the first steps are not taken
    x = torch.randn(16, 8)
    _grow(shelf, model)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), x.sum(1, keepdim=True))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
