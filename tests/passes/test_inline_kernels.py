"""InlineKernels: the graph before and after, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import ElideDormant, InlineKernels, inputs, is_site, sites_in
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    capture,
    capture_with_inputs,
    code,
    low_rank,
    low_rank_values,
    reference,
)


def test_one_seed_without_bias_at_the_site() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    assert_expected_inline(
        code(module),
        """\
def forward(self, up_weight, up_bias, x, down_weight):
    enter = torch.ops.esper.enter(7)
    marked = torch.ops.esper.site.default(x, up_weight, up_bias, 3)
    relu = marked.relu()
    marked_1 = torch.ops.esper.site.default(relu, down_weight, None, 5)
    return (marked_1,)""",
    )
    result = InlineKernels({5: (low_rank(),)})(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    assert_expected_inline(
        code(module),
        """\
def forward(self, up_weight, up_bias, x, down_weight, esper_5_0_a, esper_5_0_b, esper_5_0_c, esper_alphas):
    enter = torch.ops.esper.enter(7)
    marked = torch.ops.esper.site.default(x, up_weight, up_bias, 3)
    relu = marked.relu()
    marked_1 = torch._C._nn.linear(relu, down_weight, None)
    linear = torch._C._nn.linear(relu, esper_5_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_5_0_b, esper_5_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked_1)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked_1)
    lerp = torch.lerp(marked_1, type_as_default, type_as_default_1)
    return (lerp,)""",
    )


def test_several_seeds_of_all_kinds_at_a_site_with_bias() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    seeds = {3: (low_rank(), low_rank(isolate=True), low_rank(uses_host=True), low_rank(uses_host=True, isolate=True))}
    InlineKernels(seeds)(module).graph_module.graph.lint()
    assert_expected_inline(
        code(module),
        """\
