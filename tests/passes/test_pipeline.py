"""Pipeline and the callbacks that verify, dump and time its passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper_passes import (
    CallKernels,
    DumpGraphs,
    ElideDormant,
    ExpandModules,
    GraphPass,
    InlineKernels,
    LowerFunctional,
    PassError,
    PassEvent,
    PassResult,
    Pipeline,
    RewriteSites,
    Timings,
    chain,
    sites_in,
    verify,
)
from tests.passes.graphs import MLP, MarkedLinear, capture, low_rank


@dataclass(frozen=True)
class _Edit:
    """A pass that edits the graph in whatever way the test wants."""

    edit: Callable[[fx.GraphModule], Any]
    name: str = "edit"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.edit(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, True)


def _node(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def _raise(_: fx.GraphModule) -> None:
    raise KeyError("missing")


def test_passes_run_in_order_and_each_is_reported() -> None:
    events: list[PassEvent] = []
    module = capture(MLP(), torch.randn(2, 4))
    passes = (InlineKernels({3: (low_rank(),)}), ElideDormant(), ElideDormant())
    result = Pipeline(passes, events.append)(module)
    assert result.modified
    assert result.graph_module is module
    assert [(event.index, event.graph_pass, event.modified) for event in events] == [
        (0, passes[0], True),
        (1, passes[1], True),
        (2, passes[2], False),
    ]
    assert all(event.before is None and event.seconds >= 0 for event in events)


def test_a_pipeline_that_changes_nothing_says_so_and_is_a_pass_itself() -> None:
    module = capture(MLP(marked=False), torch.randn(2, 4))
    inner = Pipeline((ElideDormant(), InlineKernels({})))
    outer: GraphPass = Pipeline((inner,))
    assert not outer(module).modified
    assert outer.name == "pipeline(pipeline(elide_dormant, inline_kernels))"


@pytest.mark.parametrize(
    "graph_pass",
    [
        RewriteSites({}),
        ElideDormant(),
        InlineKernels({}),
        CallKernels({}, torch.zeros),
        ExpandModules(),
        LowerFunctional(),
        Pipeline(()),
    ],
    ids=lambda graph_pass: graph_pass.name,
)
def test_passes_are_values(graph_pass: GraphPass) -> None:
    assert graph_pass == type(graph_pass)(*(getattr(graph_pass, each.name) for each in fields(graph_pass)))  # type: ignore[arg-type]  # all are dataclasses
    with pytest.raises(FrozenInstanceError):
        graph_pass.extra = 1  # type: ignore[attr-defined]  # this is what must fail


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    module = capture(MLP(), torch.randn(2, 4))
    with pytest.raises(PassError) as raised:
        Pipeline((ElideDormant(), InlineKernels({}), _Edit(_raise, "break_it")))(module)
    assert (
        str(raised.value) == "pass 'break_it' failed after elide_dormant, inline_kernels had run: KeyError: 'missing'"
    )
    assert isinstance(raised.value.__cause__, KeyError)
    assert (raised.value.pass_name, raised.value.ran_before) == ("break_it", ("elide_dormant", "inline_kernels"))


def test_verify_refuses_a_graph_in_the_wrong_order() -> None:
    def edit(module: fx.GraphModule) -> None:
        nodes = list(module.graph.nodes)
        nodes[-2].append(nodes[-3])

    with pytest.raises(PassError, match=r"used before it has been defined") as raised:
        Pipeline((ElideDormant(), _Edit(edit)), verify)(capture(MLP(), torch.randn(2, 4)))
    assert raised.value.ran_before == ("elide_dormant",)


def test_verify_looks_into_nested_graphs() -> None:
    def edit(module: fx.GraphModule) -> None:
        nodes = list(module.get_submodule("wrap_body_0").graph.nodes)
        nodes[-2].append(nodes[-3])

    layer = MarkedLinear(4, 4, 2)
    module = capture(lambda x: checkpoint(lambda x: layer(x).relu(), x, use_reentrant=False), torch.randn(2, 4))
    with pytest.raises(PassError, match=r"used before it has been defined"):
        Pipeline((_Edit(edit),), verify)(module)


@pytest.mark.parametrize("dynamic", [False, True])
def test_verify_refuses_a_node_that_computes_another_shape_than_recorded(dynamic: bool) -> None:
    def transpose(module: fx.GraphModule) -> None:
        relu = _node(module, "relu")
        relu.target, relu.args, relu.op = torch.t, relu.args, "call_function"

    module = capture(MLP(), torch.randn(3, 4), dynamic=dynamic)
    with pytest.raises(PassError, match=r"node 'relu' computes \['torch.float32\[6, .*but its metadata says"):
        Pipeline((_Edit(transpose),), verify)(module)


def test_verify_refuses_a_node_that_computes_another_dtype_than_recorded() -> None:
    def to_double(module: fx.GraphModule) -> None:
        _node(module, "relu").target = "double"

    with pytest.raises(PassError, match=r"torch.float64.*metadata says.*torch.float32"):
        Pipeline((_Edit(to_double),), verify)(capture(MLP(), torch.randn(3, 4)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_verify_accepts_every_pass_and_adds_no_guard(dynamic: bool) -> None:
    layer = MarkedLinear(4, 4, 2)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = layer(x)
        with torch.no_grad():
            y = layer(x.float())
        y = y + checkpoint(layer, x.float(), use_reentrant=False)
        return y[y > 0].sum() + x.sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        module = capture(forward, torch.randn(3, 4), dynamic=dynamic)
    fake = next(node.meta["example_value"] for node in module.graph.nodes if "weight" in node.name)
    guards = len(fake.fake_mode.shape_env.guards)
    seeds = {2: (low_rank(), low_rank(uses_host=True, isolate=True))}
    Pipeline((InlineKernels(seeds), ElideDormant(), LowerFunctional()), verify)(module)
    assert sites_in(module.graph) == ()
    assert len(fake.fake_mode.shape_env.guards) == guards
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_verify_without_recorded_values_still_lints() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    Pipeline((RewriteSites({"0": 1}), ExpandModules(), ElideDormant()), verify)(module)

    def dangle(module: fx.GraphModule) -> None:
        _node(module, "relu").args = (fx.Graph().placeholder("x"),)

    with pytest.raises(PassError, match="does not belong to this Graph"):
        Pipeline((_Edit(dangle),), verify)(module)


def test_dumps_are_numbered_and_show_before_and_after(tmp_path: Path) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    Pipeline((InlineKernels({3: (low_rank(),)}), ElideDormant()), DumpGraphs(tmp_path / "graphs"))(module)
    files = sorted((tmp_path / "graphs").iterdir())
    assert [file.name for file in files] == [
        "00_inline_kernels.after.py",
        "00_inline_kernels.before.py",
        "01_elide_dormant.after.py",
        "01_elide_dormant.before.py",
    ]
    texts = {file.name[3:]: file.read_text() for file in files}
    assert "esper_3_0_a" not in texts["inline_kernels.before.py"]
    assert "esper_3_0_a" in texts["inline_kernels.after.py"]
    assert texts["inline_kernels.after.py"] == texts["elide_dormant.before.py"]
    assert "esper.enter" in texts["elide_dormant.before.py"]
    assert "esper.enter" not in texts["elide_dormant.after.py"]
    compile(texts["elide_dormant.after.py"], "after.py", "exec")


def test_timings_add_up_by_name() -> None:
    timings = Timings()
    for _ in range(2):
        Pipeline((InlineKernels({}), ElideDormant()), timings)(capture(MLP(), torch.randn(2, 4)))
    assert list(timings.seconds) == ["inline_kernels", "elide_dormant"]
    assert timings.seconds["elide_dormant"] > 0
    assert [line.split()[0] for line in str(timings).splitlines()] == ["inline_kernels", "elide_dormant"]


def test_chained_callbacks_all_see_the_event_and_get_what_any_of_them_asked_for(tmp_path: Path) -> None:
    events: list[PassEvent] = []
    module = capture(MLP(), torch.randn(2, 4))
    Pipeline((ElideDormant(),), chain(verify, events.append, DumpGraphs(tmp_path)))(module)
    (event,) = events
    assert event.before is not None
    assert event.before == (tmp_path / "00_elide_dormant.before.py").read_text()
