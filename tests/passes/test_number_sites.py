"""NumberSites: the graph before and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan, while_loop
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from esper_passes import (
    TAGGED_ENTER,
    TAGGED_SITE,
    ElideDormant,
    NumberSites,
    runtimes_in,
    site_calls_in,
    sites_in,
    tag_inputs,
)
from tests.passes.graphs import Shown, capture, capture_with_inputs, region


def tag() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


class TaggedLinear(nn.Linear):
    """A linear layer that calls the tagged marker instead, unless it is `plain`."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__(4, 4)
        self.tag = None if plain else tag()

    def forward(self, x: Tensor) -> Tensor:
        if self.tag is None:
            return linear(x, self.weight, self.bias)
        marked: Tensor = TAGGED_SITE(x, self.weight, self.bias, self.tag)
        return marked


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.tag = TaggedLinear(), TaggedLinear(), tag()

    def forward(self, x: Tensor) -> Tensor:
        TAGGED_ENTER(self.tag)
        y: Tensor = self.up(self.down(self.up(x)))
        return y


def _inputs(module: fx.GraphModule, given: list[Any]) -> list[Any]:
    """Those that are left when the tags of `module` are gone."""
    return [value for position, value in enumerate(given) if position not in tag_inputs(module)]


def test_tags_become_numbers_in_order_of_first_use_and_are_no_inputs_any_more(shown: Shown) -> None:
    module = capture(Model(), torch.randn(2, 4))
    assert tag_inputs(module) == (0, 1, 5)
    result = NumberSites()(module)
    module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    shown(module)
    assert (runtimes_in(module.graph), site_calls_in(module.graph)) == ((0,), (1, 2, 1))


def test_a_graph_without_tags_is_not_touched() -> None:
    module = capture(nn.Linear(4, 4), torch.randn(2, 4))
    before = list(module.graph.nodes)
    assert tag_inputs(module) == ()
    assert not NumberSites()(module).modified
    assert list(module.graph.nodes) == before


def test_tags_leave_the_operands_of_a_checkpoint(shown: Shown) -> None:
    inside, outside = TaggedLinear(), TaggedLinear()

    def forward(x: Tensor) -> Tensor:
        inner: Tensor = checkpoint(lambda x: checkpoint(inside, x, use_reentrant=False).relu(), x, use_reentrant=False)
        y: Tensor = outside(inner)
        return y

    module, given = capture_with_inputs(forward, torch.randn(2, 4))
    expected, left = module(*given), _inputs(module, given)
    NumberSites()(module)
    module.graph.lint()
    shown(module)
    assert sites_in(module.graph) == (0, 1)
    torch.testing.assert_close(module(*left), expected)


def test_layers_that_share_a_region_get_one_each() -> None:
    first, second, third = TaggedLinear(), TaggedLinear(), TaggedLinear()

    def forward(x: Tensor) -> Tensor:
        for layer in (first, second, first, third, second):
            x = region(layer, x)
        return x

    module, given = capture_with_inputs(forward, torch.randn(2, 4))
    expected, left = module(*given), _inputs(module, given)
    NumberSites()(module)
    module.graph.lint()
    assert site_calls_in(module.graph) == (0, 1, 0, 2, 1)
    calls = [node for node in module.graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
    calls = calls[-4:]  # the first call stands in the graph, or has a body of its own in torch 2.11
    names = [call.args[1] for call in calls]
    assert names == [call.args[0].target for call in calls]
    assert len(names) == 4
    assert len(set(names)) == 3  # the body that is called for one layer twice is one
    torch.testing.assert_close(module(*left), expected)


def _choosing(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: torch.cond(x.sum() > 0, lambda x: first(x), lambda x: second(x), (x,))


def _looping(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: second(while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, first(x)), (torch.tensor(0), x))[1])


def _scanning(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: scan(lambda carry, row: (first(carry) + second(row), carry.clone()), torch.zeros(4), x)[0]


@pytest.mark.parametrize("kind", [_choosing, _looping, _scanning])
@pytest.mark.filterwarnings("ignore")
def test_operators_with_other_operands(kind: Callable[..., Callable[[Tensor], Any]]) -> None:
    layers = TaggedLinear(), TaggedLinear()
    with torch.no_grad():
        module, given = capture_with_inputs(kind(*layers), torch.randn(2, 4))
        left = _inputs(module, given)
        NumberSites()(module)
        module.graph.lint()
        assert sites_in(module.graph) == (0, 1)
        ElideDormant()(module)
        plain = [TaggedLinear(plain=True) for _ in layers]
        for one, other in zip(plain, layers, strict=True):
            one.load_state_dict(other.state_dict())
        host, host_inputs = capture_with_inputs(kind(*plain), left[[each.dim() for each in left].index(2)])
        assert len(host_inputs) == len(left)
        torch.testing.assert_close(module(*left), host(*host_inputs))


def test_a_tag_that_is_no_input_or_is_read_is_refused() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output(graph.call_function(TAGGED_SITE, (x, weight, None, graph.call_method("clone", (x,)))))
    module = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(ValueError, match="'clone' of 'tagged_site_default' is no input"):
        NumberSites()(module)

    graph = fx.Graph()
    x, weight, mark = (graph.placeholder(name) for name in ("x", "weight", "mark"))
    graph.output((graph.call_function(TAGGED_SITE, (), {"x": x, "weight": weight, "bias": None, "tag": mark}), mark))
    with pytest.raises(ValueError, match="'mark' is read by"):
        NumberSites()(fx.GraphModule(nn.Module(), graph))


def test_tagged_markers_as_they_stand_are_what_numbered_ones_are() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(TAGGED_SITE(x, weight, bias, tag()), linear(x, weight, bias))
    assert TAGGED_ENTER(tag()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        mark = tag()
        over_x = torch.vmap(lambda row: (TAGGED_ENTER(mark), TAGGED_SITE(row, weight, bias, mark))[1])(x)
        per_sample = torch.vmap(torch.func.grad(lambda w, row: TAGGED_SITE(row, w, bias, mark).sum()), (None, 0))
        assert per_sample(weight, x).shape == (3, 5, 4)
    torch.testing.assert_close(over_x, linear(x, weight, bias))
