"""FoldFossils: the graph before and after, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from functorch.compile import default_partition
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import FoldFossils
from tests.passes.batching import apply, inlined
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    assert_backpropagated,
    code,
    low_rank,
    low_rank_seed,
    low_rank_values,
    reference,
    through_aot,
)


def test_each_kind_of_alpha_at_a_site_with_bias() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed(), low_rank_seed()]}, torch.rand(3))
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_3_2_a, esper_3_2_b, esper_3_2_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    linear = torch._C._nn.linear(x, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    linear_2 = torch._C._nn.linear(x, esper_3_1_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_3_1_b, esper_3_1_c)
    type_as_default_2 = torch.ops.aten.type_as.default(linear_3, marked)
    select_1 = torch.select(esper_alphas, 0, 1)
    type_as_default_3 = torch.ops.aten.type_as.default(select_1, marked)
    lerp_1 = torch.lerp(lerp, type_as_default_2, type_as_default_3)
    linear_4 = torch._C._nn.linear(x, esper_3_2_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    linear_5 = torch._C._nn.linear(gelu_2, esper_3_2_b, esper_3_2_c)
    type_as_default_4 = torch.ops.aten.type_as.default(linear_5, marked)
    select_2 = torch.select(esper_alphas, 0, 2)
    type_as_default_5 = torch.ops.aten.type_as.default(select_2, marked)
    lerp_2 = torch.lerp(lerp_1, type_as_default_4, type_as_default_5)
    return (lerp_2,)""",
    )
    module, modified = apply(module, FoldFossils({0: 0.25, 1: 0.0}))
    assert modified
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_3_2_a, esper_3_2_b, esper_3_2_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    linear = torch._C._nn.linear(x, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    lerp = torch.lerp(marked, type_as_default, 0.25)
    linear_4 = torch._C._nn.linear(x, esper_3_2_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    linear_5 = torch._C._nn.linear(gelu_2, esper_3_2_b, esper_3_2_c)
    type_as_default_4 = torch.ops.aten.type_as.default(linear_5, marked)
    select_2 = torch.select(esper_alphas, 0, 2)
    type_as_default_5 = torch.ops.aten.type_as.default(select_2, marked)
    lerp_2 = torch.lerp(lerp, type_as_default_4, type_as_default_5)
    return (lerp_2,)""",
    )


def test_at_alpha_one_the_kernel_stands_alone_and_the_host_goes() -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed(), low_rank_seed()]}, torch.rand(3))
    module, _ = apply(module, FoldFossils({1: 1.0}))
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a, esper_3_1_b,
        esper_3_1_c, esper_3_2_a, esper_3_2_b, esper_3_2_c, esper_alphas):
    linear_2 = torch._C._nn.linear(x, esper_3_1_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_3_1_b, esper_3_1_c)
    to_dtype = torch.ops.aten.to.dtype(linear_3, torch.float32)
    linear_4 = torch._C._nn.linear(x, esper_3_2_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    linear_5 = torch._C._nn.linear(gelu_2, esper_3_2_b, esper_3_2_c)
    type_as_default_4 = torch.ops.aten.to.dtype(linear_5, torch.float32)
    select_2 = torch.select(esper_alphas, 0, 2)
    type_as_default_5 = torch.ops.aten.to.dtype(select_2, torch.float32)
    lerp_2 = torch.lerp(to_dtype, type_as_default_4, type_as_default_5)
    return (lerp_2,)""",
    )


def test_a_host_that_a_kernel_reads_stays() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(uses_host=True, isolate=True)]}, torch.rand(1))
    module, _ = apply(module, FoldFossils({0: 1.0}))
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    detach = torch.detach(x)
    detach_1 = torch.detach(marked)
    linear = torch._C._nn.linear(detach, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    add = torch.add(detach_1, linear_1)
    to_dtype = torch.ops.aten.to.dtype(add, torch.float32)
    return (to_dtype,)""",
    )


def test_without_a_recorded_dtype_the_host_stays_for_it() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed()]}, torch.rand(1))
    for node in module.graph.nodes:
        node.meta.pop("example_value", None)
    module, _ = apply(module, FoldFossils({0: 1.0}))
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    linear = torch._C._nn.linear(x, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default_2 = torch.ops.aten.type_as.default(linear_1, marked)
    return (type_as_default_2,)""",
    )


def test_a_site_without_any_blend_left_is_the_host() -> None:
    x = torch.randn(2, 4)
    module, given = inlined(MLP(), x, {3: [(low_rank(), low_rank_values(4, 6))]}, torch.rand(1))
    plain, _ = inlined(MLP(), x, {}, torch.rand(0))
    module, modified = apply(module, FoldFossils({0: 0.0}))
    assert modified
    body = [line for line in code(module).splitlines() if " = " in line]
    assert body == [line for line in code(plain).splitlines() if " = " in line]
    assert len([node for node in module.graph.nodes if node.op == "placeholder"]) == len(given)


