"""BatchSeeds through AOTAutograd, autocast and checkpoints; and what keeps it from batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from esper.artifacts import Blueprint
from esper.torch_internals import guard_count
from esper_passes import BatchSeeds
from tests.passes.batching import TWO, apply, inlined, of_blueprint
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    Shown,
    assert_backpropagated,
    code,
    copied,
    low_rank,
    low_rank_seed,
    low_rank_values,
    reference,
    through_aot,
)


def test_forward_and_backward_of_two_seeds(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    values = [low_rank_values(4, 4), low_rank_values(4, 4)]
    module, given = inlined(layer, x, {3: [(low_rank(), each) for each in values]}, torch.tensor([0.25, 0.5]))
    module, _ = apply(module, TWO)
    output, (forward, backward) = through_aot(module, given)
    shown(forward)
    shown(backward)
    seeds = [ReferenceSeed(each, alpha) for each, alpha in zip(values, (0.25, 0.5), strict=True)]
    expected = reference(x, layer.weight, layer.bias, seeds)
    assert_backpropagated(output, expected, [*layer.parameters(), *values[0], *values[1]])


def test_a_product_of_isolated_frozen_kernels_leaves_nothing_to_the_backward() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4, requires_grad=True)
    seed = of_blueprint(Blueprint.low_rank(4, 4, 2, start="kaiming"), isolate=True, learns=False)
    module, given = inlined(layer, x, {3: [seed, seed]}, torch.tensor([0.25, 0.5]))
    module, modified = apply(module, TWO)
    assert modified
    _, (_, backward) = through_aot(module, given)
    assert backward.count("aten.mm") == 2  # of the host: its weight's and its input's


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
@pytest.mark.parametrize("in_checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_are_those_of_the_formula(partition: Callable[..., Any], in_checkpoint: bool, dynamic: bool) -> None:
    layer, x = MarkedLinear(4, 6, 3).double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    kinds: list[dict[str, bool]] = [{}, {"uses_host": True}, {"uses_host": True}, {"isolate": True}, {}]
    alphas = torch.tensor([0.25, 0.5, 0.75, 0.125, 0.5], dtype=torch.float16)
    values = [low_rank_values(4, 6, dtype=torch.double) for _ in kinds]

    def forward(x: Tensor) -> Any:
        return layer(checkpoint(layer, x, use_reentrant=False)[:, :4] if in_checkpoint else layer(x)[:, :4])

    seeds = {3: [(low_rank(**kind), each) for kind, each in zip(kinds, values, strict=True)]}
    module, given = inlined(forward, x, seeds, alphas, dynamic=dynamic)
    known = guard_count(_recorded(module))
    module, modified = apply(module, TWO)
    assert modified
    assert guard_count(_recorded(module)) == known
    output, _ = through_aot(module, given, partition)
    at = [ReferenceSeed(each, float(a), **kind) for each, a, kind in zip(values, alphas, kinds, strict=True)]
    expected = reference(reference(x, layer.weight, layer.bias, at)[:, :4], layer.weight, layer.bias, at)
    leaves = [x, *layer.parameters(), *(value for each in values for value in each)]
    assert_backpropagated(output, expected, leaves)


def _recorded(module: fx.GraphModule) -> list[Any]:
    return [node.meta["example_value"] for node in module.graph.nodes if "example_value" in node.meta]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_an_autocast_region_the_output_keeps_the_dtype_of_the_linear(dtype: torch.dtype) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(3, 4)
    families = [
        Blueprint.low_rank(4, 4, 3, start="kaiming", bias=True),
        Blueprint.residual_mlp(4, 4, 3, start="kaiming"),
        Blueprint.affine(4, 4, start="kaiming"),
        Blueprint.bottleneck(4, 4, 3, start="identity"),
    ]
    seeds = [of_blueprint(blueprint) for blueprint in families for _ in range(2)]

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return layer(x)

    module, given = inlined(forward, x, {3: seeds}, torch.full((8,), 0.25))
    batched, modified = apply(module, TWO)
    assert modified
    (output,), (before,) = batched(*given), module(*given)
    assert output.dtype == dtype
    torch.testing.assert_close(output, before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False).to(dtype), torch.randn(3, 4, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    seeds = [
        of_blueprint(make(4, 4, 3, start="kaiming", seed=seed, dtype=name))
        for make in (Blueprint.bottleneck, Blueprint.residual_mlp)
        for seed in range(3)
    ]
    module, given = inlined(layer, x, {3: seeds}, torch.full((6,), 0.25))
    batched, modified = apply(module, TWO)
    assert modified
    (output,), (before,) = batched(*given), module(*given)
    assert output.dtype == dtype
    torch.testing.assert_close(output, before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("alphas", "same_as"), [([0.0, 0.0, 0.0], None), ([0.3, 1.0, 0.0], 1), ([0.3, 0.4, 1.0], 2)])
def test_at_the_ends_of_alpha_what_has_no_share_adds_nothing(alphas: list[float], same_as: int | None) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(3, 4)
    values = [low_rank_values(4, 4) for _ in alphas]
    module, given = inlined(layer, x, {3: [(low_rank(), each) for each in values]}, torch.tensor(alphas))
    module, _ = apply(module, TWO)
    (output,) = module(*given)
    alone = [] if same_as is None else [ReferenceSeed(values[same_as], 1.0)]
    torch.testing.assert_close(output, reference(x, layer.weight, layer.bias, alone))


def test_fewer_seeds_than_are_worth_it_stay_as_they_are() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed() for _ in range(3)]}, torch.rand(3))
    before = code(module)
    for batch in (BatchSeeds(), BatchSeeds(min_seeds=4)):
        module, modified = apply(module, batch)
        assert not modified
        assert code(module) == before
    assert apply(module, BatchSeeds(min_seeds=3))[1]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_large_weights_stay_apart_where_few_rows_are_known(rows: int, affine: bool, dynamic: bool) -> None:
    layer, x = MarkedLinear(8, 8, 3), torch.randn(2, rows, 8)
    blueprint = Blueprint.affine(8, 8) if affine else Blueprint.low_rank(8, 8, 2)  # 64 and 16 elements
    module, _ = inlined(layer, x, {3: [of_blueprint(blueprint) for _ in range(3)]}, torch.rand(3), dynamic=dynamic)
    _, modified = apply(module, BatchSeeds(min_seeds=2, elements_per_row=2 if affine else 4))
    assert modified == (rows == 3 or dynamic)


@pytest.mark.parametrize("forgotten", ["esper_3_0_b", "marked"])
def test_what_is_not_recorded_stays_as_it_is(forgotten: str) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed() for _ in range(2)]}, torch.rand(2))
    next(node for node in module.graph.nodes if node.name == forgotten).meta.pop("example_value")
    before = code(module)
    module, modified = apply(module, TWO)
    assert not modified
    assert code(module) == before


def test_graphs_without_seeds_stay_as_they_are() -> None:
    module, _ = inlined(MLP(), torch.randn(2, 4), {}, torch.rand(0))
    nodes = list(module.graph.nodes)
    assert not TWO(module).modified
    assert list(module.graph.nodes) == nodes


def test_what_was_batched_is_left_alone_afterwards() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed() for _ in range(2)]}, torch.rand(2))
    module, _ = apply(module, TWO)
    assert not TWO(copied(module)).modified


def test_fewer_than_one_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="min_seeds is 0"):
        BatchSeeds(min_seeds=0)
