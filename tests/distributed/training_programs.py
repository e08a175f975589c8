"""Scenarios of training on several ranks, each beside one process that sees all batches."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from tests.core.seeds import blueprint, load, states
from tests.distributed.ranks import Rank
from tests.models import mlp


def _batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 4, generator=generator)


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def _add_kernels(optimizer: torch.optim.Optimizer, model: esper.MorphableModel) -> None:
    known = {id(each) for group in optimizer.param_groups for each in group["params"]}
    new = [each for each in model.seed_parameters() if id(each) not in known]
    if new:
        optimizer.add_param_group({"params": new})


class _Swaps:
    """What is asked for before which step, and that it is in force at once: all ranks stand still meanwhile."""

    def __init__(self, here: Rank, model: esper.MorphableModel) -> None:
        self._model = model
        self._first = here.shelf.put(blueprint(start="identity")).id
        self._second = here.shelf.put(blueprint(6, 4, seed=2)).id

    def before(self, step: int) -> None:
        model = self._model
        if step == 3:
            assert model.request_kernel("0", 0, self._first, trainable=True).result(30)
        elif step == 6:
            assert model.request_kernel("2", 1, self._second, trainable=True, alpha=0.5).result(30)
        elif step == 12:
            assert model.unload_kernel("2", 1)


def _trained(here: Rank, wrap: Any, steps: int = 16, **how: Any) -> Any:
    """Train with swaps; returns the largest difference of parameters among ranks, and to one process alone."""
    torch.manual_seed(0)
    host = mlp(8, 6, 4)
    alone = esper.wrap(copy.deepcopy(host), platform=here.shelf.platform)
    model, run = wrap(here, host)
    _run(here, model, run, steps, **how)
    _run(here, alone, alone, steps, alone=True)
    mine = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    theirs = torch.cat([each.detach().reshape(-1) for each in alone.parameters()])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in alone.named_parameters()]
    others = [torch.empty_like(mine) for _ in range(here.size)]
    torch.distributed.all_gather(others, mine)
    between = max(float((each - others[0]).abs().max()) for each in others)
    return {
        "between": between,
        "alone": float((mine - theirs).abs().max()),
        "states": states(model),
        "flips": [_flipped(each) for each in (model, alone)],
    }


_flips: dict[int, list[int]] = {}


def _flipped(model: esper.MorphableModel) -> list[int]:
    """The steps whose forwards were the first with another plan."""
    return _flips.pop(id(model))


def _run(here: Rank, model: Any, run: Any, steps: int, alone: bool = False, accumulate: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    swaps = _Swaps(here, model)
    plans = []
    for step in range(steps):
        swaps.before(step)
        if step == 12 and not alone:
            _wait_for_unload(model)
        optimizer.zero_grad()
        if alone:
            batches = [_batch(step, rank) for rank in range(here.size)]
            x, y = (torch.cat(each) for each in zip(*batches, strict=True))
            _loss(run, x, y).backward()
        elif accumulate:
            x, y = _batch(step, here.rank)
            with run.no_sync():
                (_loss(run, x[:2], y[:2]) / 2).backward()
            (_loss(run, x[2:], y[2:]) / 2).backward()
        else:
            _loss(run, *_batch(step, here.rank)).backward()
        plans.append(model.runtime.plan)
        _add_kernels(optimizer, model)
        optimizer.step()
    _flips[id(model)] = [step for step in range(1, steps) if plans[step] is not plans[step - 1]]


def _wait_for_unload(model: esper.MorphableModel) -> None:
    """An unload has no future; no forward is begun meanwhile, so that it comes with the next one."""
    end = time.monotonic() + 30
    while model.ranks.agreed is None:
        assert time.monotonic() < end
        time.sleep(0.001)


def _ddp(here: Rank, host: nn.Module, **options: Any) -> Any:
    model = esper.wrap(host, platform=here.shelf.platform)
    return model, DistributedDataParallel(model, **options)


def ddp(here: Rank) -> Any:
    return _trained(here, _ddp)


def ddp_that_accumulates(here: Rank) -> Any:
    return _trained(here, _ddp, accumulate=True)


def ddp_around_a_part(here: Rank) -> Any:
    def wrap(here: Rank, host: nn.Module) -> Any:
        model = esper.wrap(host, platform=here.shelf.platform)
        return model, DistributedDataParallel(nn.Sequential(nn.Identity(), model))

    return _trained(here, wrap)


def ddp_with_backend(here: Rank) -> Any:
    def wrap(here: Rank, host: nn.Module) -> Any:
        model, run = _ddp(here, host)
        return model, torch.compile(run, backend="esper", options={"inner": "aot_eager"})

    return _trained(here, wrap)


def ddp_made_with_a_kernel_in_force(here: Rank) -> Any:
    """The kernel that is there when DDP is made can leave, and learns as the others do."""
    model = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    load(model, "0", 0, here.shelf.put(blueprint()).id, trainable=True)
    run = DistributedDataParallel(model)
    _loss(run, *_batch(0, here.rank)).backward()
    mine = [each.grad for each in model.seed_parameters()]
    others = [torch.empty_like(mine[0]) for _ in range(here.size)]
    torch.distributed.all_gather(others, mine[0])
    assert model.unload_kernel("0", 0)
    _wait_for_unload(model)
    for step in range(3):
        _loss(run, *_batch(step, here.rank)).backward()
    return {"equal": all(torch.equal(each, others[0]) for each in others), "states": states(model)["0"][0]}