def test_a_site_that_is_called_twice_and_sites_in_a_checkpoint() -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)

    def forward(x: Tensor) -> Any:
        return checkpoint(lambda x: second(second(x)), first(x), use_reentrant=False)

    module, _ = inlined(
        forward, torch.randn(2, 4), {2: [low_rank_seed()], 9: [low_rank_seed(), low_rank_seed()]}, torch.rand(3)
    )
    module, _ = apply(module, FoldFossils({0: 1.0, 1: 1.0, 2: 0.5}))
    assert_expected_inline(
        code(module),
        """\
def forward(self, first_weight, first_bias, x, second_weight, second_bias, esper_2_0_a, esper_2_0_b,
        esper_2_0_c, esper_9_0_a, esper_9_0_b, esper_9_0_c, esper_9_1_a, esper_9_1_b, esper_9_1_c,
        esper_alphas):
    linear = torch._C._nn.linear(x, esper_2_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_2_0_b, esper_2_0_c)
    to_dtype = torch.ops.aten.to.dtype(linear_1, torch.float32)
    wrap_body_0 = self.wrap_body_0
    tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, to_dtype,
        second_weight, second_bias, esper_9_0_a, esper_9_0_b, esper_9_0_c, esper_9_1_a, esper_9_1_b,
        esper_9_1_c, esper_alphas, use_reentrant = False)
    getitem = tag_activation_checkpoint[0]
    return (getitem,)

# wrap_body_0
def forward(self, marked, second_weight, second_bias, esper_9_0_a, esper_9_0_b, esper_9_0_c, esper_9_1_a,
        esper_9_1_b, esper_9_1_c, esper_alphas):
    linear = torch._C._nn.linear(marked, esper_9_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_9_0_b, esper_9_0_c)
    to_dtype = torch.ops.aten.to.dtype(linear_1, torch.float32)
    linear_2 = torch._C._nn.linear(marked, esper_9_1_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_9_1_b, esper_9_1_c)
    type_as_default_2 = torch.ops.aten.to.dtype(linear_3, torch.float32)
    lerp_1 = torch.lerp(to_dtype, type_as_default_2, 0.5)
    linear_4 = torch._C._nn.linear(lerp_1, esper_9_0_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    linear_5 = torch._C._nn.linear(gelu_2, esper_9_0_b, esper_9_0_c)
    to_dtype_1 = torch.ops.aten.to.dtype(linear_5, torch.float32)
    linear_6 = torch._C._nn.linear(lerp_1, esper_9_1_a)
    gelu_3 = torch._C._nn.gelu(linear_6)
    linear_7 = torch._C._nn.linear(gelu_3, esper_9_1_b, esper_9_1_c)
    type_as_default_6 = torch.ops.aten.to.dtype(linear_7, torch.float32)
    lerp_3 = torch.lerp(to_dtype_1, type_as_default_6, 0.5)
    return (lerp_3,)""",
    )


def test_forward_and_backward_through_aot_autograd() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = {3: [low_rank_seed(), low_rank_seed()]}
    module, given = inlined(layer, x, seeds, torch.tensor([0.25, 0.5]))
    module, _ = apply(module, FoldFossils({0: 1.0}))
    output, (forward, backward) = through_aot(module, given, default_partition)
    assert_expected_inline(
        forward,
        """\
def forward(self, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, primals_7, primals_8,
        primals_9, primals_10):
    t = torch.ops.aten.t.default(primals_4)
    mm = torch.ops.aten.mm.default(primals_3, t)
    gelu = torch.ops.aten.gelu.default(mm)
    t_1 = torch.ops.aten.t.default(primals_5)
    addmm = torch.ops.aten.addmm.default(primals_6, gelu, t_1)
    t_2 = torch.ops.aten.t.default(primals_7)
    mm_1 = torch.ops.aten.mm.default(primals_3, t_2)
    gelu_1 = torch.ops.aten.gelu.default(mm_1)
    t_3 = torch.ops.aten.t.default(primals_8)
    addmm_1 = torch.ops.aten.addmm.default(primals_9, gelu_1, t_3)
    select = torch.ops.aten.select.int(primals_10, 0, 1)
    lerp = torch.ops.aten.lerp.Tensor(addmm, addmm_1, select)
    return (lerp, primals_3, mm, gelu, t_1, mm_1, gelu_1, t_3, select)""",
    )
    assert_expected_inline(
        backward,
        """\
def forward(self, primals_3, mm, gelu, t_1, mm_1, gelu_1, t_3, select, tangents_1):
    mul = torch.ops.aten.mul.Tensor(tangents_1, select)
    empty_like = torch.ops.aten.empty_like.default(select, memory_format = torch.preserve_format)
    fill = torch.ops.aten.fill.Scalar(empty_like, 1)
    sub = torch.ops.aten.sub.Tensor(fill, select)
    mul_1 = torch.ops.aten.mul.Tensor(tangents_1, sub)
    t_4 = torch.ops.aten.t.default(t_3)
    mm_2 = torch.ops.aten.mm.default(mul, t_4)
    t_5 = torch.ops.aten.t.default(mul)
    mm_3 = torch.ops.aten.mm.default(t_5, gelu_1)
    t_6 = torch.ops.aten.t.default(mm_3)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul, [0], True)
    view = torch.ops.aten.view.default(sum_1, [4])
    t_7 = torch.ops.aten.t.default(t_6)
    gelu_backward = torch.ops.aten.gelu_backward.default(mm_2, mm_1)
    t_8 = torch.ops.aten.t.default(gelu_backward)
    mm_4 = torch.ops.aten.mm.default(t_8, primals_3)
    t_9 = torch.ops.aten.t.default(mm_4)
    t_10 = torch.ops.aten.t.default(t_9)
    t_11 = torch.ops.aten.t.default(t_1)
    mm_5 = torch.ops.aten.mm.default(mul_1, t_11)
    t_12 = torch.ops.aten.t.default(mul_1)
    mm_6 = torch.ops.aten.mm.default(t_12, gelu)
    t_13 = torch.ops.aten.t.default(mm_6)
    sum_2 = torch.ops.aten.sum.dim_IntList(mul_1, [0], True)
    view_1 = torch.ops.aten.view.default(sum_2, [4])
    t_14 = torch.ops.aten.t.default(t_13)
    gelu_backward_1 = torch.ops.aten.gelu_backward.default(mm_5, mm)
    t_15 = torch.ops.aten.t.default(gelu_backward_1)
    mm_7 = torch.ops.aten.mm.default(t_15, primals_3)
    t_16 = torch.ops.aten.t.default(mm_7)
    t_17 = torch.ops.aten.t.default(t_16)
    return (None, None, None, t_17, t_14, view_1, t_10, t_7, view, None)""",
    )
    first, second = (values for _, values in seeds[3])
    expected = reference(x, layer.weight, layer.bias, [ReferenceSeed(first, 1.0), ReferenceSeed(second, 0.5)])
    assert_backpropagated(output, expected, [*first, *second])
    assert layer.weight.grad is None  # nothing of it is left


