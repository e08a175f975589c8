"""InlineKernels through AOTAutograd: the forward graph and the backward graph that an inner compiler receives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import ElideDormant, InlineKernels, Pipeline, SeedGraph, sites_in, verify
from tests.passes.graphs import (
    MarkedLinear,
    ReferenceSeed,
    assert_backpropagated,
    capture_with_inputs,
    code,
    copied,
    low_rank,
    low_rank_values,
    reference,
    region,
    through_aot,
)


def _inlined(
    model: Callable[..., Any], x: Tensor, seeds: dict[int, tuple[SeedGraph, ...]], dynamic: bool = False
) -> tuple[fx.GraphModule, list[Any]]:
    module, given = capture_with_inputs(model, x, dynamic=dynamic)
    passes = Pipeline((InlineKernels(seeds), ElideDormant()), verify)
    return passes(module).graph_module, given


def test_one_seed_with_the_min_cut_partitioner() -> None:
    layer, x, parameters = MarkedLinear(4, 6, 3), torch.randn(2, 4), low_rank_values(4, 6)
    module, given = _inlined(layer, x, {3: (low_rank(),)})
    inputs = [*given, *parameters, torch.tensor([0.25])]
    output, (forward, backward) = through_aot(module, inputs)
    assert_expected_inline(
        forward,
        """\
def forward(self, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, primals_7):
    t = torch.ops.aten.t.default(primals_1)
    addmm = torch.ops.aten.addmm.default(primals_2, primals_3, t)
    t_1 = torch.ops.aten.t.default(primals_4)
    mm = torch.ops.aten.mm.default(primals_3, t_1)
    gelu = torch.ops.aten.gelu.default(mm)
    t_2 = torch.ops.aten.t.default(primals_5)
    addmm_1 = torch.ops.aten.addmm.default(primals_6, gelu, t_2)
    select = torch.ops.aten.select.int(primals_7, 0, 0)
    lerp = torch.ops.aten.lerp.Tensor(addmm, addmm_1, select)
    t_3 = torch.ops.aten.t.default(t_2)
    return (lerp, primals_3, primals_7, mm, gelu, t_3)""",
    )
    assert_expected_inline(
        backward,
        """\
def forward(self, primals_3, primals_7, mm, gelu, t_3, tangents_1):
    select = torch.ops.aten.select.int(primals_7, 0, 0)
    mul = torch.ops.aten.mul.Tensor(tangents_1, select)
    empty_like = torch.ops.aten.empty_like.default(select, memory_format = torch.preserve_format)
    fill = torch.ops.aten.fill.Scalar(empty_like, 1)
    sub = torch.ops.aten.sub.Tensor(fill, select)
    mul_1 = torch.ops.aten.mul.Tensor(tangents_1, sub)
    mm_1 = torch.ops.aten.mm.default(mul, t_3)
    t_4 = torch.ops.aten.t.default(mul)
    mm_2 = torch.ops.aten.mm.default(t_4, gelu)
    t_5 = torch.ops.aten.t.default(mm_2)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul, [0], True)
    view = torch.ops.aten.view.default(sum_1, [6])
    t_6 = torch.ops.aten.t.default(t_5)
    gelu_backward = torch.ops.aten.gelu_backward.default(mm_1, mm)
    t_7 = torch.ops.aten.t.default(gelu_backward)
    mm_3 = torch.ops.aten.mm.default(t_7, primals_3)
    t_8 = torch.ops.aten.t.default(mm_3)
    t_9 = torch.ops.aten.t.default(t_8)
    t_10 = torch.ops.aten.t.default(mul_1)
    mm_4 = torch.ops.aten.mm.default(t_10, primals_3)
    t_11 = torch.ops.aten.t.default(mm_4)
    sum_2 = torch.ops.aten.sum.dim_IntList(mul_1, [0], True)
    view_1 = torch.ops.aten.view.default(sum_2, [6])
    t_12 = torch.ops.aten.t.default(t_11)
    return (t_12, view_1, None, t_9, t_6, view, None)""",
    )
    torch.testing.assert_close(output, reference(x, layer.weight, layer.bias, [ReferenceSeed(parameters, 0.25)]))


def test_an_isolated_seed_beside_one_that_uses_the_host_with_the_default_partitioner() -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4, requires_grad=True)
    first, second = low_rank_values(4, 4), low_rank_values(4, 4)
    module, given = _inlined(layer, x, {3: (low_rank(isolate=True), low_rank(uses_host=True))})
    inputs = [*given, *first, *second, torch.tensor([0.25, 0.75], dtype=torch.float16)]
    output, (forward, backward) = through_aot(module, inputs, default_partition)
    assert_expected_inline(
        forward,
        """\
