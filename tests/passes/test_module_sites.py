"""Markers behind modules: as they stand, and in every pass that knows sites."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from esper_passes import (
    MODULE_SITE,
    TAGGED_MODULE_SITE,
    BatchSeeds,
    ElideDormant,
    FoldFossils,
    InlineKernels,
    NumberSites,
    Pipeline,
    host_of,
    is_module_site,
    is_site,
    site_call,
    site_id,
    site_input,
    sites_in,
    tag_inputs,
    verify,
)
from tests.passes.batching import linear_seed, with_seeds
from tests.passes.graphs import (
    MarkedBlock,
    Shown,
    capture,
    capture_with_inputs,
    code,
    copied,
    low_rank,
    low_rank_values,
    run_low_rank,
)


def test_a_marker_as_it_stands_is_what_the_module_has_made() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 5, requires_grad=True)
    assert MODULE_SITE(x, y, 3) is y
    assert TAGGED_MODULE_SITE(x, y, torch.zeros(0)) is y
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(y)
        assert MODULE_SITE(mode.from_tensor(x), fake, 3).shape == (3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.vmap(lambda x, y: MODULE_SITE(x, y, 3))(x, y), y)


def test_a_marker_tells_its_id_its_input_and_the_hosts_output() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch.ops.esper.module_site, (x,), {"site": 4, "y": y})
    graph.output(node)
    assert is_site(node)
    assert is_module_site(node)
    assert (site_id(node), site_input(node), host_of(node)) == (4, x, y)
    assert sites_in(graph) == (4,)
    with pytest.raises(ValueError, match="no esper::site call"):
        site_call(node)
    other = graph.call_function(MODULE_SITE, (x, None, 4))
    with pytest.raises(ValueError, match="was not called with tensors"):
        site_id(other)


def test_dormant_it_leaves_no_trace(shown: Shown) -> None:
    module = capture(MarkedBlock(3), torch.randn(2, 4))
    shown(module)
    result = ElideDormant()(copied(module))
    assert result.modified
    shown(result.graph_module)
    plain = capture(MarkedBlock(3, marked=False), torch.randn(2, 4))
    assert code(result.graph_module) == code(plain)
    assert not ElideDormant(frozenset({3}))(module).modified


def test_kernels_stand_behind_the_module(shown: Shown) -> None:
    module = capture(MarkedBlock(3), torch.randn(2, 4))
    seeds = {3: (low_rank(), low_rank(uses_host=True, isolate=True))}
    result = Pipeline((InlineKernels(seeds),), verify)(module)
    shown(result.graph_module)


def test_a_marker_in_a_marker_blends_what_is_inside_first() -> None:
    block, x = nn.Sequential(MarkedBlock(3), MarkedBlock(5)), torch.randn(2, 4)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.esper.module_site(x, block(x), 7)
        return y

    module, given = capture_with_inputs(forward, x)
    values = {site: low_rank_values(4, 4) for site in (5, 7)}
    InlineKernels({site: (low_rank(uses_host=True),) for site in values})(module)
    ElideDormant()(module).graph_module.graph.lint()
    alphas = torch.tensor([0.5, 0.25])
    (output,) = module(*given, *values[5], *values[7], alphas)
    first = block[0].inner(x).relu()
    y = block[1].inner(first).relu()
    y = 0.5 * run_low_rank(values[5], first, y) + 0.5 * y
    torch.testing.assert_close(output, 0.25 * run_low_rank(values[7], x, y) + 0.75 * y)


def test_at_alpha_one_what_the_module_does_besides_stays() -> None:
    """It may be an input, or write to one: only what nothing can see is left out."""

    def passing(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.esper.module_site(x, x, 3)
        return y

    module, given = capture_with_inputs(passing, torch.randn(2, 4))
    values = low_rank_values(4, 4)
    module = with_seeds(module, {3: [(low_rank(), values)]}, torch.ones(1))
    FoldFossils({0: 1.0})(module)
    (output,) = module(*given, *values, torch.ones(1))
    torch.testing.assert_close(output, run_low_rank(values, given[0]))


def test_several_kernels_behind_a_module_are_batched() -> None:
    block, x = MarkedBlock(3), torch.randn(2, 4)
    module, given = capture_with_inputs(block, x)
    seeds = [linear_seed(index) for index in range(4)]
    alphas = torch.full((4,), 0.25)
    before = with_seeds(module, {3: seeds}, alphas)
    after = Pipeline((BatchSeeds(min_seeds=2),), verify)(copied(before))
    assert after.modified
    parameters = [value for _, values in seeds for value in values]
    torch.testing.assert_close(after.graph_module(*given, *parameters, alphas), before(*given, *parameters, alphas))


def test_tags_become_numbers() -> None:
    tags = [torch.zeros(0), torch.zeros(0)]

    def forward(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y = TAGGED_MODULE_SITE(x, x.relu(), tag=second)
        z: Tensor = torch.ops.esper.tagged_module_site(y, y.tanh(), first)
        return z

    module = capture(forward, torch.randn(2, 4), *tags)
    assert len(tag_inputs(module)) == 2
    numbered = NumberSites()(module).graph_module
    assert sites_in(numbered.graph) == (0, 1)
    assert sum(node.op == "placeholder" for node in numbered.graph.nodes) == 1
