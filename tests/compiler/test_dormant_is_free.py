"""Law 1: with no active seed, what reaches the inner compiler is the host's graph."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters

import esper
from esper.logs import SayOnce
from tests.models import TransformerBlock, mlp, small_transformer

TARGETS: list[Any] = [None, TransformerBlock, [TransformerBlock, nn.LayerNorm, nn.Linear]]
"""Linear layers, blocks, and sites inside of sites."""


@pytest.fixture
def empty_inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    """Inductor's FX-graph cache, empty; the cache above it, which works on Dynamo's graphs, out of the way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        counters.clear()
        yield


def _train_once(model: nn.Module, backend: str, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch._dynamo.reset()
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    parameters = list(model.parameters())
    return output.detach(), list(torch.autograd.grad(output.square().sum(), parameters))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"), [("mlp", None), ("transformer", None), ("transformer", [TransformerBlock, nn.Linear])]
)
def test_the_wrapped_model_hits_the_cache_entries_of_the_plain_one(
    kind: str, targets: Any, empty_inductor_cache: None
) -> None:
    host, shape = {"mlp": (mlp(8, 16, 4), (6, 8)), "transformer": (small_transformer(blocks=1), (2, 5, 16))}[kind]
    x = torch.randn(shape)
    plain_output, plain_gradients = _train_once(host, "inductor", x)
    written = counters["inductor"]["fxgraph_cache_miss"]
    assert written == 2  # forward and backward
    counters.clear()

    output, gradients = _train_once(esper.wrap(host, targets), "esper", x)

    assert counters["inductor"]["fxgraph_cache_hit"] == written
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert torch.equal(output, plain_output)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, plain_gradients, strict=True))


class Recorder:
    """An inner compiler that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: object) -> object:
        self.graphs.append(copy.deepcopy(module))
        return module.forward


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("mode", ["fx", "module"])
def test_the_inner_compiler_sees_the_operations_of_the_host_in_their_order(
    mode: str, targets: Any, fresh_dynamo: None
) -> None:
    host, x = small_transformer(), torch.randn(2, 5, 16)
    plain, ours = Recorder(), Recorder()
    torch.compile(host, backend=plain, fullgraph=True)(x)
    model = esper.wrap(host, targets, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    torch.compile(model, backend="esper", options={"inner": ours}, fullgraph=True)(x)

    def shape_of(module: fx.GraphModule) -> list[tuple[str, str, int]]:
        return [
            (node.op, "" if node.op in ("placeholder", "output") else str(node.target), len(node.all_input_nodes))
            for node in module.graph.nodes
        ]

    (plain_graph,), (our_graph,) = plain.graphs, ours.graphs
    assert shape_of(our_graph) == shape_of(plain_graph)
    assert all(
        node.meta.get("example_value") is not None for node in our_graph.graph.nodes if node.op == "call_function"
    )


@pytest.mark.parametrize("mode", ["fx", "module"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("grad", [True, False])
def test_eager_outputs_and_gradients_are_bit_identical(mode: str, targets: Any, grad: bool) -> None:
    host, x = small_transformer(), torch.randn(2, 5, 16)
    wrapped = esper.wrap(host, targets, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    with torch.set_grad_enabled(grad):
        expected, output = host(x), wrapped(x)
        assert torch.equal(output, expected)
        if grad:
            parameters = list(host.parameters())
            theirs = torch.autograd.grad(expected.sum(), parameters)
            ours = torch.autograd.grad(output.sum(), parameters)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_plain_model_compiles_as_under_the_inner_compiler_and_is_told_so(
    fresh_dynamo: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.compiler.backend._say_once", SayOnce(logging.getLogger("esper.compiler")))
    host, x = mlp(4, 6, 2), torch.randn(3, 4)
    recorder = Recorder()
    compiled = torch.compile(host, backend="esper", options={"inner": recorder})
    assert torch.equal(compiled(x), host(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(host, backend="esper", options={"inner": recorder})(x), host(x))
    assert len(recorder.graphs) == 2
    said = [record for record in caplog.records if record.name.startswith("esper") and "no sites" in record.message]
    assert len(said) == 1


def test_compiling_a_wrapped_model_leaves_no_mark_on_what_was_traced(
    fresh_dynamo: None, recwarn: pytest.WarningsRecorder
) -> None:
    host, x = mlp(4, 6, 2), torch.randn(3, 4)
    model = esper.wrap(host)
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    compiled(x)
    assert torch.equal(model.eval()(x), host(x))
    assert torch.equal(compiled(x), host(x))
    assert not [warning for warning in recwarn if "attributes" in str(warning.message)]
