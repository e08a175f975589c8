"""Graphs for the tests of passes: how they are captured, how they are shown, and what they ought to compute."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch.nn import functional

from esper_passes import SITE, SeedGraph

__all__ = [
    "MLP",
    "MarkedBlock",
    "MarkedLinear",
    "ReferenceSeed",
    "Shown",
    "assert_backpropagated",
    "capture",
    "capture_with_inputs",
    "code",
    "copied",
    "low_rank",
    "low_rank_seed",
    "low_rank_values",
    "reference",
    "region",
    "run_low_rank",
    "through_aot",
]


Shown = Callable[[fx.GraphModule | str], None]
"""Compares a graph with the one that is expected; see `conftest.py`."""


class MarkedLinear(nn.Linear):
    """A linear layer that calls the site marker instead."""

    def __init__(self, in_features: int, out_features: int, site: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = SITE(x, self.weight, self.bias, self.site)
        return marked


class MLP(nn.Module):
    """Two linear layers, the second without bias; as markers 3 and 5 if `marked`, in a model that is runtime 7."""

    def __init__(self, marked: bool = True) -> None:
        super().__init__()
        self.up: nn.Linear = MarkedLinear(4, 6, 3) if marked else nn.Linear(4, 6)
        self.down: nn.Linear = MarkedLinear(6, 4, 5, bias=False) if marked else nn.Linear(6, 4, bias=False)
        self.marked = marked

    def forward(self, x: Tensor) -> Tensor:
        if self.marked:
            torch.ops.esper.enter(7)
        return self.down(self.up(x).relu())


class MarkedBlock(nn.Module):
    """A linear layer and what an `operation` makes of its output, a block with the marker of a module behind it."""

    def __init__(self, site: int, operation: Callable[[Tensor], Tensor] = torch.relu, marked: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.site, self.operation, self.marked = site, operation, marked

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.inner(x))
        return torch.ops.esper.module_site(x, y, self.site) if self.marked else y


@torch.compiler.nested_compile_region
def region(layer: nn.Module, x: Tensor) -> Any:
    """A layer and a ReLU, in a graph of their own that calls with one layer share."""
    return layer(x).relu()


def capture_with_inputs(
    model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None
) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo captures of `model`, and the inputs that it gives it."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append((module, example_inputs))

        def run(*arguments: Any) -> Any:
            captured[-1] = (module, list(arguments))
            raise _CapturedError

        return run

    torch._dynamo.reset()
    with contextlib.suppress(_CapturedError):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (result,) = captured
    return result


def capture(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """The one graph that Dynamo captures of `model`."""
    return capture_with_inputs(model, *inputs, dynamic=dynamic)[0]


class _CapturedError(Exception):
    """Stops a run once its graph is known."""


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own: Dynamo goes on using the placeholders of the one that it hands out."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def code(module: fx.GraphModule) -> str:
    """The generated code of `module` and of the graphs nested in it, short enough to read.

    Left out are type annotations, the `x = None` that free memory, and what Dynamo puts around names.
    """
    text = module.graph.python_code("self").src
    lines = []
    for line in text.splitlines():
        line = re.sub(r"\s*;\s*\w+( = \w+)* = None.*$", "", line)
        if line.startswith("def "):
            line = re.sub(r" ?: ?[\w.\[\], ]+?(?=[,)] ?)", "", line)
            line = re.sub(r"\) -> [^:]+:", "):", line)
        line = re.sub(r"[Ll]_(?:self_modules_|self_|)(\w+?)_(?=\W|$)", r"\1", line)
        line = re.sub(r"(\w+)_parameters_(\w+)", r"\1_\2", line)
        if line.strip() and not re.fullmatch(r"\s*(\w+) = \1", line):
            lines += textwrap.wrap(line, 110, subsequent_indent=" " * 8, break_long_words=False)
    for name, body in module.named_children():
        if isinstance(body, fx.GraphModule):
            lines += ["", f"# {name}", code(body)]
    return "\n".join(lines)


def through_aot(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
) -> tuple[Tensor, list[str]]:
    """Run `module` through AOTAutograd; its one output, backpropagated, and the code of the graphs it compiles."""
    graphs: list[str] = []

    def compiler(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(code(graph))
        return graph.forward

    (output,) = aot_function(module, compiler, compiler, partition_fn=partition)(*inputs)
    output.sum().backward()
    return output, graphs


def low_rank(uses_host: bool = False, isolate: bool = False) -> SeedGraph:
    """A kernel `gelu(x A^T) B^T + c`, plus the host's output if `uses_host`."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    host = graph.placeholder("host") if uses_host else None
    a, b, c = (graph.placeholder(name) for name in ("a", "b", "c"))
    hidden = graph.call_function(functional.gelu, (graph.call_function(functional.linear, (x, a)),))
    output = graph.call_function(functional.linear, (hidden, b, c))
    if host is not None:
        output = graph.call_function(torch.add, (host, output))
    graph.output(output)
    return SeedGraph(graph, ("a", "b", "c"), uses_host, isolate)


def low_rank_values(
    in_features: int, out_features: int, rank: int = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Random values for the parameters of :func:`low_rank`, in order; leaves that require grad."""
    shapes = ((rank, in_features), (out_features, rank), (out_features,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def low_rank_seed(**flags: bool) -> tuple[SeedGraph, list[Tensor]]:
    """A seed with a :func:`low_rank` kernel of 4 to 4 features, and random values for its parameters."""
    return low_rank(**flags), low_rank_values(4, 4)


def run_low_rank(parameters: Sequence[Tensor], x: Tensor, host: Tensor | None = None) -> Tensor:
    """What :func:`low_rank` computes, in plain PyTorch."""
    a, b, c = parameters
    output = functional.gelu(x @ a.T) @ b.T + c
    return output if host is None else host + output


@dataclass(frozen=True)
class ReferenceSeed:
    """A :func:`low_rank` kernel at a site, as the reference takes it."""

    parameters: Sequence[Tensor]
    alpha: float
    uses_host: bool = False
    isolate: bool = False


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Sequence[ReferenceSeed]) -> Tensor:
    """`y = x W^T + b`, then for each seed `y = a K(x, y) + (1 - a) y`. For float64 tensors."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    for seed in seeds:
        given = [x, y] if seed.uses_host else [x]
        if seed.isolate:
            given = [value.detach() for value in given]
        y = seed.alpha * run_low_rank(seed.parameters, *given) + (1 - seed.alpha) * y
    return y


def assert_backpropagated(output: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    """`output` is `expected`, and the gradients that `leaves` have are those of the sum of `expected`."""
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(torch.autograd.grad(expected.sum(), leaves)))
