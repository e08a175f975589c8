"""InlineKernels: the graph before and after, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import ElideDormant, InlineKernels, inputs, is_site, sites_in
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    Shown,
    capture,
    capture_with_inputs,
    low_rank,
    low_rank_values,
    reference,
)


def test_one_seed_without_bias_at_the_site(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    shown(module)
    result = InlineKernels({5: (low_rank(),)})(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    shown(module)


def test_several_seeds_of_all_kinds_at_a_site_with_bias(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    seeds = {3: (low_rank(), low_rank(isolate=True), low_rank(uses_host=True), low_rank(uses_host=True, isolate=True))}
    InlineKernels(seeds)(module).graph_module.graph.lint()
    shown(module)


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


def test_a_site_that_is_called_twice_uses_its_placeholders_twice(shown: Shown) -> None:
    layer = MarkedLinear(4, 4, 3)
    module = capture(lambda x: layer(layer(x)), torch.randn(2, 4))
    InlineKernels({3: (low_rank(isolate=True),)})(module).graph_module.graph.lint()
    shown(module)


def test_layers_that_share_a_weight_are_separate_sites(shown: Shown) -> None:
    first, second = MarkedLinear(4, 4, 3), MarkedLinear(4, 4, 4)
    second.weight = first.weight
    module = capture(lambda x: second(first(x)), torch.randn(2, 4))
    InlineKernels({4: (low_rank(),)})(module).graph_module.graph.lint()
    shown(module)


def test_a_graph_with_a_dynamic_batch_keeps_its_symbols(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4), dynamic=True)
    InlineKernels({5: (low_rank(uses_host=True),)})(module).graph_module.graph.lint()
    shown(module)


def test_kernels_inside_a_checkpoint_become_its_operands(shown: Shown) -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
    module = capture(lambda x: second(checkpoint(first, x, use_reentrant=False)), torch.randn(2, 4))
    seeds = {2: (low_rank(),), 9: (low_rank(uses_host=True),)}
    InlineKernels(seeds)(module).graph_module.graph.lint()
    module.get_submodule("wrap_body_0").graph.lint()
    shown(module)


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
