# ruff: noqa: E501  # what is expected is printed as torch prints it
"""The graph of a small model: as it was traced, and as passes make it for a plan."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import TestCase
from torch import nn

from esper.execution.kasmina_layer import KasminaLayer
from tests.core.seeds import blueprint, load
from tests.eager.hosts import Attention, fx_wrapped, source
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def lines(graph_module: Any) -> str:
    """The graph, without what torch says about stack traces."""
    text = graph_module.print_readable(print_output=False)
    kept = [line.rstrip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return "\n".join(kept)


class TestGraphs(TestCase):
    maxDiff = None

    def test_a_traced_model_shows_its_sites(self) -> None:
        model = fx_wrapped(mlp(8, 6, 4))
        self.assertExpectedInline(
            lines(model.graph_module),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, input):
        input_1 = input
        _0 = getattr(self, "0")(input_1);  input_1 = None
        _1 = getattr(self, "1")(_0);  _0 = None
        _2 = getattr(self, "2")(_1);  _1 = None
        return _2""",
        )
        assert isinstance(model.graph_module.get_submodule("0"), KasminaLayer)

    def test_a_dormant_model_runs_plain_calls(self) -> None:
        model = fx_wrapped(mlp(8, 6, 4))
        model(torch.randn(3, 8))
        self.assertExpectedInline(
            source(model).rstrip(),
            """\
def forward(input):
    if hooks or hooks_1 or hooks_2 or hooks_3 or 'forward' in own or 'forward' in own_1 or 'forward' in own_2 or not isinstance(input, Tensor):
        return otherwise(input)
    try:
        v_0_weight = p['weight']
        v_0_bias = p['bias']
        v_2_weight = p_1['weight']
        v_2_bias = p_1['bias']
    except KeyError:
        return otherwise(input)
    first()
    site_default = linear(input, v_0_weight, v_0_bias); del input
    relu_1 = relu(site_default); del site_default
    site_default_1 = linear(relu_1, v_2_weight, v_2_bias); del relu_1
    return site_default_1""",
        )

    def test_optional_arguments_are_constants(self) -> None:
        model = fx_wrapped(Attention().eval())
        self.assertExpectedInline(
            lines(model.graph_module),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, x):
        getattr_1 = x.shape
        getitem = getattr_1[0]
        getitem_1 = getattr_1[1]
        getitem_2 = getattr_1[2];  getattr_1 = None
        qkv = self.qkv(x);  x = None
        floordiv = getitem_2 // 4
        view = qkv.view(getitem, getitem_1, 3, 4, floordiv);  qkv = floordiv = None
        permute = view.permute(2, 0, 3, 1, 4);  view = None
        getitem_3 = permute[0]
        getitem_4 = permute[1]
        getitem_5 = permute[2];  permute = None
        transpose = getitem_4.transpose(-2, -1)
        matmul = getitem_3 @ transpose;  getitem_3 = transpose = None
        mul = matmul * 1.0;  matmul = None
        size = getitem_4.size(-1);  getitem_4 = None
        pow_1 = size ** 0.5;  size = None
        truediv = mul / pow_1;  mul = pow_1 = None
        softmax = truediv.softmax(-1);  truediv = None
        dropout = torch.nn.functional.dropout(softmax, p = 0.25, training = False, inplace = False);  softmax = None
        matmul_1 = dropout @ getitem_5;  dropout = getitem_5 = None
        transpose_1 = matmul_1.transpose(1, 2);  matmul_1 = None
        reshape = transpose_1.reshape(getitem, getitem_1, getitem_2);  transpose_1 = getitem = getitem_1 = getitem_2 = None
        out = self.out(reshape);  reshape = None
        return out""",
        )

    def test_containers_are_inlined(self) -> None:
        model = fx_wrapped(nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5)), nn.Linear(6, 4)))
        self.assertExpectedInline(
            lines(model.graph_module),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, input):
        input_1 = input
        _0_0 = getattr(getattr(self, "0"), "0")(input_1);  input_1 = None
        _0_1 = getattr(getattr(self, "0"), "1")(_0_0);  _0_0 = None
        _1 = getattr(self, "1")(_0_1);  _0_1 = None
        return _1""",
        )


def test_a_kernel_in_force_is_in_the_code(shelf: KernelShelf) -> None:
    model = fx_wrapped(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 1, shelf.put(blueprint()).id, alpha=0.5)
    traced = model.graph_module
    model(torch.randn(3, 8))
    code = [line.split(" = ")[1].split("(")[0] for line in source(model).splitlines() if " = " in line]
    assert code[:4] == ["p['weight']", "p['bias']", "p_1['weight']", "p_1['bias']"]
    assert code.count("lerp") == 1
    assert code.count("linear") == 2
    assert code.index("linear") < code.index("lerp") < len(code) - 1
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    assert model.unload_kernel("0", 1)
    model(torch.randn(3, 8))
    assert "lerp" not in source(model)
