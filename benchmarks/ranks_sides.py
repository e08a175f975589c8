"""One rank of several that train a model together; `benchmarks.apart` calls this in each of their processes."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from benchmarks.workloads import WORKLOADS, Workload, training_step

__all__ = ["agreement_side", "training_side"]

_LR = 1e-3
_PATIENCE = 600.0  # seconds to wait for a swap
_AROUND = 20  # steps before and after a swap of which the worst one counts


def training_side(
    rank: int, size: int, rendezvous: str, workload: str, device: str, steps: int, rounds: int, platform: str
) -> dict[str, Any]:
    """Idle steps beside DDP's, then `steps` steps with three swaps in them, by Esper and by a module swap and re-wrap.

    Seconds. Also by how much parameters differ among ranks, and from those of one process on the joined batch.
    """
    what = WORKLOADS[workload]
    with _Group(rank, size, rendezvous, device), esper.Platform.embedded(Path(platform) / f"rank{rank}") as shelf:
        host = what.model(device)
        site = what.site(what.blocks)
        linear = host.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        shape = linear.in_features, linear.out_features
        kernels = [shelf.compile_sync(esper.Blueprint.low_rank(*shape, rank=each)).id for each in (4, 8, 4)]
        found = _idle(what, host, device, rank, rounds, shelf)
        model = esper.wrap(copy.deepcopy(host), platform=shelf)
        mine = _Trainer(_loss(what, DistributedDataParallel(model), device, [rank]), model, device)
        at, worst = [], []
        for seed, kernel in enumerate(kernels):
            mine.run(steps // 4)
            assert model.ranks is not None
            future = model.request_kernel(site, seed % 2, kernel, alpha=0.5, trainable=True)
            before = len(mine.durations)
            at.append(mine.until_changed(model))
            mine.run(_AROUND)
            assert future.result(0)
            worst.append(max(mine.durations[before:]))
        mine.run(max(steps - len(mine.durations), 0))
        found |= {"step": statistics.median(mine.durations), "worst": max(worst), "forwards": at}
        found |= _differences(what, host, model, device, site, kernels, at, len(mine.durations), shelf)
        found["peer"] = _module_swaps(what, host, device, rank, site, steps)
    return found


def agreement_side(rank: int, size: int, rendezvous: str, swaps: int, longest: float, platform: str) -> dict[str, Any]:
    """The forwards at which `swaps` swaps came into force, each asked for after a delay of 0 to `longest` seconds."""
    what, late = WORKLOADS["mlp"], random.Random(rank)
    with _Group(rank, size, rendezvous, "cpu"), esper.Platform.embedded(Path(platform) / f"rank{rank}") as shelf:
        host, site = what.model("cpu", 2), what.site(2)
        linear = host.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        shape = linear.in_features, linear.out_features
        kernels = [shelf.compile_sync(esper.Blueprint.low_rank(*shape, rank=each)).id for each in (2, 3)]
        model = esper.wrap(host, platform=shelf)
        trainer = _Trainer(_loss(what, DistributedDataParallel(model), "cpu", [rank]), model, "cpu")
        at, waits = [], []
        for number in range(swaps):
            asked = time.perf_counter() + longest * late.random()
            at.append(trainer.until_changed(model, asked, lambda n=number: _request(model, site, kernels[n % 2])))
            waits.append(time.perf_counter() - asked)
    return {"forwards": at, "seconds": waits}


def _request(model: esper.MorphableModel, site: str, kernel: str) -> None:
    model.request_kernel(site, 0, kernel, trainable=True)


class _Group:
    """The process group, as long as the block lasts."""

    def __init__(self, rank: int, size: int, rendezvous: str, device: str) -> None:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store = dist.FileStore(rendezvous, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        dist.destroy_process_group()


class _Trainer:
    """Makes steps, and knows how long each took. Kernels that come enter the optimizer."""

    def __init__(self, loss: Callable[[], torch.Tensor], model: nn.Module, device: str) -> None:
        self._optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
        self._loss = loss
        self._model = model
        self._device = device
        self.durations: list[float] = []

    def step(self) -> None:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self._loss().backward()
        if isinstance(self._model, esper.MorphableModel):
            known = {id(each) for group in self._optimizer.param_groups for each in group["params"]}
            new = [each for each in self._model.seed_parameters() if id(each) not in known]
            if new:
                self._optimizer.add_param_group({"params": new})
        self._optimizer.step()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - started)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def until_changed(
        self, model: esper.MorphableModel, when: float = 0.0, request: Callable[[], None] | None = None
    ) -> int:
        """Train until another plan is in force, on all ranks; its forward. Ask for it by `request`, not before `when`.

        Every rank stops after the same step, since the plan changes at the same forward on all.
        """
        plan, started = model.runtime.plan, time.perf_counter()
        while model.runtime.plan is plan:
            if time.perf_counter() - started > _PATIENCE:
                raise TimeoutError(f"no change in {_PATIENCE:g} s")
            if request is not None and time.perf_counter() >= when:
                request()
                request = None
            self.step()
        assert model.ranks is not None
        return model.ranks.forward


def _loss(what: Workload, run: Callable[..., Any], device: str, ranks: list[int]) -> Callable[[], torch.Tensor]:
    """The loss on the batches of `ranks`, one behind the other."""
    batches = []
    for rank in ranks:
        torch.manual_seed(1 + rank)
        batches.append(what.batch())
    args = [torch.cat(each).to(device) for each in zip(*(args for args, _ in batches), strict=True)]
    kwargs = {name: torch.cat([kwargs[name] for _, kwargs in batches]).to(device) for name in batches[0][1]}
    return lambda: what.loss(run(*args, **kwargs))


def _idle(
    what: Workload, host: nn.Module, device: str, rank: int, rounds: int, shelf: esper.Platform
) -> dict[str, Any]:
    """Steps of a plain and of a wrapped model in turn, both in DDP, with nothing to agree about."""
    plain, wrapped = copy.deepcopy(host), esper.wrap(copy.deepcopy(host), platform=shelf)
    sides = {}
    for name, model in (("plain", plain), ("wrapped", wrapped)):
        loss = _loss(what, DistributedDataParallel(model), device, [rank])
        sides[name] = training_step(loss, torch.optim.SGD(model.parameters(), lr=_LR))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            dist.barrier()
            started = time.perf_counter()
            for _ in range(5):
                sides[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started) / 5)
    ratios = [mine / theirs for mine, theirs in zip(seconds["wrapped"][2:], seconds["plain"][2:], strict=True)]
    return {"idle": statistics.median(ratios), "plain": statistics.median(seconds["plain"][2:])}


def _differences(
    what: Workload, host: nn.Module, model: esper.MorphableModel, device: str, site: str, kernels: list[str],
    at: list[int], steps: int, shelf: esper.Platform,
) -> dict[str, float]:  # fmt: skip
    """The largest difference of a parameter to the first rank's, and to one process's on all batches."""
    alone = esper.wrap(copy.deepcopy(host), platform=shelf, commit="manual")
    trainer = _Trainer(_loss(what, alone, device, list(range(dist.get_world_size()))), alone, device)
    for seed, (kernel, forward) in enumerate(zip(kernels, at, strict=True)):
        trainer.run(forward - 1 - len(trainer.durations))
        assert alone.request_kernel(site, seed % 2, kernel, alpha=0.5, trainable=True).result(_PATIENCE)
        alone.commit()
    trainer.run(steps - len(trainer.durations))
    mine = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    theirs = torch.cat([each.detach().reshape(-1) for each in alone.parameters()])
    return {"among_ranks": float((mine - first).abs().max()), "to_one": float((mine - theirs).abs().max())}


class _Grown(nn.Module):
    """A linear layer with a low-rank one beside it, as one swaps it in by hand."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + 0.5 * self.up(self.down(x))
        return y


def _module_swaps(what: Workload, host: nn.Module, device: str, rank: int, site: str, steps: int) -> dict[str, float]:
    """The peer: at three steps that were fixed before, the layer is replaced and DDP is made anew."""
    model = copy.deepcopy(host)
    parent, _, name = site.rpartition(".")
    linear = model.get_submodule(site)
    assert isinstance(linear, nn.Linear)
    loss = _loss(what, DistributedDataParallel(model), device, [rank])
    durations, worst = [], 0.0
    for number in range(4):
        started = time.perf_counter()
        if number:
            setattr(model.get_submodule(parent), name, _Grown(linear, 4 * number))
            loss = _loss(what, DistributedDataParallel(model), device, [rank])
        trainer = _Trainer(loss, model, device)
        trainer.step()
        first = time.perf_counter() - started
        trainer.run(max(steps // 4, _AROUND))
        if number:
            worst = max(worst, first, *trainer.durations[1:_AROUND])
        durations += trainer.durations[1:]
    return {"step": statistics.median(durations), "worst": worst}
