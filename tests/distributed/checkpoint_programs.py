"""Scenarios of checkpoints, which one launch writes and others of other sizes read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import esper
from esper.distributed import ShardedCheckpointError, load_checkpoint, save_checkpoint
from tests.core.seeds import blueprint, states
from tests.distributed.ranks import Rank
from tests.models import mlp

_BATCHES = 4  # in each step, whatever the number of ranks


def _model(here: Rank) -> Any:
    torch.manual_seed(here.rank)  # what is not loaded differs
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=here.shelf.platform)
    if here.size > 1:
        for each in (model[0], model[2], model):
            fully_shard(each)
    return model, torch.optim.AdamW(model.parameters(), 0.01)


def _step(here: Rank, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    each = _BATCHES // here.size
    rows = []
    for number in range(here.rank * each, (here.rank + 1) * each):
        generator = torch.Generator().manual_seed(100 * step + number)
        rows.append(torch.randn(3, 8, generator=generator))
    optimizer.zero_grad()
    model(torch.cat(rows)).square().mean().backward()
    optimizer.step()


def _whole(model: nn.Module) -> list[list[float]]:
    full = (getattr(each, "full_tensor", lambda each=each: each)() for each in model.parameters())
    return [each.detach().reshape(-1).tolist() for each in full]


def _folder() -> Path:
    return Path(os.environ["ESPER_TEST_CHECKPOINT"])


def saves(here: Rank) -> Any:
    model, optimizer = _model(here)
    with torch.no_grad():
        for each in model.parameters():
            torch.manual_seed(each.numel())
            local = each.to_local()
            local.copy_(torch.randn(8)[: local.numel()].sum() * 0.1 + 0.01)
    for step in range(3):
        _step(here, model, optimizer, step)
    kernels = [here.shelf.put(blueprint(8, 6, start="identity")).id, here.shelf.put(blueprint(6, 4)).id]
    assert model.request_kernel("0", 1, kernels[0], trainable=True, alpha=esper.LinearRamp(0.25, 0.75, 20)).result(30)
    assert model.request_kernel("2", 0, kernels[1], alpha=0.5).result(30)
    _step(here, model, optimizer, 3)
    optimizer.add_param_group({"params": list(model.seed_parameters()), "lr": 0.03})
    for step in range(4, 8):
        _step(here, model, optimizer, step)
    save_checkpoint(_folder(), model, optimizer)
    for step in range(8, 12):
        _step(here, model, optimizer, step)
    return {"parameters": _whole(model), "states": states(model), "alpha": model.kasmina_layers["0"].state.alpha(1)}


def loads(here: Rank) -> Any:
    model, optimizer = _model(here)
    load_checkpoint(_folder(), model, optimizer)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    for step in range(8, 12):
        _step(here, model, optimizer, step)
    found = {"parameters": _whole(model), "states": states(model), "alpha": model.kasmina_layers["0"].state.alpha(1)}
    return {**found, "rates": rates, "agrees": _agrees_again(here, model)}


def _agrees_again(here: Rank, model: Any) -> bool:
    if here.size == 1:
        return True
    future = model.request_kernel("2", 1, here.shelf.put(blueprint(6, 4, seed=9)).id)
    end = time.monotonic() + 30
    while states(model)["2"][1] != "ACTIVE" and time.monotonic() < end:
        model(torch.ones(1, 8)).sum().backward()
    return future.result()


def what_does_not_fit(here: Rank) -> Any:
    messages = []
    for attempt in (
        lambda: load_checkpoint(_folder(), esper.wrap(mlp(8, 6, 4), "2", platform=here.shelf.platform)),
        lambda: load_checkpoint(_folder(), mlp(8, 6, 4)),
    ):
        try:
            attempt()
        except (esper.EsperError, ShardedCheckpointError) as error:
            messages.append(str(error))
    return messages
