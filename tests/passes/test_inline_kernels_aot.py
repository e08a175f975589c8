"""InlineKernels through AOTAutograd: the forward graph and the backward graph that an inner compiler receives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import ElideDormant, InlineKernels, Pipeline, SeedGraph, sites_in, verify
from tests.passes.graphs import (
    MarkedLinear,
    ReferenceSeed,
    Shown,
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


def test_one_seed_with_the_min_cut_partitioner(shown: Shown) -> None:
    layer, x, parameters = MarkedLinear(4, 6, 3), torch.randn(2, 4), low_rank_values(4, 6)
    module, given = _inlined(layer, x, {3: (low_rank(),)})
    inputs = [*given, *parameters, torch.tensor([0.25])]
    output, (forward, backward) = through_aot(module, inputs)
    shown(forward)
    shown(backward)
    torch.testing.assert_close(output, reference(x, layer.weight, layer.bias, [ReferenceSeed(parameters, 0.25)]))


def test_an_isolated_seed_beside_one_that_uses_the_host_with_the_default_partitioner(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4, requires_grad=True)
    first, second = low_rank_values(4, 4), low_rank_values(4, 4)
    module, given = _inlined(layer, x, {3: (low_rank(isolate=True), low_rank(uses_host=True))})
    inputs = [*given, *first, *second, torch.tensor([0.25, 0.75], dtype=torch.float16)]
    output, (forward, backward) = through_aot(module, inputs, default_partition)
    shown(forward)
    shown(backward)
    seeds = [ReferenceSeed(first, 0.25, isolate=True), ReferenceSeed(second, 0.75, uses_host=True)]
    torch.testing.assert_close(output, reference(x, layer.weight, None, seeds))


def test_a_frozen_kernel_brings_no_gradient_of_its_own(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 6, 3), torch.randn(2, 4)
    parameters = [parameter.detach() for parameter in low_rank_values(4, 6)]
    module, given = _inlined(layer, x, {3: (low_rank(isolate=True),)})
    _, (_, backward) = through_aot(module, [*given, *parameters, torch.tensor([0.25])])
    shown(backward)


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
