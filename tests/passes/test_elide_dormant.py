"""ElideDormant: the graph before and after."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import ElideDormant, is_site, sites_in
from tests.passes.graphs import MLP, MarkedLinear, Shown, capture, capture_with_inputs, code, copied


def test_markers_become_what_stood_there(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    shown(module)
    result = ElideDormant()(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    shown(module)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_dormant_model_leaves_the_graph_of_the_plain_model(dynamic: bool) -> None:
    marked = capture(MLP(), torch.randn(2, 4), dynamic=dynamic)
    plain = capture(MLP(marked=False), torch.randn(2, 4), dynamic=dynamic)
    ElideDormant()(marked)
    assert _nodes(marked) == _nodes(plain)
    assert _up_to_names(code(marked)) == _up_to_names(code(plain))


def test_active_sites_stay(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    ElideDormant(frozenset({5}))(module).graph_module.graph.lint()
    assert sites_in(module.graph) == (5,)
    shown(module)


def test_the_node_stays_the_same_with_its_name_and_metadata() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    before = {node: (node.name, dict(node.meta)) for node in module.graph.nodes if is_site(node)}
    assert all("example_value" in meta for _, meta in before.values())
    ElideDormant()(module)
    after = {node: (node.name, dict(node.meta)) for node in module.graph.nodes if node in before}
    assert after == before


def test_the_body_of_a_checkpoint_is_rewritten_in_this_module_alone(shown: Shown) -> None:
    layer = MarkedLinear(4, 4, 2)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(x).relu(), x, use_reentrant=False)

    module, inputs = capture_with_inputs(forward, torch.randn(1, 4))
    copy = copied(module)
    assert ElideDormant()(copy).modified
    copy.graph.lint()
    shown(copy)
    assert (sites_in(copy.graph), sites_in(module.graph)) == ((), (2,))
    torch.testing.assert_close(copy(*inputs), module(*inputs))


def test_a_plain_graph_is_not_touched() -> None:
    module = capture(MLP(marked=False), torch.randn(2, 4))
    before = list(module.graph.nodes)
    result = ElideDormant()(module)
    assert not result.modified
    assert list(module.graph.nodes) == before


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_bit_identical_to_the_plain_model(autocast: bool) -> None:
    model, x = MLP(), torch.randn(3, 4, requires_grad=True)
    plain = MLP(marked=False)
    plain.load_state_dict(model.state_dict())

    def rewrite(module: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        return ElideDormant()(module).graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewrite, fullgraph=True)
    outcomes = []
    for run, parameters in ((compiled, model), (plain, plain)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(x)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), [x, *parameters.parameters()])])
    assert all(torch.equal(left, right) for left, right in zip(*outcomes, strict=True))


def _nodes(module: torch.fx.GraphModule) -> list[tuple[str, object]]:
    return [(node.op, None if node.op == "placeholder" else node.target) for node in module.graph.nodes]


def _up_to_names(text: str) -> str:
    """Names numbered in order of appearance."""
    numbers: dict[str, str] = {}
    return re.sub(r"(?<![\w.])[a-zA-Z_]\w*", lambda match: numbers.setdefault(match[0], f"v{len(numbers)}"), text)