def forward(self, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, primals_7, primals_8,
        primals_9):
    t = torch.ops.aten.t.default(primals_1)
    mm = torch.ops.aten.mm.default(primals_2, t)
    detach = torch.ops.aten.detach.default(primals_2)
    t_1 = torch.ops.aten.t.default(primals_3)
    mm_1 = torch.ops.aten.mm.default(detach, t_1)
    gelu = torch.ops.aten.gelu.default(mm_1)
    t_2 = torch.ops.aten.t.default(primals_4)
    addmm = torch.ops.aten.addmm.default(primals_5, gelu, t_2)
    select = torch.ops.aten.select.int(primals_9, 0, 0)
    _to_copy = torch.ops.aten._to_copy.default(select, dtype = torch.float32, layout = torch.strided, device =
        device(type='cpu'))
    lerp = torch.ops.aten.lerp.Tensor(mm, addmm, _to_copy)
    t_3 = torch.ops.aten.t.default(primals_6)
    mm_2 = torch.ops.aten.mm.default(primals_2, t_3)
    gelu_1 = torch.ops.aten.gelu.default(mm_2)
    t_4 = torch.ops.aten.t.default(primals_7)
    addmm_1 = torch.ops.aten.addmm.default(primals_8, gelu_1, t_4)
    add = torch.ops.aten.add.Tensor(lerp, addmm_1)
    select_1 = torch.ops.aten.select.int(primals_9, 0, 1)
    _to_copy_1 = torch.ops.aten._to_copy.default(select_1, dtype = torch.float32, layout = torch.strided,
        device = device(type='cpu'))
    lerp_1 = torch.ops.aten.lerp.Tensor(lerp, add, _to_copy_1)
    return (lerp_1, primals_2, t, detach, mm_1, gelu, t_2, _to_copy, t_3, mm_2, gelu_1, t_4, _to_copy_1)""",
    )
    assert_expected_inline(
        backward,
        """\
