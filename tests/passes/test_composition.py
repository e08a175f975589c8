"""Kernels of any number, order, start and share at a site, inlined, folded and batched, against the formula."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from esper_passes import BatchSeeds, FoldFossils, GraphPass
from tests.composition import ADDED, IN, KINDS, OUT, Planted, composed
from tests.passes.batching import TWO, apply, of_blueprint, with_seeds
from tests.passes.graphs import MarkedLinear, capture_with_inputs

Seed = tuple[str, float, bool, bool]
"""Kind, alpha, isolate, whether it is a fossil."""

ONE: st.SearchStrategy[Seed] = st.tuples(
    st.sampled_from(sorted(KINDS)), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans(), st.booleans()
)


@cache
def _captured(bias: bool) -> tuple[MarkedLinear, Tensor, fx.GraphModule, list[Any]]:
    layer = MarkedLinear(IN, OUT, 3, bias=bias).double()
    x = torch.randn(3, IN, dtype=torch.double, requires_grad=True)
    return layer, x, *capture_with_inputs(layer, x)


def _check(chosen: list[Seed], bias: bool, *passes: GraphPass) -> fx.GraphModule:
    """Outputs and all gradients of the site with seeds are those of the formula."""
    layer, x, marked, given_ = _captured(bias)
    at_site, planted = [], []
    for index, (kind, alpha, isolate, _) in enumerate(chosen):
        graph, values = of_blueprint(KINDS[kind].blueprint(index, "float64"), isolate)
        with torch.no_grad():
            for value in values:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)))
        names = KINDS[kind].blueprint(index, "float64").graph.tensor_names
        at_site.append((graph, values))
        planted.append(Planted(kind, dict(zip(names, values, strict=True)), alpha, isolate))
    alphas = torch.tensor([alpha for _, alpha, _, _ in chosen], dtype=torch.double)
    module = with_seeds(marked, {3: at_site}, alphas, None)
    constants = {index: alpha for index, (_, alpha, _, fossil) in enumerate(chosen) if fossil}
    module, _ = apply(module, FoldFossils(constants), *passes)
    parameters = [value for _, values in at_site for value in values]
    (output,) = module(*given_, *parameters, alphas)
    expected = composed(x, layer.weight, layer.bias, planted)
    leaves = [x, *layer.parameters(), *parameters]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_gradients(output, leaves), _gradients(expected, leaves), rtol=1e-9, atol=1e-9)
    return module


def _gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    if not output.requires_grad:
        return ()
    return torch.autograd.grad(output.square().sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_of_every_kind_above_and_below_one_that_adds(kind: str) -> None:
    for isolate in (False, True):
        for order in ((kind, ADDED[0]), (ADDED[0], kind), (kind, kind)):
            _check([(each, 0.25, isolate and each == kind, False) for each in order], True, TWO)


@pytest.mark.slow
@given(st.lists(ONE, min_size=1, max_size=6), st.booleans(), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=80, deadline=None)
def test_any_kernels_compose_as_the_formula_says(chosen: list[Seed], bias: bool, min_seeds: int) -> None:
    _check(chosen, bias, *([BatchSeeds(min_seeds=min_seeds)] if min_seeds else []))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_kernels_that_add_to_the_output_are_batched_whole(alpha: float) -> None:
    module = _check([(kind, alpha, False, False) for kind in ADDED], True, TWO)
    assert not any(node.target is torch.lerp for node in module.graph.nodes)


def test_a_kernel_that_squashes_the_output_divides_those_around_it() -> None:
    added = [("bottleneck, added", 0.5, False, False)] * 2
    module = _check([*added, ("output squashed", 0.5, False, False), *added], True, TWO)
    products = [node for node in module.graph.nodes if node.target is torch._C._nn.linear]
    assert len(products) == 5  # the host, and a first and a last layer for each two
