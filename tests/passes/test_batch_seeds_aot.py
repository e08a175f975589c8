"""BatchSeeds through AOTAutograd, autocast and checkpoints; and what keeps it from batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
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
    assert_backpropagated,
    code,
    copied,
    low_rank,
    low_rank_seed,
    low_rank_values,
    reference,
    through_aot,
)


def test_forward_and_backward_of_two_seeds() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    values = [low_rank_values(4, 4), low_rank_values(4, 4)]
    module, given = inlined(layer, x, {3: [(low_rank(), each) for each in values]}, torch.tensor([0.25, 0.5]))
    module, _ = apply(module, TWO)
    output, (forward, backward) = through_aot(module, given)
    assert_expected_inline(
        forward,
        """\
def forward(self, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, primals_7, primals_8,
        primals_9, primals_10):
    t = torch.ops.aten.t.default(primals_1)
    addmm = torch.ops.aten.addmm.default(primals_2, primals_3, t)
    cat = torch.ops.aten.cat.default([primals_4, primals_7])
    t_1 = torch.ops.aten.t.default(cat)
    mm = torch.ops.aten.mm.default(primals_3, t_1)
    view = torch.ops.aten.view.default(mm, [2, 2, 2])
    gelu = torch.ops.aten.gelu.default(view)
    slice_1 = torch.ops.aten.slice.Tensor(primals_10, 0, 0, 2)
    constant_pad_nd = torch.ops.aten.constant_pad_nd.default(slice_1, [1, 0], 1.0)
    rsub = torch.ops.aten.rsub.Scalar(constant_pad_nd, 1)
    expand = torch.ops.aten.expand.default(rsub, [3, 3])
    ones_like = torch.ops.aten.ones_like.default(expand, pin_memory = False)
    tril = torch.ops.aten.tril.default(ones_like)
    triu = torch.ops.aten.triu.default(expand, 1)
    add = torch.ops.aten.add.Tensor(triu, tril)
    prod = torch.ops.aten.prod.dim_int(add, 1)
    mul = torch.ops.aten.mul.Tensor(constant_pad_nd, prod)
    slice_2 = torch.ops.aten.slice.Tensor(mul, 0, 1, 3)
    unsqueeze = torch.ops.aten.unsqueeze.default(slice_2, -1)
    mul_1 = torch.ops.aten.mul.Tensor(gelu, unsqueeze)
    view_1 = torch.ops.aten.view.default(mul_1, [2, 4])
    cat_1 = torch.ops.aten.cat.default([primals_5, primals_8], 1)
    t_2 = torch.ops.aten.t.default(cat_1)
    mm_1 = torch.ops.aten.mm.default(view_1, t_2)
    stack = torch.ops.aten.stack.default([primals_6, primals_9])
    mul_2 = torch.ops.aten.mul.Tensor(stack, unsqueeze)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul_2, [0])
    add_1 = torch.ops.aten.add.Tensor(mm_1, sum_1)
    select = torch.ops.aten.select.int(mul, 0, 0)
    mul_3 = torch.ops.aten.mul.Tensor(addmm, select)
    add_2 = torch.ops.aten.add.Tensor(add_1, mul_3)
    t_5 = torch.ops.aten.t.default(t_2)
    return (add_2, primals_3, mm, unsqueeze, view_1, select, t_5)""",
    )
    assert_expected_inline(
        backward,
        """\
def forward(self, primals_3, mm, unsqueeze, view_1, select, t_5, tangents_1):
    mul_4 = torch.ops.aten.mul.Tensor(tangents_1, select)
    sum_2 = torch.ops.aten.sum.dim_IntList(tangents_1, [0], True)
    view_2 = torch.ops.aten.view.default(sum_2, [4])
    unsqueeze_2 = torch.ops.aten.unsqueeze.default(view_2, 0)
    expand_1 = torch.ops.aten.expand.default(unsqueeze_2, [2, 4])
    mul_5 = torch.ops.aten.mul.Tensor(expand_1, unsqueeze)
    select_1 = torch.ops.aten.select.int(mul_5, 0, 0)
    select_2 = torch.ops.aten.select.int(mul_5, 0, 1)
    t_3 = torch.ops.aten.t.default(tangents_1)
    mm_2 = torch.ops.aten.mm.default(t_3, view_1)
    t_4 = torch.ops.aten.t.default(mm_2)
    mm_3 = torch.ops.aten.mm.default(tangents_1, t_5)
    t_6 = torch.ops.aten.t.default(t_4)
    slice_4 = torch.ops.aten.slice.Tensor(t_6, 1, 0, 2)
    slice_5 = torch.ops.aten.slice.Tensor(t_6, 1, 2, 4)
    view_3 = torch.ops.aten.view.default(mm_3, [2, 2, 2])
    mul_6 = torch.ops.aten.mul.Tensor(view_3, unsqueeze)
    view = torch.ops.aten.view.default(mm, [2, 2, 2])
    gelu_backward = torch.ops.aten.gelu_backward.default(mul_6, view)
    view_4 = torch.ops.aten.view.default(gelu_backward, [2, 4])
    t_7 = torch.ops.aten.t.default(view_4)
    mm_4 = torch.ops.aten.mm.default(t_7, primals_3)
    t_8 = torch.ops.aten.t.default(mm_4)
    t_9 = torch.ops.aten.t.default(t_8)
    slice_6 = torch.ops.aten.slice.Tensor(t_9, 0, 0, 2)
    slice_7 = torch.ops.aten.slice.Tensor(t_9, 0, 2, 4)
    t_10 = torch.ops.aten.t.default(mul_4)
    mm_5 = torch.ops.aten.mm.default(t_10, primals_3)
    t_11 = torch.ops.aten.t.default(mm_5)
    sum_3 = torch.ops.aten.sum.dim_IntList(mul_4, [0], True)
    view_5 = torch.ops.aten.view.default(sum_3, [4])
    t_12 = torch.ops.aten.t.default(t_11)
    return (t_12, view_5, None, slice_6, slice_4, select_1, slice_7, slice_5, select_2, None)""",
    )
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
