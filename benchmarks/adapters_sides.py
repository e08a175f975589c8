"""A compiled model whose LoRA adapters are swapped while it runs, by Esper and by PEFT; `benchmarks.apart` calls these.

Both have the same host, frozen, as PEFT has it, and the same adapters on disk, written by PEFT.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper
from benchmarks.harness import paired
from benchmarks.hot_swap_sides import Recorder
from benchmarks.workloads import WORKLOADS, Workload, training_step

__all__ = ["TARGETS", "esper_side", "idle_side", "peft_side", "steady_side", "write_adapters"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LR = 1e-4
_WARM_STEPS = 20
_PATIENCE = 900.0  # seconds to wait for a kernel


def _host(what: Workload, device: str, depth: int, *, frozen: bool = True) -> nn.Module:
    return what.model(device, depth).requires_grad_(not frozen)


def write_adapters(folder: Path, workload: str, depth: int, rank: int, count: int) -> None:
    """`count` adapters of one structure and of other weights, each in a folder named by its number."""
    import peft

    model = peft.get_peft_model(
        _host(WORKLOADS[workload], "cpu", depth), peft.LoraConfig(r=rank, target_modules=list(TARGETS))
    )
    adapters = [each for name, each in model.named_parameters() if ".lora_" in name]
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for each in adapters:
                each.normal_(std=0.02)
        model.save_pretrained(str(folder / str(number)))


def _figures(recorder: Recorder, swaps: Sequence[tuple[int, int]], latencies: Sequence[float]) -> dict[str, Any]:
    """`swaps` are the numbers of the steps at which one was asked for, and of the first one with the adapter."""
    durations = recorder.durations
    while_swapping = [max(durations[asked : first + 1]) for asked, first in swaps]
    return {
        "step": statistics.median(durations),
        "worst": max(while_swapping),
        "typical_worst": statistics.median(while_swapping),
        "latency": statistics.median(latencies),
        "latency_worst": max(latencies),
        "steps_until": statistics.median(first - asked for asked, first in swaps),
    }


def _recorder(what: Workload, run: Any, model: nn.Module, device: str, training: bool) -> tuple[Recorder, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    loss = what.bound(run, device)
    return Recorder(training_step(loss, optimizer) if training else torch.no_grad()(loss), device), optimizer


def esper_side(
    workload: str, device: str, depth: int, training: bool, steps: int, adapters: str, platform: str
) -> dict[str, Any]:
    """Ten adapters in turn, twice, by `request_kernels`, while steps go on.

    The latency of a swap is from the request until it is staged, on other threads; then the next forward has it. In the
    second turn the kernels are those of the first one, which the model keeps.
    """
    from esper.integrations import peft

    what = WORKLOADS[workload]
    with esper.Platform.embedded(Path(platform)) as shelf:
        model: Any = esper.wrap(_host(what, device, depth), platform=shelf)
        model.train(training)
        imports, kernels = [], []
        for folder in sorted(Path(adapters).iterdir(), key=lambda each: int(each.name)):
            started = time.perf_counter()
            blueprints = peft.load(model, folder)
            kernels.append({name: shelf.compile_sync(each).id for name, each in blueprints.items()})
            imports.append(time.perf_counter() - started)
        run = torch.compile(model, backend="esper")
        recorder, optimizer = _recorder(what, run, model, device, training)
        if training:
            model.attach_optimizer(optimizer)
        assert model.request_kernels(list(kernels[0]), kernels[0], trainable=training).result()
        recorder.run(_WARM_STEPS)
        recorder.start()
        swaps, latencies = [], []
        for ids in (*kernels[1:], *kernels[:-1]):
            recorder.run(steps)
            asked, ended = recorder.count, list[float]()
            request = model.request_kernels(list(ids), ids, trainable=training)
            started = time.perf_counter()
            request.add_done_callback(lambda _, ended=ended: ended.append(time.perf_counter()))
            while any(model.kasmina_layers[name].kernel_in_force(0) != each for name, each in ids.items()):
                if time.perf_counter() - started > _PATIENCE:
                    raise TimeoutError(f"no adapter in force {_PATIENCE:g} s after the request: {request}")
                recorder.run(1)
            assert request.result(), request.errors
            swaps.append((asked, recorder.count - 1))
            latencies.append(ended[0] - started)
        recorder.run(steps)
        return {
            **_figures(recorder, swaps, latencies[: len(kernels) - 1]),
            "latency_again": statistics.median(latencies[len(kernels) - 1 :]),
            "import_first": imports[0],
            "import_next": statistics.median(imports[1:]),
        }


def peft_side(workload: str, device: str, depth: int, training: bool, steps: int, adapters: str) -> dict[str, Any]:
    """Ten adapters in turn, twice, by `hotswap_adapter`, which reads a folder and copies weights between two steps."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    what = WORKLOADS[workload]
    folders = sorted(Path(adapters).iterdir(), key=lambda each: int(each.name))
    model = peft.PeftModel.from_pretrained(_host(what, device, depth), str(folders[0]), is_trainable=training)
    model.train(training)
    recorder, _ = _recorder(what, torch.compile(model), model, device, training)
    recorder.run(_WARM_STEPS)
    recorder.start()
    swaps, latencies = [], []
    for folder in (*folders[1:], *folders[:-1]):
        recorder.run(steps)
        asked, started = recorder.count, time.perf_counter()
        hotswap_adapter(model, str(folder), "default", torch_device=device)
        latencies.append(time.perf_counter() - started)
        recorder.run(1)
        swaps.append((asked, recorder.count - 1))
    recorder.run(steps)
    return _figures(recorder, swaps, latencies)


