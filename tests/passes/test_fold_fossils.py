"""FoldFossils: the graph before and after, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import default_partition
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import FoldFossils
from tests.passes.batching import apply, inlined
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    Shown,
    assert_backpropagated,
    code,
    low_rank,
    low_rank_seed,
    low_rank_values,
    reference,
    through_aot,
)


def test_each_kind_of_alpha_at_a_site_with_bias(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed(), low_rank_seed()]}, torch.rand(3))
    shown(module)
    module, modified = apply(module, FoldFossils({0: 0.25, 1: 0.0}))
    assert modified
    shown(module)


def test_at_alpha_one_the_kernel_stands_alone_and_the_host_goes(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed(), low_rank_seed()]}, torch.rand(3))
    module, _ = apply(module, FoldFossils({1: 1.0}))
    shown(module)


def test_a_host_that_a_kernel_reads_stays(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(uses_host=True, isolate=True)]}, torch.rand(1))
    module, _ = apply(module, FoldFossils({0: 1.0}))
    shown(module)


def test_without_a_recorded_dtype_the_host_stays_for_it(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed()]}, torch.rand(1))
    for node in module.graph.nodes:
        node.meta.pop("example_value", None)
    module, _ = apply(module, FoldFossils({0: 1.0}))
    shown(module)


def test_a_site_without_any_blend_left_is_the_host() -> None:
    x = torch.randn(2, 4)
    module, given = inlined(MLP(), x, {3: [(low_rank(), low_rank_values(4, 6))]}, torch.rand(1))
    plain, _ = inlined(MLP(), x, {}, torch.rand(0))
    module, modified = apply(module, FoldFossils({0: 0.0}))
    assert modified
    body = [line for line in code(module).splitlines() if " = " in line]
    assert body == [line for line in code(plain).splitlines() if " = " in line]
    assert len([node for node in module.graph.nodes if node.op == "placeholder"]) == len(given)


def test_a_site_that_is_called_twice_and_sites_in_a_checkpoint(shown: Shown) -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)

    def forward(x: Tensor) -> Any:
        return checkpoint(lambda x: second(second(x)), first(x), use_reentrant=False)

    module, _ = inlined(
        forward, torch.randn(2, 4), {2: [low_rank_seed()], 9: [low_rank_seed(), low_rank_seed()]}, torch.rand(3)
    )
    module, _ = apply(module, FoldFossils({0: 1.0, 1: 1.0, 2: 0.5}))
    shown(module)


def test_forward_and_backward_through_aot_autograd(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = {3: [low_rank_seed(), low_rank_seed()]}
    module, given = inlined(layer, x, seeds, torch.tensor([0.25, 0.5]))
    module, _ = apply(module, FoldFossils({0: 1.0}))
    output, (forward, backward) = through_aot(module, given, default_partition)
    shown(forward)
    shown(backward)
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
