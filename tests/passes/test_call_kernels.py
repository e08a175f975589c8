"""CallKernels: the graph before and after, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import CallKernels, ElideDormant, RewriteSites, SeedCall
from tests.passes.graphs import (
    MLP,
    MarkedLinear,
    ReferenceSeed,
    Shown,
    capture_with_inputs,
    code,
    copied,
    low_rank_values,
    reference,
    run_low_rank,
)


def kernel(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True).expand(*x.shape[:-1], 6)


def host_kernel(x: Tensor, host: Tensor) -> Tensor:
    return host + x.sum(-1, keepdim=True)


def alphas() -> Tensor:
    return torch.tensor([0.25, 0.5, 0.75])


def _marked(model: nn.Module) -> fx.GraphModule:
    return RewriteSites({"up": 3, "down": 5})(fx.symbolic_trace(model)).graph_module


def test_one_seed(shown: Shown) -> None:
    module = _marked(MLP(marked=False))
    shown(module)
    result = CallKernels({3: (SeedCall(kernel, uses_host=False, isolate=False),)}, alphas)(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    shown(module)


def test_several_seeds_of_all_kinds_at_two_sites(shown: Shown) -> None:
    module = _marked(MLP(marked=False))
    seeds = {
        5: (SeedCall(host_kernel, uses_host=True, isolate=True),),
        3: (SeedCall(kernel, uses_host=False, isolate=True), SeedCall(host_kernel, uses_host=True, isolate=False)),
    }
    CallKernels(seeds, alphas)(module).graph_module.graph.lint()
    shown(module)


def test_a_layer_called_twice_calls_its_kernel_twice_and_the_alphas_once(shown: Shown) -> None:
    layer = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.up(x))

    module = _marked(Twice())
    CallKernels({3: (SeedCall(host_kernel, uses_host=True, isolate=False),)}, alphas)(module).graph_module.graph.lint()
    shown(module)


@pytest.mark.parametrize("wrap", [lambda function: function, partial], ids=["function", "partial"])
def test_outputs_and_gradients_are_those_of_the_formula(wrap: Callable[..., Callable[..., Tensor]]) -> None:
    model, x = MLP(marked=False).double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    first, second, third = (low_rank_values(4, 6, dtype=torch.double) for _ in range(3))
    third = low_rank_values(6, 4, dtype=torch.double)
    seeds = {
        5: (SeedCall(wrap(lambda *given: run_low_rank(third, *given)), uses_host=True, isolate=True),),
        3: (
            SeedCall(wrap(lambda *given: run_low_rank(first, *given)), uses_host=False, isolate=False),
            SeedCall(wrap(lambda *given: run_low_rank(second, *given)), uses_host=True, isolate=True),
        ),
    }
    output = CallKernels(seeds, alphas)(_marked(model)).graph_module(x)
    at_up = [ReferenceSeed(first, 0.25), ReferenceSeed(second, 0.5, uses_host=True, isolate=True)]
    hidden = reference(x, model.up.weight, model.up.bias, at_up).relu()
    at_down = [ReferenceSeed(third, 0.75, uses_host=True, isolate=True)]
    expected = reference(hidden, model.down.weight, None, at_down)
    leaves = [x, *model.parameters(), *first, *second, *third]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_kernels_inside_a_checkpoint_are_called_there_in_this_module_alone() -> None:
    layer, x = MarkedLinear(4, 6, 3), torch.randn(2, 4)
    module, given = capture_with_inputs(lambda x: checkpoint(layer, x, use_reentrant=False), x)
    copy = copied(module)
    assert CallKernels({3: (SeedCall(kernel, uses_host=False, isolate=False),)}, alphas)(copy).modified
    (output,), (host,) = copy(*given), module(*given)
    torch.testing.assert_close(host, layer(x))
    torch.testing.assert_close(output, 0.25 * kernel(x) + 0.75 * host)


def test_alphas_are_read_at_each_forward() -> None:
    model, x, value = MLP(marked=False), torch.randn(3, 4), torch.zeros(1)
    seeds = {3: (SeedCall(kernel, uses_host=False, isolate=False),)}
    module = CallKernels(seeds, lambda: value.clone())(_marked(model)).graph_module
    assert torch.equal(module(x), model(x))
    value.fill_(1.0)
    torch.testing.assert_close(module(x), model.down(kernel(x).relu()))


def test_a_module_can_be_a_kernel_and_shows_its_place() -> None:
    model, x = MLP(marked=False), torch.randn(3, 4)
    kernel_module = nn.Linear(4, 6)
    module = _marked(model)
    CallKernels({3: (SeedCall(kernel_module, uses_host=False, isolate=False),)}, lambda: torch.ones(1))(module)
    assert any("esper_kernel_3_0" in line for line in code(module).splitlines())
    torch.testing.assert_close(module(x), model.down(kernel_module(x).relu()))


def test_under_autocast_the_kernel_follows_the_linear() -> None:
    model, x = MLP(marked=False), torch.randn(3, 4)
    module = _marked(model)
    CallKernels({5: (SeedCall(lambda x: x[..., :4].float(), uses_host=False, isolate=False),)}, alphas)(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_without_seeds_nothing_changes_and_no_alphas_are_asked_for() -> None:
    module = _marked(MLP(marked=False))
    before = list(module.graph.nodes)
    assert not CallKernels({}, alphas)(module).modified
    assert not CallKernels({3: (), 9: (SeedCall(kernel, False, False),)}, alphas)(module).modified
    assert list(module.graph.nodes) == before
    assert ElideDormant()(module).modified
