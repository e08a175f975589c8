"""LowerFunctional: the graph before and after, and bit-identical results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from esper_passes import LowerFunctional
from tests.passes.graphs import Shown


def _traced(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.GraphModule(nn.Module(), fx.Tracer().trace(function))


def test_wrappers_become_the_built_in_that_they_end_in(shown: Shown) -> None:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = F.layer_norm(x, (8,), weight, bias=bias)
        x = F.silu(F.relu(x)) * F.leaky_relu(x, 0.2)
        x = F.dropout(x, 0.1, training=False)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return F.softmax(x, dim=-1)

    module = _traced(forward)
    shown(module)
    names = [node.name for node in module.graph.nodes]
    result = LowerFunctional()(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    assert [node.name for node in module.graph.nodes] == names
    shown(module)


_LOWERED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x, inplace=False),
    "silu": lambda x: F.silu(input=x),
    "mish": lambda x: F.mish(x),
    "hardswish": lambda x: F.hardswish(x),
    "selu": lambda x: F.selu(x),
    "celu": lambda x: F.celu(x, alpha=0.5),
    "leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu": lambda x: F.elu(x, 0.7),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, max_val=0.25),
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (5, 8), eps=1e-3),
    "rms_norm": lambda x: F.rms_norm(x, [8], x[0, 0]),
    "embedding": lambda x: F.embedding(x.detach().argmax(1), x[0]),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in eval": lambda x: F.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("function", _LOWERED.values(), ids=_LOWERED)
def test_outputs_and_gradients_are_bit_identical(function: Callable[[Tensor], Tensor], autocast: bool) -> None:
    module = _traced(function)
    assert LowerFunctional()(module).modified
    x = torch.randn(2, 5, 8, requires_grad=True)
    outcomes = []
    for run in (function, module):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(x)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), [x])])
    assert all(torch.equal(left, right) for left, right in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x, inplace=True),
        lambda x: F.leaky_relu(x, 0.1, True),
        lambda x: F.softmax(x),
        lambda x: F.softmax(x, -1, dtype=torch.double),
        lambda x: F.hardtanh(x, 1.0, -1.0),
        lambda x: F.dropout(x, 0.5, inplace=True),
        lambda x: F.dropout(x, x.mean()),
        lambda x: F.dropout(x, 1.5),
        lambda x: F.embedding(x, x, padding_idx=0),
        lambda x: F.embedding(x, x, max_norm=1.0),
        lambda x: F.gelu(x) + torch.relu(x),
        lambda x: F.normalize(x),
    ],
)
def test_other_forms_stay_as_they_are(function: Callable[[Tensor], Tensor]) -> None:
    module = _traced(function)
    before = [(node.target, node.args, node.kwargs) for node in module.graph.nodes]
    assert not LowerFunctional()(module).modified
    assert [(node.target, node.args, node.kwargs) for node in module.graph.nodes] == before


def test_metadata_stays() -> None:
    module = _traced(lambda x: F.relu(x))
    node = next(node for node in module.graph.nodes if node.target is F.relu)
    node.meta["stack_trace"] = "here"
    LowerFunctional()(module)
    assert node.target is torch.relu
    assert node.meta == {"stack_trace": "here"}
