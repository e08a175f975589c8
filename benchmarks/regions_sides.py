"""A llama of some depth, compiled as a whole or block by block, in one process; `benchmarks.apart` calls this."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import torch
from torch import nn

import esper
from benchmarks.workloads import WORKLOADS, Workload, training_step

__all__ = ["depth_side"]

_LR = 1e-4
_PATIENCE = 900.0  # seconds to wait for a kernel
_RANKS = {"one": 8, "all": 16}
"""Kernels of different structures, so that each has to be compiled."""


def depth_side(
    workload: str, device: str, depth: int, wrapped: bool, by_blocks: bool, steps: int, platform: str
) -> dict[str, Any]:
    """Seconds of the first training step, from the first call that compiles, and of a steady one; MiB of memory.

    Of a wrapped model also, for a kernel in the block in the middle ("one") and then kernels in every block ("all"),
    the seconds from the request to the end of the first step with it, and the worst step meanwhile. With `steps=0` only
    the first step.
    """
    what = WORKLOADS[workload]
    with esper.Platform.embedded(Path(platform)) as shelf:
        host = what.model(device, depth)
        linear = host.get_submodule(what.site(depth))
        assert isinstance(linear, nn.Linear)
        kernels = {
            kind: shelf.compile_sync(
                esper.Blueprint.bottleneck(linear.in_features, linear.out_features, rank=rank, start="kaiming")
            ).id
            for kind, rank in _RANKS.items()
            if wrapped and steps
        }
        model = esper.wrap(host, platform=shelf) if wrapped else host
        # Imports of the compiler and its questions about the machine are not what is compared.
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(8, device=device))
        torch._dynamo.reset()
        started = time.perf_counter()
        run = _compiled(model, wrapped, by_blocks, what.site(depth))
        trainer = _Trainer(what, model, run, device)
        trainer.step()
        first = time.perf_counter() - started
        if not steps:
            return {"first_step": first}
        trainer.durations.clear()
        for _ in range(steps):
            trainer.step()
        found: dict[str, Any] = {"first_step": first, "step": statistics.median(trainer.durations)}
        if isinstance(model, esper.MorphableModel):
            sites = {"one": [what.site(depth)], "all": _sites(model, what.site(depth))}
            for seed, (kind, names) in enumerate(sites.items()):
                found[kind] = trainer.load(model, names, seed, kernels[kind])
    on_card = torch.cuda.max_memory_allocated() if device.startswith("cuda") else psutil.Process().memory_info().rss
    found["memory_mib"] = on_card / 2**20
    return found


def _compiled(model: nn.Module, wrapped: bool, by_blocks: bool, site: str) -> nn.Module:
    if not by_blocks:
        compiled: nn.Module = torch.compile(model, backend="esper" if wrapped else "inductor")  # type: ignore[assignment]  # torch says Callable
        return compiled
    if isinstance(model, esper.MorphableModel):
        esper.compile_blocks(model)
    else:
        for block in model.get_submodule(_list_of(site)).children():
            block.compile()
    return model


def _list_of(site: str) -> str:
    """The name of the list of blocks that a site is in."""
    parts = site.split(".")
    return ".".join(parts[: next(index for index, part in enumerate(parts) if part.isdigit())])


def _sites(model: esper.MorphableModel, site: str) -> list[str]:
    """The layers of all blocks that are what `site` is in its own."""
    prefix = _list_of(site)
    ending = site.removeprefix(prefix).lstrip(".").partition(".")[2]
    start = f"{prefix}." if prefix else ""
    return [name for name in model.kasmina_layers if name.startswith(start) and name.endswith(f".{ending}")]


class _Trainer:
    """Makes steps, and knows how long each took."""

    def __init__(self, what: Workload, model: nn.Module, run: nn.Module, device: str) -> None:
        self._step = training_step(what.bound(run, device), torch.optim.SGD(model.parameters(), lr=_LR))
        self._device = device
        self.durations: list[float] = []

    def step(self) -> None:
        started = time.perf_counter()
        self._step()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - started)

    def load(self, model: esper.MorphableModel, names: list[str], seed: int, kernel: str) -> dict[str, float]:
        """Request a kernel for a seed of the layers `names`, and train until it is in force in all."""
        self.durations.clear()
        started = time.perf_counter()
        loads = [model.request_kernel(name, seed, kernel, alpha=0.5, trainable=True) for name in names]
        while not all(model.kasmina_layers[name].state.lifecycle(seed).name == "ACTIVE" for name in names):
            if time.perf_counter() - started > _PATIENCE:
                raise TimeoutError(f"no kernel in force {_PATIENCE:g} s after the request")
            self.step()
        assert all(load.result() for load in loads)
        return {"to_active": time.perf_counter() - started, "steps": len(self.durations), "worst": max(self.durations)}
