"""The ways to give a kernel to a model that is training, each as a function that `benchmarks.apart` can call.

Every side trains the same model on one core and records each step, with garbage collection as in a user's program.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import esper
from benchmarks.harness import paired
from benchmarks.one_core import confine
from benchmarks.step_trace import StepTrace
from benchmarks.workloads import WORKLOADS, Workload, training_step

__all__ = ["RANK", "esper_side", "idle_side", "peft_side", "swap_side"]

RANK = 16
_LR = 1e-4
_WARM_STEPS = 20
_PATIENCE = 900.0  # seconds to wait for a kernel


class Recorder:
    """Runs steps and notes when each ended."""

    def __init__(self, step: Callable[[], None], device: str) -> None:
        self._step = step
        self._synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self._marks: list[float] = []

    def run(self, steps: int) -> None:
        """Run `steps` steps."""
        step, synchronise, note, clock = self._step, self._synchronise, self._marks.append, time.perf_counter
        for _ in range(steps):
            step()
            synchronise()
            note(clock())

    def start(self) -> None:
        """Begin to record."""
        self._marks[:] = [time.perf_counter()]

    @property
    def count(self) -> int:
        """How many steps were recorded."""
        return len(self._marks) - 1

    @property
    def durations(self) -> list[float]:
        """Seconds of each step, from the end of the one before."""
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


def record(
    recorder: Recorder,
    steps: int,
    request: Callable[[], None],
    in_force: Callable[[], bool],
    use: Callable[[], None],
    unload: Callable[[], None],
    *,
    with_control: bool = True,
) -> StepTrace:
    """Train `steps` steps before the request, with the kernel, and after unloading, and then in control.

    The control has as many steps as there were from the request to its own beginning.

    `request` asks for the kernel, `in_force` tells after each step whether it had the kernel, `use` is called after the
    first such step and once more halfway through, `unload` takes the kernel away.
    """
    recorder.run(_WARM_STEPS)
    confine()
    recorder.run(_WARM_STEPS)
    gc.collect()  # and left on: what collects in a user's program collects here
    recorder.start()
    recorder.run(steps // 2)
    confine()  # again, for processes that were started meanwhile
    recorder.run(steps - steps // 2)
    requested, limit = recorder.count, time.perf_counter() + _PATIENCE
    request()
    recorder.run(1)
    while not in_force():
        if time.perf_counter() > limit:
            raise TimeoutError(f"no kernel in force {_PATIENCE:g} s after the request")
        recorder.run(1)
    first = recorder.count - 1
    use()
    recorder.run(steps // 2)
    use()
    recorder.run(steps - steps // 2)
    unloaded = recorder.count
    unload()
    recorder.run(steps)
    ended = recorder.count
    if with_control:
        recorder.run(ended - requested)
    return StepTrace(recorder.durations, requested, first, unloaded, ended)


def _sgd(parameters: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=_LR)


def _check_learns(parameters: list[nn.Parameter]) -> None:
    if not parameters or any(each.grad is None for each in parameters):
        raise RuntimeError("the kernel is said to be in force and gets no gradient")


# ---- Esper ---------------------------------------------------------------------------------------------------------


def esper_side(
    workload: str, device: str, steps: int, platform: str, *, blocks: int | None = None, with_control: bool = True
) -> dict[str, Any]:
    """A kernel requested from a platform in the folder `platform` and loaded into the compiled model."""
    what = WORKLOADS[workload]
    blocks = blocks or what.blocks
    site = what.site(blocks)
    with esper.Platform.embedded(Path(platform)) as shelf:
        host = what.model(device, blocks)
        linear = cast(nn.Linear, host.get_submodule(site))
        blueprint = esper.Blueprint.bottleneck(linear.in_features, linear.out_features, rank=RANK, start="kaiming")
        kernel = shelf.compile_sync(blueprint)
        model = esper.wrap(host, platform=shelf)
        compiled = torch.compile(model, backend="esper")
        optimizer = _sgd(list(model.parameters()))
        recorder = Recorder(training_step(what.bound(compiled, device), optimizer), device)
        started = time.perf_counter()
        recorder.run(1)
        first_step = time.perf_counter() - started
        swap = _EsperSwap(model, site, kernel.id, optimizer)
        trace = record(recorder, steps, swap.request, swap.in_force, swap.use, swap.unload, with_control=with_control)
        return {
            "trace": trace.to_json(),
            "first_step": first_step,
            "fxgraph_cache_misses": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"],
            "report": model.compile_report().to_dict(),
        }


class _EsperSwap:
    def __init__(self, model: esper.MorphableModel, site: str, kernel: str, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._site, self._kernel, self._optimizer = model, site, kernel, optimizer
        self._layer = model.kasmina_layers[site]
        self._alphas = iter((0.5, 1.0))

    def request(self) -> None:
        self._asked = self._model.request_kernel(self._site, 0, self._kernel, alpha=next(self._alphas), trainable=True)

    def in_force(self) -> bool:
        if not self._asked.done():
            return False
        if not self._asked.result():
            raise RuntimeError(f"the kernel was not loaded: {self._layer.seed_errors[0]}")
        return self._layer.state.lifecycle(0) is esper.SeedLifecycleState.ACTIVE

    def use(self) -> None:
        if len(self._optimizer.param_groups) == 1:
            self._optimizer.add_param_group({"params": list(self._model.seed_parameters())})
        else:
            self._model.set_alpha(self._site, 0, next(self._alphas))

    def unload(self) -> None:
        _check_learns(list(self._model.seed_parameters()))
        self._optimizer.param_groups.pop()
        self._model.unload_kernel(self._site, 0)


# ---- the module swap -----------------------------------------------------------------------------------------------


class Grown(nn.Module):
    """A linear layer and a kernel, blended as Esper does it."""

    def __init__(self, linear: nn.Linear, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.kernel = nn.Sequential(
            nn.Linear(linear.in_features, RANK), nn.GELU(), nn.Linear(RANK, linear.out_features)
        )
        self.register_buffer("alpha", torch.tensor(alpha))
        self.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(self.linear(x), self.kernel(x), self.get_buffer("alpha"))


def swap_side(workload: str, device: str, steps: int) -> dict[str, Any]:
    """The layer replaced by a module that has the kernel, in a model under plain `torch.compile`."""
    what = WORKLOADS[workload]
    model = what.model(device)
    site = what.site(what.blocks)
    linear = cast(nn.Linear, model.get_submodule(site))
    grown = Grown(linear, 0.5)
    added = list(grown.kernel.parameters())
    optimizer = _sgd(list(model.parameters()))
    recorder = Recorder(training_step(what.bound(torch.compile(model), device), optimizer), device)

    def use() -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": added})
        else:
            grown.get_buffer("alpha").fill_(1.0)

    def unload() -> None:
        _check_learns(added)
        optimizer.param_groups.pop()
        model.set_submodule(site, linear)

    def request() -> None:
        model.set_submodule(site, grown)

    return {"trace": record(recorder, steps, request, lambda: True, use, unload).to_json()}


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def prepared_for_hotswap(what: Workload, device: str) -> nn.Module:
    """The model with an idle LoRA at every linear layer, where Esper has its seeds, ready for PEFT's hotswap.

    PEFT freezes the host; here it trains, as on the other sides.
    """
    import peft
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    host = what.model(device)
    layers = [name for name, module in host.named_modules() if isinstance(module, nn.Linear)]
    model = peft.get_peft_model(host, peft.LoraConfig(r=RANK // 2, target_modules=layers))
    prepare_model_for_compiled_hotswap(model, target_rank=RANK)
    return cast(nn.Module, model.requires_grad_())


def peft_side(workload: str, device: str, steps: int) -> dict[str, Any]:
    """A LoRA of the kernel's rank hot-swapped into a model that was prepared for it."""
    import peft
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    what = WORKLOADS[workload]
    model = prepared_for_hotswap(what, device)
    layer = f"base_model.model.{what.site(what.blocks)}"
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{layer}.lora_")]
    torch.manual_seed(2)
    adapter = {name: 0.02 * torch.randn_like(model.get_parameter(name)) for name in names}
    nothing = {name: torch.zeros_like(value) for name, value in adapter.items()}
    config = peft.LoraConfig(r=RANK, target_modules=[what.site(what.blocks)])
    added = [model.get_parameter(name) for name in names]
    optimizer = _sgd([value for name, value in model.named_parameters() if ".lora_" not in name])
    recorder = Recorder(training_step(what.bound(torch.compile(model), device), optimizer), device)

    def use() -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": added})

    def unload() -> None:
        _check_learns(added)
        optimizer.param_groups.pop()
        hotswap_adapter_from_state_dict(model, nothing, "default", config)

    def request() -> None:
        hotswap_adapter_from_state_dict(model, adapter, "default", config)

    return {"trace": record(recorder, steps, request, lambda: True, use, unload).to_json()}


# ---- while nothing is asked for ------------------------------------------------------------------------------------


def idle_side(workload: str, device: str, rounds: int, platform: str) -> dict[str, list[float]]:
    """Training steps of the plain model, of Esper's with dormant seeds and of PEFT's with idle LoRAs, in turn."""
    what = WORKLOADS[workload]
    with esper.Platform.embedded(Path(platform)) as shelf:
        wrapped = esper.wrap(what.model(device), platform=shelf)
        plain, prepared = what.model(device), prepared_for_hotswap(what, device)
        host = [value for name, value in prepared.named_parameters() if ".lora_" not in name]
        sides: dict[str, tuple[Callable[..., Any], list[Any]]] = {
            "plain": (torch.compile(plain), list(plain.parameters())),
            "esper": (torch.compile(wrapped, backend="esper"), list(wrapped.parameters())),
            "peft": (torch.compile(prepared), host),
        }
        steps = {
            name: training_step(what.bound(model, device), _sgd(parameters))
            for name, (model, parameters) in sides.items()
        }
        for step in steps.values():
            step()
        confine()
        return paired(steps, rounds)