def forward(self, primals_2, t, detach, mm_1, gelu, t_2, _to_copy, t_3, mm_2, gelu_1, t_4, _to_copy_1,
        tangents_1):
    mul = torch.ops.aten.mul.Tensor(tangents_1, _to_copy_1)
    empty_like = torch.ops.aten.empty_like.default(_to_copy_1, memory_format = torch.preserve_format)
    fill = torch.ops.aten.fill.Scalar(empty_like, 1)
    sub = torch.ops.aten.sub.Tensor(fill, _to_copy_1)
    mul_1 = torch.ops.aten.mul.Tensor(tangents_1, sub)
    add_1 = torch.ops.aten.add.Tensor(mul_1, mul)
    t_5 = torch.ops.aten.t.default(t_4)
    mm_3 = torch.ops.aten.mm.default(mul, t_5)
    t_6 = torch.ops.aten.t.default(mul)
    mm_4 = torch.ops.aten.mm.default(t_6, gelu_1)
    t_7 = torch.ops.aten.t.default(mm_4)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul, [0], True)
    view = torch.ops.aten.view.default(sum_1, [4])
    t_8 = torch.ops.aten.t.default(t_7)
    gelu_backward = torch.ops.aten.gelu_backward.default(mm_3, mm_2)
    t_9 = torch.ops.aten.t.default(gelu_backward)
    mm_5 = torch.ops.aten.mm.default(t_9, primals_2)
    t_10 = torch.ops.aten.t.default(mm_5)
    t_11 = torch.ops.aten.t.default(t_3)
    mm_6 = torch.ops.aten.mm.default(gelu_backward, t_11)
    t_12 = torch.ops.aten.t.default(t_10)
    mul_2 = torch.ops.aten.mul.Tensor(add_1, _to_copy)
    empty_like_1 = torch.ops.aten.empty_like.default(_to_copy, memory_format = torch.preserve_format)
    fill_1 = torch.ops.aten.fill.Scalar(empty_like_1, 1)
    sub_1 = torch.ops.aten.sub.Tensor(fill_1, _to_copy)
    mul_3 = torch.ops.aten.mul.Tensor(add_1, sub_1)
    t_13 = torch.ops.aten.t.default(t_2)
    mm_7 = torch.ops.aten.mm.default(mul_2, t_13)
    t_14 = torch.ops.aten.t.default(mul_2)
    mm_8 = torch.ops.aten.mm.default(t_14, gelu)
    t_15 = torch.ops.aten.t.default(mm_8)
    sum_2 = torch.ops.aten.sum.dim_IntList(mul_2, [0], True)
    view_1 = torch.ops.aten.view.default(sum_2, [4])
    t_16 = torch.ops.aten.t.default(t_15)
    gelu_backward_1 = torch.ops.aten.gelu_backward.default(mm_7, mm_1)
    t_17 = torch.ops.aten.t.default(gelu_backward_1)
    mm_9 = torch.ops.aten.mm.default(t_17, detach)
    t_18 = torch.ops.aten.t.default(mm_9)
    t_19 = torch.ops.aten.t.default(t_18)
    t_20 = torch.ops.aten.t.default(mul_3)
    mm_10 = torch.ops.aten.mm.default(t_20, primals_2)
    t_21 = torch.ops.aten.t.default(mm_10)
    t_22 = torch.ops.aten.t.default(t)
    mm_11 = torch.ops.aten.mm.default(mul_3, t_22)
    add_2 = torch.ops.aten.add.Tensor(mm_6, mm_11)
    t_23 = torch.ops.aten.t.default(t_21)
    return (t_23, add_2, t_19, t_16, view_1, t_12, t_8, view, None)""",
    )
    seeds = [ReferenceSeed(first, 0.25, isolate=True), ReferenceSeed(second, 0.75, uses_host=True)]
    torch.testing.assert_close(output, reference(x, layer.weight, None, seeds))


def test_a_frozen_kernel_brings_no_gradient_of_its_own() -> None:
    layer, x = MarkedLinear(4, 6, 3), torch.randn(2, 4)
    parameters = [parameter.detach() for parameter in low_rank_values(4, 6)]
    module, given = _inlined(layer, x, {3: (low_rank(isolate=True),)})
    _, (_, backward) = through_aot(module, [*given, *parameters, torch.tensor([0.25])])
    assert_expected_inline(
        backward,
        """\