def steady_side(
    workload: str, device: str, depth: int, training: bool, rounds: int, adapters: str, platform: str
) -> dict[str, list[float]]:
    """Steps of both with one adapter in force, in turn, so that whatever else the machine does is in both."""
    import peft

    from esper.integrations import peft as bridge

    what, folder = WORKLOADS[workload], Path(adapters) / "0"
    with esper.Platform.embedded(Path(platform)) as shelf:
        grown: Any = esper.wrap(_host(what, device, depth), platform=shelf)
        kernels = {name: shelf.compile_sync(each).id for name, each in bridge.load(grown, folder).items()}
        adapted = peft.PeftModel.from_pretrained(_host(what, device, depth), str(folder), is_trainable=training)
        sides = {"esper": (torch.compile(grown, backend="esper"), grown), "peft": (torch.compile(adapted), adapted)}
        calls: dict[str, Callable[[], object]] = {}
        for name, (run, model) in sides.items():
            model.train(training)
            recorder, optimizer = _recorder(what, run, model, device, training)
            if name == "esper":
                if training:
                    grown.attach_optimizer(optimizer)
                assert grown.request_kernels(list(kernels), kernels, trainable=training).result()
            recorder.run(1)
            calls[name] = lambda recorder=recorder: recorder.run(1)
        return paired(calls, rounds)


def idle_side(
    workload: str, device: str, depth: int, training: bool, rounds: int, rank: int, platform: str
) -> dict[str, list[float]]:
    """Steps of the plain model, of Esper's with dormant seeds and of PEFT's with adapters that do nothing, in turn.

    The host trains, on all sides: without an adapter nothing else could.
    """
    import peft

    what = WORKLOADS[workload]
    with esper.Platform.embedded(Path(platform)) as shelf:
        plain = _host(what, device, depth, frozen=False)
        wrapped: Any = esper.wrap(_host(what, device, depth, frozen=False), platform=shelf)
        idle = peft.get_peft_model(_host(what, device, depth), peft.LoraConfig(r=rank, target_modules=list(TARGETS)))
        idle.requires_grad_()
        sides: dict[str, tuple[Any, nn.Module]] = {
            "plain": (torch.compile(plain), plain),
            "esper": (torch.compile(wrapped, backend="esper"), wrapped),
            "peft": (torch.compile(idle), idle),
        }
        calls: dict[str, Callable[[], object]] = {}
        for name, (run, model) in sides.items():
            model.train(training)
            recorder, _ = _recorder(what, run, model, device, training)
            recorder.run(1)
            calls[name] = lambda recorder=recorder: recorder.run(1)
        return paired(calls, rounds)
