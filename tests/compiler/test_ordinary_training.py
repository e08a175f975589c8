"""Training as people do it: precisions, modes, checkpoints, accumulation, recurrence, optimizers, several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import esper
from tests.compiler.agreement import agrees, agrees_through_a_swap, compiled, each_inner, load, put, unload
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- precisions --------------------------------------------------------------------------------------------------------


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("inside", "inner"),
    [
        (False, "eager"),
        (True, "eager"),
        (False, "aot_eager"),
        (True, "aot_eager"),
        pytest.param(False, "inductor", marks=pytest.mark.slow),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_autocast(inside: bool, inner: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    def cast(x: Tensor) -> Tensor:
        with bfloat16():
            output: Tensor = model(x)
        assert output.dtype == torch.bfloat16
        return output

    run = compiled(cast if inside else model, inner)
    kernels = {"0": put(shelf)}
    if inner != "inductor":  # with which each change is a compilation
        kernels["2"] = put(shelf, 6, 4, start="identity", seed=3)
    options: dict[str, Any] = {"eager": cast} if inside else {"within": bfloat16}
    agrees_through_a_swap(run, model, kernels, x, **options, rtol=2e-2, atol=1e-2)
    if not inside:  # the same function, without
        agrees_through_a_swap(run, model, kernels, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_other_precisions(dtype: torch.dtype, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4).to(dtype), platform=shelf.platform)
    name = str(dtype).removeprefix("torch.")
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    kernels = {"0": put(shelf, dtype=name), "2": put(shelf, 6, 4, dtype=name)}
    agrees_through_a_swap(compiled(model), model, kernels, x.to(dtype), **tolerance)


@pytest.mark.parametrize("way", [None, "overwrite", "swap"])
def test_a_change_of_precision_between_two_steps(
    way: str | None, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    run = compiled(model)
    load(model, "0", 0, put(shelf))
    convert = getattr(torch.__future__, f"set_{way}_module_params_on_conversion", lambda _: None)
    convert(True)
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
            agrees(run, model, x.to(dtype), **tolerance)
    finally:
        convert(False)
    unload(model, "0", 0)
    agrees(run, model, x)


# -- modes -------------------------------------------------------------------------------------------------------------


@each_inner
def test_with_and_without_gradients(inner: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    run = compiled(model, inner)

    def agree() -> None:
        agrees(run, model, x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output, expected = run(x), model(x)
            assert (output.requires_grad, output.is_inference()) == (expected.requires_grad, expected.is_inference())
            torch.testing.assert_close(output, expected)

    agree()
    load(model, "0", 0, put(shelf))
    agree()
    with torch.inference_mode():  # changes made while no gradients are wanted do not keep the model from learning
        load(model, "0", 0, put(shelf, seed=2))
        load(model, "2", 0, put(shelf, 6, 4))
        model.set_alpha("0", 0, 0.25)
        run(x)
    agree()
    with torch.inference_mode():
        unload(model, "0", 0)
        run(x)
    agree()


class Regularised(nn.Module):
    """Batch normalisation and dropout: another function in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(8, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.5),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


@each_inner
def test_training_and_evaluation(inner: str, shelf: KernelShelf) -> None:
    model = esper.wrap(Regularised(), platform=shelf.platform)
    run, x = compiled(model, inner), torch.randn(16, 8)

    def agree() -> None:
        for training in (True, False, True):
            model.train(training)
            agrees(run, model, x)

    agree()
    load(model, "first", 0, put(shelf))
    agree()
    load(model, "last", 0, put(shelf, 6, 4))
    model.eval()
    unload(model, "first", 0)
    agree()


def test_host_parameters_that_are_frozen_and_thawed(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    run, kernel = compiled(model), put(shelf)

    def agree() -> None:
        agrees(run, model, x)
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        agrees(run, model, x)
        model.requires_grad_(False)
        agrees(run, model, x)
        model.requires_grad_(True)
        agrees(run, model, x)

    agree()
    load(model, "0", 0, kernel)
    agree()
    unload(model, "0", 0)
    agree()


# -- checkpoints, accumulation, recurrence -----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Recomputes its blocks in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([mlp(8, 6, 8) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpoints_inside(inner: str, shelf: KernelShelf) -> None:
    model = esper.wrap(Checkpointed(), platform=shelf.platform)
    kernels = {"blocks.0.0": put(shelf), "blocks.1.2": put(shelf, 6, 8), "head": put(shelf, 8, 4)}
    if inner == "inductor":  # one change is one compilation
        kernels = {"blocks.0.0": put(shelf)}
    agrees_through_a_swap(compiled(model, inner), model, kernels, torch.randn(3, 8), rtol=1e-5, atol=1e-5)


@each_inner
def test_checkpoints_around(inner: str, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 8), platform=shelf.platform)
    run = compiled(model, inner)

    def twice(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(run, checkpoint(run, x, use_reentrant=False), use_reentrant=False)

    kernels = {"0": put(shelf), "2": put(shelf, 6, 8)}
    agrees_through_a_swap(twice(run), model, kernels, x, eager=twice(model))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_commit_between_micro_batches(at_once: bool, model: esper.MorphableModel, shelf: KernelShelf) -> None:
    kernels = [put(shelf), put(shelf, rank=2)]
    batches = [torch.randn(3, 8) for _ in range(5)]

    def accumulated(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        losses = []
        for index, batch in enumerate(batches):
            if index in (1, 2):
                load(model, "0", index, kernels[index - 1])
            elif index > 2:
                unload(model, "0", index - 2)
            losses.append(run(batch).square().sum())
            if not at_once:
                losses[-1].backward()
        if at_once:
            torch.stack(losses).sum().backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters() if p.grad is not None)]

    run = compiled(model)
    for ours, expected in zip(accumulated(run), accumulated(model), strict=True):
        torch.testing.assert_close(ours, expected)