def forward(self, primals_3, primals_7, tangents_1):
    select = torch.ops.aten.select.int(primals_7, 0, 0)
    empty_like = torch.ops.aten.empty_like.default(select, memory_format = torch.preserve_format)
    fill = torch.ops.aten.fill.Scalar(empty_like, 1)
    sub = torch.ops.aten.sub.Tensor(fill, select)
    mul = torch.ops.aten.mul.Tensor(tangents_1, sub)
    t_3 = torch.ops.aten.t.default(mul)
    mm_1 = torch.ops.aten.mm.default(t_3, primals_3)
    t_4 = torch.ops.aten.t.default(mm_1)
    sum_1 = torch.ops.aten.sum.dim_IntList(mul, [0], True)
    view = torch.ops.aten.view.default(sum_1, [6])
    t_5 = torch.ops.aten.t.default(t_4)
    return (t_5, view, None, None, None, None, None)""",
    )


def test_the_elided_graph_is_the_plain_graph_after_aot_autograd() -> None:
    x = torch.randn(2, 4)
    graphs = []
    for layer in (MarkedLinear(4, 6, 3), nn.Linear(4, 6)):
        module, given = _inlined(layer, x, {})
        graphs.append(through_aot(module, given)[1])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("in_checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
def test_gradients_are_those_of_the_formula(partition: Callable[..., Any], in_checkpoint: bool) -> None:
    layer, x = MarkedLinear(4, 6, 3).double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    first, second = low_rank_values(4, 6, dtype=torch.double), low_rank_values(4, 6, dtype=torch.double)

    def forward(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False) if in_checkpoint else layer(x)

    module, given = _inlined(forward, x, {3: (low_rank(uses_host=True), low_rank(isolate=True))})
    inputs = [*given, *first, *second, torch.tensor([0.25, 0.75], dtype=torch.float16)]
    output, _ = through_aot(module, inputs, partition)
    leaves = [x, layer.weight, layer.bias, *first, *second]
    seeds = [ReferenceSeed(first, 0.25, uses_host=True), ReferenceSeed(second, 0.75, isolate=True)]
    expected = reference(x, layer.weight, layer.bias, seeds)
    assert_backpropagated(output, expected, leaves)


@pytest.mark.parametrize("nesting", ["checkpoint in checkpoint", "region called twice"])
def test_gradients_through_nested_graphs_are_those_of_the_formula(nesting: str) -> None:
    outer, inner = (MarkedLinear(4, 4, site).double() for site in (9, 2))
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    at_inner, at_outer = low_rank_values(4, 4, dtype=torch.double), low_rank_values(4, 4, dtype=torch.double)

    def checkpoints(x: Tensor) -> Any:
        within = partial(checkpoint, inner, use_reentrant=False)
        return checkpoint(lambda x: outer(within(x).relu()).relu(), x, use_reentrant=False)

    def regions(x: Tensor) -> Any:
        return region(outer, region(inner, region(inner, x)))

    def formula(x: Tensor) -> Tensor:
        for _ in range(2 if nesting == "region called twice" else 1):
            x = reference(x, inner.weight, inner.bias, [ReferenceSeed(at_inner, 0.5)]).relu()
        return reference(x, outer.weight, outer.bias, [ReferenceSeed(at_outer, 0.25, uses_host=True)]).relu()

    model = regions if nesting == "region called twice" else checkpoints
    module, given = _inlined(model, x, {9: (low_rank(uses_host=True),), 2: (low_rank(),)})
    assert sites_in(module.graph) == ()
    inputs = [*given, *at_inner, *at_outer, torch.tensor([0.5, 0.25])]
    output, _ = through_aot(module, inputs)
    leaves = [x, *inner.parameters(), *outer.parameters(), *at_inner, *at_outer]
    expected = formula(x)
    assert_backpropagated(output, expected, leaves)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_compilation_serves_every_batch_of_a_dynamic_graph(autocast: bool) -> None:
    layer, parameters, alphas = MarkedLinear(4, 6, 3), low_rank_values(4, 6), torch.tensor([0.5])
    graphs: list[str] = []

    def compiler(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(code(graph))
        return graph.forward

    def backend(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        passes = Pipeline((InlineKernels({3: (low_rank(uses_host=True),)}), ElideDormant()), verify)
        inlined = passes(copied(module)).graph_module
        compiled = aot_function(inlined, fw_compiler=compiler, bw_compiler=compiler, dynamic=True)
        return lambda *inputs: compiled(*inputs, *parameters, alphas)

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x)

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=True)
    tolerance = 0.05 if autocast else 1e-5
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4)
        output = compiled(x)
        output.float().sum().backward()
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        expected = reference(x, layer.weight, layer.bias, [ReferenceSeed(parameters, 0.5, uses_host=True)])
        torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    assert len(graphs) == 2