@pytest.mark.parametrize(
    "constants", [{}, {0: 0.0}, {0: 1.0}, {1: 0.0}, {1: 1.0}, {2: 0.125}, {0: 1.0, 1: 1.0, 2: 0.5}]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(constants: dict[int, float], dynamic: bool) -> None:
    layer = MarkedLinear(4, 4, 3).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    alphas = torch.tensor([0.25, 0.75, 0.5], dtype=torch.float16)
    kinds = ({}, {"uses_host": True}, {"isolate": True})
    values = [low_rank_values(4, 4, dtype=torch.double) for _ in kinds]
    seeds = {3: [(low_rank(**kind), each) for kind, each in zip(kinds, values, strict=True)]}
    module, given = inlined(layer, x, seeds, alphas, dynamic=dynamic)
    module, modified = apply(module, FoldFossils(constants))
    assert modified == bool(constants)
    (output,) = module(*given)
    at = [constants.get(index, float(alpha)) for index, alpha in enumerate(alphas)]
    expected = reference(
        x,
        layer.weight,
        layer.bias,
        [ReferenceSeed(each, alpha, **kind) for each, alpha, kind in zip(values, at, kinds, strict=True)],
    )
    torch.testing.assert_close(output, expected)
    leaves = [x, *layer.parameters(), *(value for each in values for value in each)]
    actual = torch.autograd.grad(output.sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), leaves))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_in_an_autocast_region_the_output_keeps_the_dtype_of_the_linear(alpha: float) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(3, 4)
    values = low_rank_values(4, 4)

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    module, given = inlined(forward, x, {3: [(low_rank(), values)]}, torch.rand(1))
    module, _ = apply(module, FoldFossils({0: alpha}))
    (output,) = module(*given)
    assert output.dtype == torch.bfloat16
    expected = reference(x, layer.weight, layer.bias, [ReferenceSeed(values, alpha)])
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def test_what_the_host_does_on_the_side_stays() -> None:
    layer = MarkedLinear(4, 4, 3)

    def forward(x: Tensor, count: Tensor) -> Any:
        count.add_(1)
        return layer(x)

    count = torch.zeros(())
    module, given = inlined(lambda x: forward(x, count), torch.randn(2, 4), {3: [low_rank_seed()]}, torch.rand(1))
    module, _ = apply(module, FoldFossils({0: 1.0}))
    module(*given)
    assert count == 1


def test_indices_that_the_graph_does_not_have_change_nothing() -> None:
    module, _ = inlined(MarkedLinear(4, 4, 3), torch.randn(2, 4), {3: [low_rank_seed()]}, torch.rand(1))
    before = code(module)
    for constants in ({}, {7: 0.5}):
        module, modified = apply(module, FoldFossils(constants))
        assert not modified
        assert code(module) == before
    module, modified = apply(fx.symbolic_trace(nn.Linear(4, 4)), FoldFossils({0: 0.5}))
    assert not modified


@pytest.mark.parametrize("alpha", [-0.25, 1.5, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha at index 4 .* from 0 to 1"):
        FoldFossils({4: alpha})
