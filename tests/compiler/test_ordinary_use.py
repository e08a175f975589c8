"""What people compile and how: modes and options, graphs of all kinds, whole models, parts of them, and functions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.execution.kasmina_layer import KasminaLayer
from tests.compiler.agreement import (
    Block,
    Counting,
    agrees,
    agrees_through_a_swap,
    compiled,
    each_inner,
    in_the_middle,
    load,
    middle,
    put,
    unload,
)
from tests.kernel_shelf import KernelShelf
from tests.models import Branching, mlp, small_transformer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- modes and options -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "default"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False, "fallback_random": True}},
    ],
    ids=str,
)
def test_modes_and_options_go_to_inductor(
    arguments: dict[str, Any], model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    run = torch.compile(model, backend="esper", **arguments)
    agrees_through_a_swap(run, model, {"0": put(shelf)}, x)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs(mode: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    model.cuda()
    run = torch.compile(model, backend="esper", mode=mode)

    def trained(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        output = run(x.cuda())
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [each.detach().clone() for each in (output, *gradients)]

    kernel = put(shelf)
    for change in (None, lambda: load(model, "0", 0, kernel), lambda: unload(model, "0", 0)):
        if change is not None:
            change()
        for _ in range(4):  # two calls warm up, the third records, the fourth replays
            for ours, expected in zip(trained(run), trained(model), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"no_such_option": True}}, "there is no option 'no_such_option'"),
        ({"options": {"epilogue_fusion": "yes"}}, "epilogue_fusion"),
        ({"mode": "fastest"}, "fastest"),
    ],
    ids=str,
)
def test_what_inductor_does_not_know_is_refused(arguments: dict[str, Any], said: str, x: Tensor) -> None:
    with pytest.raises(Exception, match=said):
        torch.compile(esper.wrap(mlp(8, 4)), backend="esper", **arguments)(x)


@pytest.mark.slow
def test_a_swap_warns_of_nothing(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(run: nn.Module) -> set[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                run(x).sum().backward()
        return {str(warning.message) for warning in seen}

    torchs_own = trained(torch.compile(mlp(8, 6, 4), backend="inductor"))
    caplog.clear()
    run = torch.compile(model, backend="esper")
    said = trained(run)
    load(model, "0", 0, put(shelf))
    said |= trained(run)
    unload(model, "0", 0)
    said |= trained(run)
    assert said <= torchs_own
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner", "mode"), [("eager", "module"), ("aot_eager", "fx")])
def test_full_graphs(inner: str, mode: Any, shelf: KernelShelf) -> None:
    model = esper.wrap(small_transformer(blocks=1), platform=shelf.platform, mode=mode)
    kernels = {"0.qkv": put(shelf, 16, 48), "0.fc2": put(shelf, 32, 16), "1": put(shelf, 16, 4)}
    agrees_through_a_swap(compiled(model, inner, fullgraph=True), model, kernels, torch.randn(2, 5, 16))


class Broken(nn.Module):
    """Three graphs: Dynamo breaks at a function that it leaves alone, and where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        middle()
        x = self.second(x).relu()
        torch._dynamo.graph_break()
        return self.third(x)


@each_inner
def test_sites_in_several_graphs_change_together(inner: str, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Broken(), platform=shelf.platform, commit="manual")
    run = compiled(model, inner)
    kernels = {"first": put(shelf, 8, 6), "second": put(shelf, 6, 6), "third": put(shelf, 6, 4)}
    dormant = agrees(run, model, x)
    for index, (layer, kernel) in enumerate(kernels.items()):
        assert model.request_kernel(layer, 0, kernel, alpha=0.25 * (index + 1), trainable=True).result(60)
        assert torch.equal(agrees(run, model, x), dormant)
    assert len(model.commit()) == 3
    active = agrees(run, model, x)
    assert not torch.allclose(active, dormant)
    for layer in kernels:
        assert model.unload_kernel(layer, 0)
        assert torch.equal(agrees(run, model, x), active)
    assert len(model.commit()) == 3
    assert torch.equal(agrees(run, model, x), dormant)


def test_a_change_during_a_forward_waits_for_the_next(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Broken(), platform=shelf.platform)
    run = compiled(model)
    dormant, kernel = agrees(run, model, x), put(shelf, 6, 4)
    in_the_middle.append(lambda: model.request_kernel("third", 0, kernel, alpha=0.5).result(60))
    assert torch.equal(run(x).detach(), dormant)
    assert not torch.allclose(agrees(run, model, x), dormant)


@each_inner
@pytest.mark.parametrize("staged", [False, True])
def test_kernels_before_the_first_compilation(inner: str, staged: bool, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Branching(), platform=shelf.platform)
    dormant = model(x).detach()
    kernels = {"first": put(shelf, 8, 8), "second": put(shelf, 8, 4)}
    for layer, kernel in kernels.items():
        if staged:
            assert model.request_kernel(layer, 0, kernel, alpha=0.5, trainable=True).result(60)
        else:
            load(model, layer, 0, kernel)
    run = compiled(model, inner)
    first = run(x).detach()
    assert not torch.allclose(first, dormant)
    assert torch.equal(agrees(run, model, x), first)
    for layer in kernels:
        unload(model, layer, 0)
    torch.testing.assert_close(agrees(run, model, x), dormant)


