"""AddKernels: the graph before and after, and what its backward computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.artifacts import Blueprint
from esper_passes import AddKernels, FoldFossils
from tests.passes.batching import apply, inlined, linear_seed, of_blueprint
from tests.passes.graphs import MarkedLinear, Shown, low_rank_seed, through_aot


def adding(seed: int = 0, **flags: bool) -> Any:
    """A kernel that adds something to what the site has computed."""
    return of_blueprint(Blueprint.low_rank(4, 4, 2, start="identity", seed=seed), **flags)


def test_a_kernel_that_adds(shown: Shown) -> None:
    module, _ = inlined(MarkedLinear(4, 4, 3), torch.randn(2, 4), {3: [adding()]}, torch.rand(1))
    shown(module)
    module, modified = apply(module, AddKernels())
    assert modified
    shown(module)


def test_several_one_of_them_a_fossil(shown: Shown) -> None:
    seeds = [adding(0), low_rank_seed(uses_host=True), adding(2)]
    module, _ = inlined(MarkedLinear(4, 4, 3), torch.randn(2, 4), {3: seeds}, torch.rand(3))
    module, _ = apply(module, FoldFossils({1: 0.25}), AddKernels())
    shown(module)


@pytest.mark.parametrize(
    "seeds",
    [
        lambda: [linear_seed(0)],
        lambda: [adding(isolate=True)],
        lambda: [adding(), linear_seed(0)],
    ],
    ids=["it replaces", "it adds to a detached value", "one of two replaces"],
)
def test_what_does_more_than_add_is_blended_in(seeds: Any) -> None:
    module, _ = inlined(MarkedLinear(4, 4, 3), torch.randn(2, 4), {3: seeds()}, torch.rand(2))
    _, modified = apply(module, AddKernels())
    assert not modified


def test_the_backward_computes_nothing_for_the_sum() -> None:
    found = []
    for passes in ((), (AddKernels(),)):
        torch.manual_seed(0)
        layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4, requires_grad=True)
        module, given = inlined(layer, x, {3: [low_rank_seed(uses_host=True)]}, torch.tensor([0.25]))
        module, _ = apply(module, *passes)
        output, (_, backward) = through_aot(module, given)
        found.append((output, x.grad, layer.weight.grad, backward))
    blended, added = found
    for one, other in zip(added[:3], blended[:3], strict=True):
        torch.testing.assert_close(one, other)
    assert "sub" in blended[3]  # 1 - alpha
    assert "sub" not in added[3]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_identity_start_changes_nothing_at_any_share(alpha: float) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, given = inlined(layer, x, {3: [adding()]}, torch.tensor([alpha]))
    module, _ = apply(module, AddKernels())
    (output,) = module(*given)
    assert torch.equal(output, torch.nn.functional.linear(x, layer.weight, layer.bias))