def forward(self, up_weight, up_bias, x, down_weight, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_3_2_a, esper_3_2_b, esper_3_2_c, esper_3_3_a, esper_3_3_b,
        esper_3_3_c, esper_alphas):
    enter = torch.ops.esper.enter(7)
    marked = torch._C._nn.linear(x, up_weight, up_bias)
    linear = torch._C._nn.linear(x, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    detach = torch.detach(x)
    linear_2 = torch._C._nn.linear(detach, esper_3_1_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_3_1_b, esper_3_1_c)
    type_as_default_2 = torch.ops.aten.type_as.default(linear_3, marked)
    select_1 = torch.select(esper_alphas, 0, 1)
    type_as_default_3 = torch.ops.aten.type_as.default(select_1, marked)
    lerp_1 = torch.lerp(lerp, type_as_default_2, type_as_default_3)
    linear_4 = torch._C._nn.linear(x, esper_3_2_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    linear_5 = torch._C._nn.linear(gelu_2, esper_3_2_b, esper_3_2_c)
    add = torch.add(lerp_1, linear_5)
    type_as_default_4 = torch.ops.aten.type_as.default(add, marked)
    select_2 = torch.select(esper_alphas, 0, 2)
    type_as_default_5 = torch.ops.aten.type_as.default(select_2, marked)
    lerp_2 = torch.lerp(lerp_1, type_as_default_4, type_as_default_5)
    detach_1 = torch.detach(x)
    detach_2 = torch.detach(lerp_2)
    linear_6 = torch._C._nn.linear(detach_1, esper_3_3_a)
    gelu_3 = torch._C._nn.gelu(linear_6)
    linear_7 = torch._C._nn.linear(gelu_3, esper_3_3_b, esper_3_3_c)
    add_1 = torch.add(detach_2, linear_7)
    type_as_default_6 = torch.ops.aten.type_as.default(add_1, marked)
    select_3 = torch.select(esper_alphas, 0, 3)
    type_as_default_7 = torch.ops.aten.type_as.default(select_3, marked)
    lerp_3 = torch.lerp(lerp_2, type_as_default_6, type_as_default_7)
    relu = lerp_3.relu()
    marked_1 = torch.ops.esper.site.default(relu, down_weight, None, 5)
    return (marked_1,)""",
    )


def test_placeholders_are_ordered_by_site_then_seed_then_parameter() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    existing = [node for node in module.graph.nodes if node.op == "placeholder"]
    meta = [dict(node.meta) for node in existing]
    seeds = {5: (low_rank(), low_rank(isolate=True)), 3: (low_rank(uses_host=True),), 9: (low_rank(),), 11: ()}
    assert inputs(seeds) == [
        (site, position, name)
        for site, position in ((3, 0), (5, 0), (5, 1), (9, 0))  # 9 is no site of this graph
        for name in ("a", "b", "c")
    ]
    InlineKernels(seeds)(module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [node.name for node in placeholders[len(existing) :]]
    assert names == [*(f"esper_{site}_{position}_{name}" for site, position, name in inputs(seeds)), "esper_alphas"]
    assert placeholders[: len(existing)] == existing
    assert [dict(node.meta) for node in existing] == meta
    assert list(module.graph.nodes)[: len(placeholders)] == placeholders


def test_a_site_that_is_called_twice_uses_its_placeholders_twice() -> None:
    layer = MarkedLinear(4, 4, 3)
    module = capture(lambda x: layer(layer(x)), torch.randn(2, 4))
    InlineKernels({3: (low_rank(isolate=True),)})(module).graph_module.graph.lint()
    assert_expected_inline(
        code(module),
        """\
def forward(self, layer_weight, layer_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_alphas):
    marked = torch._C._nn.linear(x, layer_weight, layer_bias)
    detach = torch.detach(x)
    linear = torch._C._nn.linear(detach, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    marked_1 = torch._C._nn.linear(lerp, layer_weight, layer_bias)
    detach_1 = torch.detach(lerp)
    linear_2 = torch._C._nn.linear(detach_1, esper_3_0_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_3_0_b, esper_3_0_c)
    type_as_default_2 = torch.ops.aten.type_as.default(linear_3, marked_1)
    select_1 = torch.select(esper_alphas, 0, 0)
    type_as_default_3 = torch.ops.aten.type_as.default(select_1, marked_1)
    lerp_1 = torch.lerp(marked_1, type_as_default_2, type_as_default_3)
    return (lerp_1,)""",
    )


def test_layers_that_share_a_weight_are_separate_sites() -> None:
    first, second = MarkedLinear(4, 4, 3), MarkedLinear(4, 4, 4)
    second.weight = first.weight
    module = capture(lambda x: second(first(x)), torch.randn(2, 4))
    InlineKernels({4: (low_rank(),)})(module).graph_module.graph.lint()
    assert_expected_inline(
        code(module),
        """\
def forward(self, first_weight, first_bias, x, second_bias, esper_4_0_a, esper_4_0_b, esper_4_0_c,
        esper_alphas):
    marked = torch.ops.esper.site.default(x, first_weight, first_bias, 3)
    marked_1 = torch._C._nn.linear(marked, first_weight, second_bias)
    linear = torch._C._nn.linear(marked, esper_4_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_4_0_b, esper_4_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked_1)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked_1)
    lerp = torch.lerp(marked_1, type_as_default, type_as_default_1)
    return (lerp,)""",
    )


def test_a_graph_with_a_dynamic_batch_keeps_its_symbols() -> None:
    module = capture(MLP(), torch.randn(2, 4), dynamic=True)
    InlineKernels({5: (low_rank(uses_host=True),)})(module).graph_module.graph.lint()
    assert_expected_inline(
        code(module),
        """\
def forward(self, up_weight, up_bias, s77, x, down_weight, esper_5_0_a, esper_5_0_b, esper_5_0_c,
        esper_alphas):
    enter = torch.ops.esper.enter(7)
    marked = torch.ops.esper.site.default(x, up_weight, up_bias, 3)
    relu = marked.relu()
    marked_1 = torch._C._nn.linear(relu, down_weight, None)
    linear = torch._C._nn.linear(relu, esper_5_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_5_0_b, esper_5_0_c)
    add = torch.add(marked_1, linear_1)
    type_as_default = torch.ops.aten.type_as.default(add, marked_1)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked_1)
    lerp = torch.lerp(marked_1, type_as_default, type_as_default_1)
    return (lerp,)""",
    )


def test_kernels_inside_a_checkpoint_become_its_operands() -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
    module = capture(lambda x: second(checkpoint(first, x, use_reentrant=False)), torch.randn(2, 4))
    seeds = {2: (low_rank(),), 9: (low_rank(uses_host=True),)}
    InlineKernels(seeds)(module).graph_module.graph.lint()
    module.get_submodule("wrap_body_0").graph.lint()
    assert_expected_inline(
        code(module),
        """\
def forward(self, x, first_weight, first_bias, second_weight, second_bias, esper_2_0_a, esper_2_0_b,
        esper_2_0_c, esper_9_0_a, esper_9_0_b, esper_9_0_c, esper_alphas):
    wrap_body_0 = self.wrap_body_0
    tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, x, first_weight,
        first_bias, esper_2_0_a, esper_2_0_b, esper_2_0_c, esper_alphas, use_reentrant = False)
    getitem = tag_activation_checkpoint[0]
    marked = torch._C._nn.linear(getitem, second_weight, second_bias)
    linear = torch._C._nn.linear(getitem, esper_9_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_9_0_b, esper_9_0_c)
    add = torch.add(marked, linear_1)
    type_as_default = torch.ops.aten.type_as.default(add, marked)
    select = torch.select(esper_alphas, 0, 1)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    return (lerp,)