class InPlace(nn.Module):
    """Changes what its layers return in place, and calls one of them without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x), inplace=True)
        with torch.no_grad():
            gate = self.gate(x).sigmoid_()
        y = y * gate
        y[:, 0] = 1.0
        return self.last(y)


def test_layers_whose_output_is_changed_in_place(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(InPlace(), platform=shelf.platform)
    kernels = {"first": put(shelf, start="identity"), "gate": put(shelf), "last": put(shelf, 6, 4)}
    agrees_through_a_swap(compiled(model), model, kernels, x)


def test_hooks(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    agrees_through_a_swap(compiled(model), model, {"0": put(shelf), "2": put(shelf, 6, 4)}, x)


def test_a_layer_that_dynamo_leaves_alone(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    model[0].forward = torch.compiler.disable(model[0].forward)
    agrees_through_a_swap(compiled(model), model, {"0": put(shelf), "2": put(shelf, 6, 4)}, x)


# -- what is compiled --------------------------------------------------------------------------------------------------


def test_a_function_over_the_model(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(model(x), target, reduction="none")

    agrees_through_a_swap(compiled(loss), model, {"0": put(shelf)}, x, torch.randn(3, 4), eager=loss)


def test_a_whole_training_step(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    def step(x: Tensor) -> Tensor:
        output: Tensor = model(x)
        output.square().sum().backward()
        return output.detach()

    agrees_through_a_swap(compiled(step), model, {"0": put(shelf)}, x, eager=step)


def test_the_model_compiled_in_place(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    counting = Counting()
    model.compile(backend="esper", options={"inner": counting})
    agrees_through_a_swap(model, model, {"0": put(shelf)}, x)
    assert counting.graphs == 2


def test_the_forward_compiled(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    counting = Counting()
    run = compiled(model.forward, counting)
    agrees_through_a_swap(run, model, {"0": put(shelf)}, x)
    assert counting.graphs == 2


def test_a_part_of_the_model_called_by_itself(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(nn.Sequential(Block(), nn.Linear(8, 4)), platform=shelf.platform)
    agrees_through_a_swap(compiled(model[0]), model, {"0.fc": put(shelf, 8, 8)}, x, eager=model[0])


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_parts_compiled_in_place(how: str, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(nn.Sequential(Block(), Block(), nn.Linear(8, 4)), platform=shelf.platform, mode="module")
    counting = Counting()
    for index in range(2):
        if how == "compile":
            model[index].compile(backend="esper", options={"inner": counting})
        else:
            model[index] = compiled(model[index], counting)
    agrees_through_a_swap(model, model, {"1.fc": put(shelf, 8, 8), "2": put(shelf, 8, 4)}, x)
    assert counting.graphs == 2  # one of both blocks while they sleep, one with the kernel


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_compiling_a_part_makes_no_warnings(
    how: str, shelf: KernelShelf, x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model = esper.wrap(nn.Sequential(Block(), nn.Linear(8, 4)), platform=shelf.platform)
    expected = model(x)
    if how == "compile":
        model[0].compile(backend="esper", options={"inner": "eager"})
    else:
        compiled(model[0], "eager")(x)
    model.eval()
    torch.testing.assert_close(model(x), expected)
    load(model, "0.fc", 0, put(shelf, 8, 8))
    assert not torch.allclose(model(x), expected)
    assert not [warning for warning in recwarn if "attributes" in str(warning.message)]


def test_a_layer_that_stands_alone(shelf: KernelShelf, x: Tensor) -> None:
    layer = KasminaLayer(0, 2, 8, 6, source=shelf.platform.kernel_source)
    run = compiled(layer)
    dormant = agrees(run, layer, x)
    assert layer.request_kernel(1, put(shelf), alpha=0.5, trainable=True).result(60)
    assert not torch.allclose(agrees(run, layer, x), dormant)
    assert layer.unload_kernel(1)
    assert torch.equal(agrees(run, layer, x), dormant)


@pytest.mark.parametrize("as_wrapped", [True, False])
def test_two_models_in_one_function_in_either_order(as_wrapped: bool, shelf: KernelShelf, x: Tensor) -> None:
    first, second = (esper.wrap(mlp(8, 6, 8), platform=shelf.platform) for _ in range(2))
    both = nn.ModuleList([first, second])

    def chain(x: Tensor) -> Tensor:
        return second(first(x)) if as_wrapped else first(second(x))

    run = compiled(chain, fullgraph=True)
    seen = [agrees(run, both, x, eager=chain)]
    for model, layer, kernel, alpha in (
        (first, "0", put(shelf), 0.25),
        (second, "0", put(shelf, seed=2), 0.75),
        (first, "2", put(shelf, 6, 8), 0.5),
    ):
        load(model, layer, 1, kernel, alpha=alpha)
        seen.append(agrees(run, both, x, eager=chain))
    for before, after in pairwise(seen):
        assert not torch.allclose(before, after)
    for model, layer in ((first, "2"), (second, "0"), (first, "0")):
        unload(model, layer, 1)
        seen.pop()
        assert torch.equal(agrees(run, both, x, eager=chain), seen[-1])
