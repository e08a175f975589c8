"""One test for each private torch API: when torch changes, the test's name says which assumption broke."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from esper import torch_internals


def test_the_backend_being_traced_is_found_through_dynamos_wrappers(fresh_dynamo: None) -> None:
    seen = []

    @torch_internals.constant_while_tracing
    def ask() -> bool:
        seen.append(torch_internals.backend_being_traced(lambda backend: backend is ours))
        return seen[-1]

    def ours(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    def theirs(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ask() else x - 1

    x = torch.zeros(2)
    assert torch.compile(function, backend=ours)(x).tolist() == [1, 1]
    torch._dynamo.reset()
    assert torch.compile(function, backend=theirs)(x).tolist() == [-1, -1]
    assert seen == [True, False]


def test_outside_of_tracing_no_backend_is_recognised() -> None:
    assert not torch_internals.backend_being_traced(lambda backend: True)


def test_a_backward_is_noticed_on_the_thread_that_runs_it() -> None:
    seen: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch_internals.inside_backward())
            return gradient

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [True]
    assert not torch_internals.inside_backward()


def _captured(dynamic: bool) -> tuple[fx.GraphModule, list[Any]]:
    caught: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        copied = torch_internals.copy_for_recompile(module)
        caught.append((copied, torch_internals.fake_inputs(copied.graph)))
        return module.forward

    layer = nn.Linear(4, 3)
    torch.compile(layer, backend=backend, dynamic=dynamic)(torch.randn(5, 4))
    return caught[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_a_copied_graph_compiles_again_outside_of_dynamo(dynamic: bool, fresh_dynamo: None) -> None:
    module, inputs = _captured(dynamic)
    assert not any("grapharg" in node.meta for node in module.graph.nodes)
    guards = torch_internals.guard_count(inputs)
    with torch_internals.recompile_context(inputs, module):
        compiled = torch_internals.compile_with_inductor(module, inputs, None)
    holds = torch_internals.assumptions_since(inputs, guards)
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    for rows in (5, 7) if dynamic else (5,):
        x = torch.randn(rows, 4)
        order = {"weight": weight, "bias": bias}
        arguments = [
            next((value for key, value in order.items() if key in node.name), rows if node.name[0] == "s" else x)
            for node in module.graph.nodes
            if node.op == "placeholder"
        ]
        assert holds is None or holds(*arguments)
        (output,) = compiled(*arguments)
        torch.testing.assert_close(output, x @ weight.T + bias)
        output.sum().backward()


def test_an_assumption_about_a_symbolic_size_is_checked_on_the_real_one(fresh_dynamo: None) -> None:
    _, inputs = _captured(dynamic=True)
    (size,) = (value for value in inputs if isinstance(value, torch.SymInt))
    guards = torch_internals.guard_count(inputs)
    assert torch_internals.assumptions_since(inputs, guards) is None
    assert size < 100  # the shape environment notes what it was asked
    holds = torch_internals.assumptions_since(inputs, guards)
    assert holds is not None
    position = next(index for index, value in enumerate(inputs) if value is size)
    assert holds(*[7 if index == position else None for index in range(len(inputs))])
    assert not holds(*[100 if index == position else None for index in range(len(inputs))])


def test_fake_tensors_join_the_mode_of_the_graph(fresh_dynamo: None) -> None:
    _, inputs = _captured(dynamic=False)
    (fake,) = torch_internals.fake_like([torch.ones(2, 3)], among=inputs)
    assert fake.shape == (2, 3)
    assert fake.fake_mode is next(each for each in inputs if isinstance(each, torch.Tensor)).fake_mode  # type: ignore[attr-defined]


def test_modes_have_inductor_options() -> None:
    assert torch_internals.inductor_mode_options("reduce-overhead") == {"triton.cudagraphs": True}


@pytest.mark.slow
def test_compiled_code_survives_serialisation_for_any_number_of_rows() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((graph.call_function(torch._C._nn.linear, (x, weight)),))
    examples = [torch.zeros(8, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)]
    data = torch_internals.serialise_compiled(fx.GraphModule(nn.Module(), graph), examples, dynamic=[0])
    compiled = torch_internals.deserialise_compiled(data)
    for rows in (2, 9):
        x_value = torch.randn(rows, 4, requires_grad=True)
        w_value = torch.randn(3, 4, requires_grad=True)
        (output,) = compiled(x_value, w_value)
        torch.testing.assert_close(output, x_value @ w_value.T)
        gradients = torch.autograd.grad(output.sum(), [x_value, w_value])
        expected = torch.autograd.grad((x_value @ w_value.T).sum(), [x_value, w_value])
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