# wrap_body_0
def forward(self, x, first_weight, first_bias, esper_2_0_a, esper_2_0_b, esper_2_0_c, esper_alphas):
    marked = torch._C._nn.linear(x, first_weight, first_bias)
    linear = torch._C._nn.linear(x, esper_2_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_2_0_b, esper_2_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    return (lerp,)""",
    )


def test_a_kernel_inside_a_branch_is_refused_by_name() -> None:
    layer = MarkedLinear(4, 4, 2)

    def forward(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: layer(x), lambda x: x + 1, (x,))

    module = capture(forward, torch.randn(2, 4))
    assert sites_in(module.graph) == (2,)
    with pytest.raises(ValueError, match=r"site 2 with active seeds inside cond"):
        InlineKernels({2: (low_rank(),)})(module)
    module.graph.lint()
    assert not any(node.name.startswith("esper") for node in module.graph.nodes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(dynamic: bool, in_checkpoint: bool) -> None:
    model, x = MLP().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    first, second = low_rank_values(4, 6, dtype=torch.double), low_rank_values(6, 4, dtype=torch.double)
    third = low_rank_values(4, 6, dtype=torch.double)
    seeds = {5: (low_rank(),), 3: (low_rank(uses_host=True), low_rank(isolate=True))}
    alphas = torch.tensor([0.25, 0.75, 0.5], dtype=torch.float16)

    def forward(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False) if in_checkpoint else model(x)

    module, given = capture_with_inputs(forward, x, dynamic=dynamic)
    ElideDormant()(InlineKernels(seeds)(module).graph_module)
    (output,) = module(*given, *first, *third, *second, alphas)

    up, down = model.up, model.down
    at_up = [ReferenceSeed(first, 0.25, uses_host=True), ReferenceSeed(third, 0.75, isolate=True)]
    hidden = reference(x, up.weight, up.bias, at_up)
    expected = reference(hidden.relu(), down.weight, None, [ReferenceSeed(second, 0.5)])
    leaves = [x, *model.parameters(), *first, *second, *third]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_an_isolated_kernel_learns_and_sends_the_host_no_gradient() -> None:
    layer, x, parameters = MarkedLinear(4, 6, 3), torch.randn(3, 4, requires_grad=True), low_rank_values(4, 6)
    module, given = capture_with_inputs(layer, x)
    InlineKernels({3: (low_rank(uses_host=True, isolate=True),)})(module)
    (output,) = module(*given, *parameters, torch.tensor([1.0]))
    gradients = torch.autograd.grad(output.sum(), [x, layer.weight, *parameters])
    assert all(not gradient.any() for gradient in gradients[:2])  # at alpha 1 the host's own share is nil
    assert all(gradient.any() for gradient in gradients[2:])


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, "the host's output"), (1.0, "the kernel's output")], ids=["alpha 0", "alpha 1"]
)
def test_the_ends_of_alpha_are_exact(alpha: float, expected: str) -> None:
    layer, x, parameters = MarkedLinear(4, 6, 3), torch.randn(3, 4), low_rank_values(4, 6)
    module, given = capture_with_inputs(layer, x)
    host = module(*given)[0]
    InlineKernels({3: (low_rank(),)})(module)
    (output,) = module(*given, *parameters, torch.tensor([alpha], dtype=torch.float16))
    kernel = nn.functional.gelu(x @ parameters[0].T) @ parameters[1].T + parameters[2]
    torch.testing.assert_close(output, host if expected == "the host's output" else kernel)


@pytest.mark.parametrize("alpha_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
def test_the_output_keeps_the_dtype_of_the_linear(alpha_dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    layer, x, parameters = MarkedLinear(4, 6, 3), torch.randn(3, 4), low_rank_values(4, 6)

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return layer(x)

    module, given = capture_with_inputs(forward, x)
    InlineKernels({3: (low_rank(), low_rank(uses_host=True))})(module)
    other = low_rank_values(4, 6)
    (output,) = module(*given, *parameters, *other, torch.tensor([0.5, 0.25], dtype=alpha_dtype))
    assert output.dtype == (autocast or torch.float32)
    double = layer.double()  # in place: after the layer has run
    expected = reference(
        x.double(),
        double.weight,
        double.bias,
        [
            ReferenceSeed([each.double() for each in parameters], 0.5),
            ReferenceSeed([each.double() for each in other], 0.25, uses_host=True),
        ],
    )
    tolerance = 1e-5 if autocast is None else 0.05
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_new_nodes_say_where_the_site_came_from() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    site = next(node for node in module.graph.nodes if is_site(node))
    trace = site.meta["stack_trace"]
    InlineKernels({3: (low_rank(),)})(module)
    blend = next(node for node in module.graph.nodes if node.target is torch.lerp)
    assert blend.meta["stack_trace"] == trace


def test_example_values_are_recorded_at_the_placeholders_inside_checkpoints_too() -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
    module = capture(lambda x: second(checkpoint(first, x, use_reentrant=False)), torch.randn(2, 4))
    seeds = {9: (low_rank(),), 2: (low_rank(),)}
    values = tuple(torch.empty(size, device="meta") for size in range(7))
    InlineKernels(seeds, values)(module)
    keys = [f"esper_{site}_0_{name}" for site in (2, 9) for name in "abc"] + ["esper_alphas"]
    outer, inner = (
        {node.target: node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"}
        for graph in (module.graph, module.get_submodule("wrap_body_0").graph)
    )
    assert [outer[key] for key in keys] == list(values)
    assert [inner[key] for key in keys if key in inner] == [*values[:3], values[6]]
    with pytest.raises(ValueError, match=r"6 example values for the 7 placeholders"):
        InlineKernels(seeds, values[:6])(capture(first, torch.randn(2, 4)))


def test_without_seeds_nothing_changes() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    before = list(module.graph.nodes)
    assert not InlineKernels({})(module).modified
    assert not InlineKernels({3: ()})(module).modified
    assert list(module.graph.nodes) == before
