"""ExpandModules: the graph before and after, and bit-identical results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

from esper_passes import ExpandModules
from tests.passes.graphs import Shown


class _Own(nn.ReLU):
    """A subclass, whose forward may be anything."""


def _traced(*modules: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*modules))


def _calls(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


def test_plain_modules_become_the_call_in_their_forward(shown: Shown) -> None:
    module = _traced(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.GELU("tanh"),
        nn.Dropout(0.1),
        nn.Identity(),
        nn.Linear(6, 4, bias=False),
        nn.ReLU(),
        nn.RMSNorm(4, eps=1e-6),
        nn.Softmax(dim=-1),
        nn.Flatten(),
    )
    shown(module)
    result = ExpandModules()(module)
    result.graph_module.graph.lint()
    assert result.graph_module is module
    assert result.modified
    shown(module)


def test_layers_that_read_images_and_tokens(shown: Shown) -> None:
    module = _traced(nn.Embedding(10, 8, padding_idx=3), nn.Conv1d(5, 6, 3, padding="same"), nn.SiLU())
    ExpandModules()(module).graph_module.graph.lint()
    shown(module)


_FLOATS = [
    nn.Linear(8, 8),
    nn.Linear(8, 8, bias=False),
    nn.LayerNorm(8),
    nn.LayerNorm((5, 8), eps=1e-3, bias=False),
    nn.LayerNorm(8, elementwise_affine=False),
    nn.RMSNorm(8),
    nn.RMSNorm(8, elementwise_affine=False),
    nn.ReLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.LeakyReLU(0.2),
    nn.ELU(0.7),
    nn.Hardtanh(-0.5, 0.25),
    nn.ReLU6(),
    nn.Softplus(2.0, 1.0),
    nn.Softmax(dim=1),
    nn.LogSoftmax(dim=-1),
    nn.Flatten(0, 1),
    nn.Conv1d(5, 10, 3, stride=2, padding=1, dilation=2, groups=5),
    nn.Conv1d(5, 4, 3, padding="same", bias=False),
    nn.Conv2d(3, 6, (3, 2), padding=1),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("layer", _FLOATS, ids=str)
def test_outputs_and_gradients_are_bit_identical(layer: nn.Module, autocast: bool) -> None:
    shape = (2, 3, 5, 8) if isinstance(layer, nn.Conv2d) else (2, 5, 8)
    inputs = [torch.randn(shape) for _ in range(2)]
    outcomes = []
    module = _traced(copy.deepcopy(layer))
    assert ExpandModules()(module).modified
    assert not _calls(module)
    for run in (nn.Sequential(layer), module):
        given = [each.clone().requires_grad_() for each in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [run(each) for each in given]
        leaves = [*given, *run.parameters()]
        outcomes.append([*outputs, *torch.autograd.grad(sum(each.square().sum() for each in outputs), leaves)])
    assert all(torch.equal(left, right) for left, right in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 0}, {"padding_idx": -2}, {"scale_grad_by_freq": True}], ids=str
)
def test_embeddings_are_bit_identical(options: dict[str, int]) -> None:
    layer, tokens = nn.Embedding(10, 4, **options), torch.tensor([[0, 3, 8], [8, 8, 0]])
    module = _traced(layer)
    assert ExpandModules()(module).modified
    outcomes = [(run(tokens), *torch.autograd.grad(run(tokens).sum(), [layer.weight])) for run in (layer, module)]
    assert all(torch.equal(left, right) for left, right in zip(*outcomes, strict=True))


def _hooked() -> nn.Module:
    layer = nn.Tanh()
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def _with_own_forward() -> nn.Module:
    layer = nn.Tanh()
    layer.forward = torch.sin  # type: ignore[method-assign]  # as monkey-patching users do
    return layer


def _pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(inplace=True),
        nn.LeakyReLU(inplace=True),
        nn.Softmax(),
        nn.Dropout(),
        nn.BatchNorm1d(4),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Embedding(4, 4, max_norm=1.0),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        _pruned(),
        _hooked(),
        _with_own_forward(),
        _Own(),
    ],
    ids=str,
)
def test_what_is_not_plain_stays_a_module(layer: nn.Module) -> None:
    module = _traced(layer)
    before = list(module.graph.nodes)
    assert not ExpandModules()(module).modified
    assert list(module.graph.nodes) == before


def test_parameters_that_are_replaced_later_are_seen() -> None:
    module, x = _traced(nn.Linear(4, 2)), torch.randn(3, 4)
    ExpandModules()(module)
    layer = module.get_submodule("0")
    layer.weight = nn.Parameter(torch.zeros(2, 4))
    assert torch.equal(module(x), layer(x))


def test_a_module_whose_input_is_the_result_keeps_the_graph_whole() -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.identity(x)

    module, x = fx.symbolic_trace(Passes()), torch.randn(2)
    ExpandModules()(module).graph_module.graph.lint()
    assert module(x) is x


def test_metadata_goes_to_the_call() -> None:
    module = _traced(nn.Tanh())
    next(node for node in module.graph.nodes if node.op == "call_module").meta["stack_trace"] = "here"
    ExpandModules()(module)
    assert next(node for node in module.graph.nodes if node.target is torch.tanh).meta["stack_trace"] == "here"
