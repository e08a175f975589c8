"""Sizes that vary, stances, and recompilations: a swap never is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError

import esper
from esper.artifacts import Blueprint
from tests.compiler.agreement import agrees, agrees_through_a_swap, compiled, load, put, unload
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dynamic", "inner"),
    [
        (None, "eager"),
        (True, "eager"),
        (None, "aot_eager"),
        pytest.param(None, "inductor", marks=pytest.mark.slow),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_size_before_and_after_a_swap(
    inner: str, dynamic: bool | None, model: esper.MorphableModel, shelf: KernelShelf
) -> None:
    run = compiled(model, inner, dynamic=dynamic)

    def agree(*sizes: int) -> None:
        for size in sizes:
            agrees(run, model, torch.randn(size, 8), rtol=1e-5, atol=1e-5)

    agree(3, 5)  # the second size makes Dynamo compile for any
    load(model, "0", 0, put(shelf))
    agree(5, 7, 1, 0, 33)
    load(model, "0", 0, put(shelf, rank=2))
    agree(1, 0, 6)
    unload(model, "0", 0)
    agree(5, 1, 0, 12)


@pytest.mark.slow
def test_a_model_that_is_first_compiled_with_a_kernel_runs_no_size_uncompiled(
    shelf: KernelShelf, caplog: pytest.LogCaptureFixture
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), platform=shelf.platform)
    load(model, "0", 0, shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming")).id)
    run = torch.compile(model, backend="esper")
    for size in (32, 7, 32):  # Inductor assumes of the second that it is small
        agrees(run, model, torch.randn(size, 8), rtol=1e-5, atol=1e-5)
    variants = [variant for graph in model.compile_report().graphs for variant in graph.variants if variant.in_force]
    assert [variant.origin for variant in variants] == ["in process"] * 2
    assert "runs uncompiled" not in caplog.text


def test_a_dimension_that_is_marked_dynamic(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    run = compiled(model)

    def marked(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        output: Tensor = run(x)
        return output

    agrees(marked, model, torch.randn(3, 8))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 64):
            agrees_through_a_swap(marked, model, {"0": put(shelf)}, torch.randn(size, 8))


def test_static_shapes(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    run = compiled(model, dynamic=False)
    for size in (3, 5):
        agrees_through_a_swap(run, model, {"0": put(shelf)}, torch.randn(size, 8))


def test_several_leading_dimensions(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    run = compiled(model, "eager")
    kernels = {"0": put(shelf), "2": put(shelf, 6, 4)}
    for shape in ((8,), (2, 3, 8), (3, 3, 8), (2, 1, 3, 8)):
        agrees_through_a_swap(run, model, kernels, torch.randn(shape))


class Selecting(nn.Module):
    """Its second layer gets as many rows as the input has positive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x[x[:, 0] > 0]).relu())


def test_sizes_that_depend_on_values(shelf: KernelShelf) -> None:
    model = esper.wrap(Selecting(), platform=shelf.platform)
    x = torch.randn(16, 8)
    x[::2, 0], x[1::2, 0] = 1.0, -1.0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(model, fullgraph=True)
        agrees_through_a_swap(run, model, {"first": put(shelf), "second": put(shelf, 6, 4)}, x)
        load(model, "second", 1, put(shelf, 6, 4, seed=2))
        for rows in (x[:4], x[1::2], -x):
            agrees(run, model, rows)


# -- stances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stance", ["force_eager", "fail_on_recompile", "eager_on_recompile", "default"])
def test_a_swap_under_every_stance(stance: Any, model: esper.MorphableModel, shelf: KernelShelf) -> None:
    run, x = compiled(model), torch.randn(3, 8)
    agrees(run, model, x)
    with torch.compiler.set_stance(stance):
        agrees_through_a_swap(run, model, {"0": put(shelf), "2": put(shelf, 6, 4)}, x)
        load(model, "0", 1, put(shelf, rank=2))
        agrees(run, model, x)
    agrees(run, model, x)
    unload(model, "0", 1)
    with torch.compiler.set_stance(stance):
        agrees(run, model, x)


@pytest.mark.parametrize("stance", ["force_eager", "fail_on_recompile", "eager_on_recompile"])
def test_what_is_staged_under_a_stance_comes_into_force(
    stance: Any, model: esper.MorphableModel, shelf: KernelShelf
) -> None:
    run, x = compiled(model), torch.randn(3, 8)
    dormant = agrees(run, model, x)
    with torch.compiler.set_stance(stance):
        assert model.request_kernel("0", 0, put(shelf), alpha=0.5, trainable=True).result(60)
        active = agrees(run, model, x)
    assert not torch.allclose(active, dormant)
    torch.testing.assert_close(agrees(run, model, x), active)


def test_another_backend_by_stance(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    run, x, kernels = compiled(model), torch.randn(3, 8), {"0": put(shelf)}
    for _ in range(2):
        with torch.compiler.set_stance("default", force_backend="eager"):
            agrees_through_a_swap(run, model, kernels, x)
        agrees_through_a_swap(run, model, kernels, x)


# -- recompilations ----------------------------------------------------------------------------------------------------


def test_kernels_of_any_shape_are_swapped_without_a_recompilation(
    model: esper.MorphableModel, shelf: KernelShelf
) -> None:
    run, x = compiled(model, "eager"), torch.randn(3, 8)
    agrees(run, model, x)
    blueprints = [
        Blueprint.low_rank(8, 6, rank=1, start="kaiming"),
        Blueprint.low_rank(8, 6, rank=5, start="kaiming"),
        Blueprint.bottleneck(8, 6, rank=4, start="kaiming"),
        Blueprint.affine(8, 6, start="kaiming"),
        Blueprint.gated_mlp(8, 6, hidden=3, start="kaiming"),
        Blueprint.residual_mlp(8, 6, hidden=4, depth=2, start="kaiming"),
        Blueprint.bottleneck(8, 6, rank=2, start="identity"),  # reads the host's output
    ]
    kernels = [shelf.put(blueprint).id for blueprint in blueprints]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index, kernel in enumerate(kernels):
            load(model, "0", index % 2, kernel, trainable=index % 3 > 0, isolate=index % 2 > 0)
            agrees(run, model, x)
            model.set_alpha("0", index % 2, 0.9)
            agrees(run, model, x)
        for seed in range(2):
            unload(model, "0", seed)
            agrees(run, model, x)


def test_swapping_a_module_is_a_recompilation() -> None:
    """What the test above would see if a swap were one."""
    host, x = mlp(8, 6, 4), torch.randn(3, 8)
    run = torch.compile(host, backend="eager")
    run(x)
    host[0] = nn.Sequential(host[0], nn.Linear(6, 6))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
        run(x)