class Recurrent(nn.Module):
    """Calls one layer three times, in one graph or in three."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.cell, self.head, self.breaks = nn.Linear(8, 8), nn.Linear(8, 4), breaks

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).tanh()
            if self.breaks:
                torch._dynamo.graph_break()
        return self.head(x)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_layer_that_is_called_again(breaks: bool, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Recurrent(breaks), platform=shelf.platform)
    run = compiled(model, fullgraph=not breaks)
    agrees_through_a_swap(run, model, {"cell": put(shelf, 8, 8), "head": put(shelf, 8, 4)}, x)


# -- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


class Training:
    """A schedule: a kernel that fades in and learns, a frozen one at another layer, a replacement, their removal."""

    def __init__(self, shelf: KernelShelf) -> None:
        self.shelf = shelf
        self.kernels = [put(shelf, start="identity", seed=4), put(shelf, 6, 4), put(shelf, rank=2)]

    def change(self, step: int, model: esper.MorphableModel, optimizer: Optimizer) -> None:
        first, second, third = self.kernels
        if step == 4:
            load(model, "0", 0, first, alpha=esper.LinearRamp(0.0, 1.0, 5))
            optimizer.add_param_group({"params": list(model.seed_parameters())})
        elif step == 7:
            load(model, "2", 1, second, alpha=esper.CosineRamp(0.0, 0.5, 4), trainable=False, isolate=True)
        elif step == 11:
            load(model, "0", 0, third, trainable=False)
        elif step == 14:
            unload(model, "0", 0)
        elif step == 17:
            unload(model, "2", 1)

    def losses(
        self,
        compile_: Callable[[Any], Any],
        make: Callable[[Any], Optimizer],
        clip: bool = False,
        scale: bool = False,
        compile_step: bool = False,
    ) -> list[float]:
        """What the model's loss is at each of 20 steps."""
        torch.manual_seed(3)
        model = esper.wrap(mlp(8, 6, 4), platform=self.shelf.platform)
        run, optimizer = compile_(model), make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=scale)
        step_once = compile_(optimizer.step) if compile_step else lambda: scaler.step(optimizer)
        found = []
        for step in range(20):
            self.change(step, model, optimizer)
            x = torch.randn(16, 8)
            loss = (run(x) - x[:, :4].abs()).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            step_once()
            scaler.update()
            found.append(loss.item())
        return found


@pytest.mark.parametrize(
    ("optimizer", "inner"),
    [
        ("momentum", "aot_eager"),
        ("foreach", "aot_eager"),
        ("fused", "eager"),
        pytest.param("fused", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_schedule_gives_the_losses_of_eager_training(optimizer: str, inner: str, shelf: KernelShelf) -> None:
    training, make = Training(shelf), OPTIMIZERS[optimizer]
    options = {"clip": optimizer == "momentum", "scale": optimizer == "foreach"}
    expected = training.losses(lambda model: model, make, **options)
    found = training.losses(lambda model: compiled(model, inner), make, **options)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.slow
def test_a_compiled_optimizer_step(shelf: KernelShelf) -> None:
    training, make = Training(shelf), OPTIMIZERS["foreach"]
    expected = training.losses(lambda run: run, make)
    assert training.losses(compiled, make, compile_step=True) == pytest.approx(expected, rel=1e-4)


# -- several processes -------------------------------------------------------------------------------------------------


def test_distributed_data_parallel(shelf: KernelShelf, group: None) -> None:
    model = esper.wrap(mlp(256, 1100, 256, 4), platform=shelf.platform)
    parallel = DistributedDataParallel(model, bucket_cap_mb=1)
    graphs = []

    def counting(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    run, x = compiled(parallel, counting), torch.randn(3, 256)
    dormant = agrees(run, model, x)
    assert len(graphs) > 1  # one for each bucket of gradients
    for layer, kernel in {"0": put(shelf, 256, 1100), "4": put(shelf, 256, 4)}.items():
        load(model, layer, 0, kernel)
        agrees(run, model, x)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    for layer in ("0", "4"):
        unload(model, layer, 0)
        output = agrees(run, model, x)
    assert torch.equal(output, dormant)
