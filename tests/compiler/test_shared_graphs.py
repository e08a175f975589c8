"""Layers and models of one structure share a graph and its variants, as those of a plain model share their graph."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from tests.compiler.agreement import agrees, agrees_through_a_swap, compiled, load, put, unload
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("counted_dynamo")


def graphs() -> int:
    """How many graphs Dynamo has captured since the test began."""
    return int(counters["stats"]["unique_graphs"])


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


@torch.compiler.disable(recursive=False)
def _apart(expert: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = expert(x)
    return y


class Mixture(nn.Module):
    """Experts in a loop that breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12)
        self.experts = nn.ModuleList(Expert() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y = y + shares[:, index : index + 1] * _apart(expert, x)
        return y


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_a_mixture_whose_loop_breaks_the_graph(mode: str, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Mixture(), platform=shelf.platform, mode=mode)
    run, kernel = compiled(model), put(shelf, 8, 6)
    agrees(run, model, x)
    seen = graphs()
    assert seen <= 3  # the beginning of a forward, the gate alone, and one for all experts
    kernels = {"experts.3.up": kernel, "experts.11.up": kernel, "experts.5.down": put(shelf, 6, 8)}
    agrees_through_a_swap(run, model, kernels, x)
    assert graphs() == seen


def test_blocks_that_are_compiled_one_by_one(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(nn.Sequential(*[Expert() for _ in range(12)]), platform=shelf.platform)
    for block in model.children():
        block.compile(backend="esper", options={"inner": "aot_eager"})
    kernel = put(shelf, 8, 6)
    agrees(model, model, x)
    assert graphs() == 1
    agrees_through_a_swap(model, model, {"2.up": kernel, "11.down": put(shelf, 6, 8)}, x)
    assert graphs() == 1


def test_more_models_of_one_class_than_dynamo_compiles_one_function(shelf: KernelShelf, x: Tensor) -> None:
    models = [esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(12)]
    runs = [compiled(model, fullgraph=True) for model in models]
    for run, model in zip(runs, models, strict=True):
        agrees(run, model, x)
    load(models[3], "0", 1, put(shelf), alpha=0.25)
    load(models[11], "0", 0, put(shelf, seed=2), alpha=0.75)
    for run, model in zip(runs, models, strict=True):
        agrees(run, model, x)
    unload(models[3], "0", 1)
    for run, model in zip(runs, models, strict=True):
        agrees(run, model, x)
    assert graphs() == 1


def test_a_kernel_structure_is_compiled_once_for_all_that_share_a_graph(shelf: KernelShelf, x: Tensor) -> None:
    compilations = []

    def inner(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(module)
        return module.forward

    models = [esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(4)]
    runs = [compiled(model, inner) for model in models]
    for seed, (run, model) in enumerate(zip(runs, models, strict=True)):
        agrees(run, model, x)
        load(model, "0", seed, put(shelf, seed=seed), alpha=0.2 * (seed + 1))
        agrees(run, model, x)
    assert len(compilations) == 2


def test_a_model_that_comes_with_kernels_into_a_graph_of_a_dormant_one(shelf: KernelShelf, x: Tensor) -> None:
    first = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    agrees(compiled(first), first, x)
    second = copy.deepcopy(first)
    load(second, "0", 0, put(shelf))
    agrees(compiled(second), second, x)
    agrees(compiled(first), first, x)
    assert graphs() == 1


def test_models_that_share_a_graph_each_commit_their_own(shelf: KernelShelf, x: Tensor) -> None:
    models = [esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2)]
    runs = [compiled(model) for model in models]
    for run in runs:
        run(x)
    assert models[0].request_kernel("0", 0, put(shelf), alpha=0.5).result(60)
    assert models[1].request_kernel("0", 0, put(shelf, seed=5), alpha=lambda step: 0.1 * (step + 1)).result(60)
    for _ in range(3):
        for run, model in zip(runs, models, strict=True):
            run(x)
            with torch.no_grad():
                agrees(run, model, x)
    assert [round(model.kasmina_layers["0"].state.alpha(0), 2) for model in models] == [0.5, 0.3]


class Twice(nn.Module):
    """Calls two layers, of which one may be the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_a_layer_in_two_places_and_two_layers_are_told_apart(shelf: KernelShelf, x: Tensor) -> None:
    shared = nn.Linear(8, 8)
    for host, layers in ((Twice(shared, shared), 1), (Twice(nn.Linear(8, 8), nn.Linear(8, 8)), 2)):
        model = esper.wrap(host, platform=shelf.platform)
        assert len(model.kasmina_layers) == layers
        agrees_through_a_swap(compiled(model), model, {"first": put(shelf, 8, 8)}, x)


def test_layers_that_are_given_as_arguments(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(nn.ModuleList([nn.Linear(8, 8) for _ in range(10)]), platform=shelf.platform)

    def pair(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = second(first(x).relu())
        return y

    run, layers = compiled(pair, fullgraph=True), list(model.kasmina_layers.values())
    load(model, "7", 0, put(shelf, 8, 8))
    for two in itertools.pairwise(layers):
        agrees(functools.partial(run, *two), model, x, eager=functools.partial(pair, *two))
    assert graphs() == 1


def test_a_model_that_is_gone_leaves_nothing_in_the_graph_that_it_shared(shelf: KernelShelf, x: Tensor) -> None:
    stays = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    run = compiled(stays)
    run(x)
    goes = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(goes, "0", 0, put(shelf))
    compiled(goes)(x)
    parameter = weakref.ref(next(goes.seed_parameters()))
    runtime = weakref.ref(goes.runtime)
    del goes
    torch._dynamo.eval_frame.cached_backends.clear()
    gc.collect()
    assert runtime() is None
    gc.collect()
    assert parameter() is None
    agrees(run, stays, x)


def test_reports_of_models_that_share_a_graph_name_their_own_layers(shelf: KernelShelf, x: Tensor) -> None:
    first, second = (esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2))
    for model in (first, second):
        compiled(model)(x)
    load(second, "0", 0, put(shelf))
    compiled(second)(x)
    reports = [model.compile_report().graphs for model in (first, second)]
    assert [len(graphs) for graphs in reports] == [1, 1]
    assert reports[0][0].name == reports[1][0].name
    in_force = [[variant.plan for variant in graphs[0].variants if variant.in_force] for graphs in reports]
    assert in_force[0] == ["dormant"]
    assert in_force[1][0].startswith("0[")
