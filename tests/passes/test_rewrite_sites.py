"""RewriteSites: the graph before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from esper_passes import RewriteSites, is_site, sites_in
from tests.passes.graphs import MLP, Shown


class _Twice(nn.Module):
    """One layer called twice, another through a container, with their inputs given in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.block(self.shared(input=x)))


def test_calls_of_layers_become_markers(shown: Shown) -> None:
    module = fx.symbolic_trace(MLP(marked=False))
    shown(module)
    result = RewriteSites({"up": 3, "down": 5})(module)
    result.graph_module.graph.lint()
    assert result.modified
    shown(module)


def test_a_layer_that_is_called_twice_is_one_site(shown: Shown) -> None:
    model, x = _Twice(), torch.randn(2, 4)
    module = fx.symbolic_trace(model)
    RewriteSites({"shared": 1, "block.0": 2})(module).graph_module.graph.lint()
    shown(module)
    assert sites_in(module.graph) == (1, 2)
    assert torch.equal(module(x), model(x))


def test_other_layers_and_names_that_are_not_called_are_left_alone() -> None:
    module = fx.symbolic_trace(MLP(marked=False))
    result = RewriteSites({"down": 5, "elsewhere": 6})(module)
    assert result.modified
    assert [node.target for node in module.graph.nodes if node.op == "call_module"] == ["up"]
    assert not RewriteSites({"elsewhere": 6})(module).modified


def test_parameters_are_fetched_at_each_call() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)
    module = fx.symbolic_trace(model)
    RewriteSites({"0": 1})(module)
    module.get_submodule("0").weight = nn.Parameter(torch.zeros(2, 4))
    assert torch.equal(module(x), module.get_submodule("0").bias.expand(3, 2))


def test_metadata_goes_to_the_marker() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2)))
    call = next(node for node in module.graph.nodes if node.op == "call_module")
    call.meta["nn_module_stack"] = {"0": ("0", nn.Linear)}
    RewriteSites({"0": 1})(module)
    (site,) = (node for node in module.graph.nodes if is_site(node))
    assert site.meta["nn_module_stack"] == {"0": ("0", nn.Linear)}


def test_a_layer_with_hooks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"module '0' has forward hooks, which a site would not run"):
        RewriteSites({"0": 1})(fx.symbolic_trace(model))
