"""RecordValues: what is recorded where, what other passes make of it, and that nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from esper.artifacts import Blueprint
from esper.torch_internals import fake_inputs, guard_count, pack_graph, unpack_graph
from esper_passes import BatchSeeds, FoldFossils, GraphPass, RecordValues
from tests.passes.batching import Seeds, apply, of_blueprint, with_seeds
from tests.passes.graphs import MLP, MarkedLinear, Shown, capture, code, copied, low_rank_seed, region


class Checkpointed(nn.Module):
    """Site 2 in a checkpoint, in another checkpoint if `nested`, and site 9 behind it."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.first, self.second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
        self.nested = nested

    def forward(self, x: Tensor) -> Any:
        inside = self._inside
        if self.nested:
            inside = partial(checkpoint, inside, use_reentrant=False)
        return self.second(checkpoint(lambda x: inside(x).tanh(), x, use_reentrant=False))

    def _inside(self, x: Tensor) -> Any:
        return self.first(x.relu())


def received(model: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph of `model` as a compile worker receives it: only its placeholders have values, no body has any."""
    return unpack_graph(pack_graph(capture(model, *inputs, dynamic=dynamic)))


def recorded(module: fx.GraphModule) -> str:
    """What is recorded at the nodes of `module` and of the graphs nested in it, in the order of the nodes."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            sizes = ", ".join(map(str, value.shape))
            value = f"{value.dtype}[{sizes}]{' requires grad' if value.requires_grad else ''}".removeprefix("torch.")
        elif isinstance(value, tuple):
            value = f"tuple of {len(value)}"
        lines.append(f"{node.name.replace('l_self_modules_', '').replace('_parameters_', '_')}: {value}")
    for name, body in module.named_children():
        if isinstance(body, fx.GraphModule):
            lines += ["", f"# {name}", recorded(body)]
    return "\n".join(lines)


def with_kernels(module: fx.GraphModule, seeds: Seeds, *passes: GraphPass) -> fx.GraphModule:
    """A copy of `module` with `seeds` in it, after `passes`."""
    alphas = torch.rand(sum(map(len, seeds.values())))
    return apply(with_seeds(module, seeds, alphas), *passes)[0]


def test_a_kernel_in_a_checkpoint(shown: Shown) -> None:
    module = received(Checkpointed(), torch.randn(3, 4))
    module = with_kernels(module, {2: [low_rank_seed(isolate=True)]}, RecordValues())
    shown(recorded(module))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_in_a_worker_bodies_are_batched_as_they_are_in_process(nested: bool, dynamic: bool) -> None:
    model, x = Checkpointed(nested), torch.randn(3, 4)
    blueprints = [Blueprint.low_rank(4, 4, 2, start="kaiming", seed=seed) for seed in range(5)]
    seeds = {site: [of_blueprint(each, isolate=site == 9) for each in blueprints] for site in (2, 9)}
    here, there = capture(model, x, dynamic=dynamic), received(model, x, dynamic=dynamic)
    known = guard_count(fake_inputs(there.graph))
    batched = [code(with_kernels(each, seeds, RecordValues(), BatchSeeds())) for each in (here, there)]
    assert batched[0] == batched[1]
    assert "lerp" not in batched[0]
    assert guard_count(fake_inputs(there.graph)) == known
    assert "lerp" in code(with_kernels(there, seeds, BatchSeeds()))  # not without what is recorded


def test_in_a_worker_a_fossil_in_a_checkpoint_stands_alone(shown: Shown) -> None:
    module = received(Checkpointed(), torch.randn(3, 4))
    seeds = {2: [low_rank_seed() for _ in range(2)]}
    module = with_kernels(module, seeds, RecordValues(), FoldFossils({0: 0.25, 1: 1.0}))
    body = module.get_submodule("wrap_body_0")
    assert isinstance(body, fx.GraphModule)
    shown(body)


def test_a_region_that_is_called_twice(shown: Shown) -> None:
    layer = MarkedLinear(4, 4, 2)
    module = received(lambda x: region(layer, region(layer, x)), torch.randn(3, 4, requires_grad=True))
    module = with_kernels(module, {2: [low_rank_seed()]}, RecordValues())
    shown(re.sub(r"getitem_\d+", "getitem", recorded(module)))  # Dynamo's numbers differ between versions


def test_a_body_is_recorded_in_this_module_alone() -> None:
    module = received(Checkpointed(nested=True), torch.randn(3, 4))
    before, nodes = recorded(module), [node.name for node in module.graph.nodes]
    result = RecordValues()(own := copied(module))
    assert result.graph_module is own
    assert not result.modified
    assert ": None" in before
    assert ": None" not in re.sub(r"wrap_body_\d: None", "", recorded(own))
    assert [node.name for node in own.graph.nodes] == nodes
    assert recorded(module) == before


def test_without_grad_nothing_requires_it_and_the_mode_stays() -> None:
    module = received(Checkpointed(), torch.randn(3, 4))
    with torch.no_grad():
        result, _ = apply(module, RecordValues())
        assert not torch.is_grad_enabled()
    computed = [node for node in result.graph.nodes if node.op == "call_function"]
    assert not any(getattr(node.meta["example_value"], "requires_grad", False) for node in computed)

    def ends_without_grad(x: Tensor) -> Tensor:
        y = x * 2
        torch.set_grad_enabled(False)
        return y + 1

    try:
        module = capture(ends_without_grad, torch.randn(3, requires_grad=True))
    finally:
        torch.set_grad_enabled(True)
    RecordValues()(module)
    assert torch.is_grad_enabled()


def test_bodies_of_other_operators_stay_as_they_are() -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)

    def forward(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: first(x), lambda x: second(x), (x,))

    module = received(forward, torch.randn(3, 4))
    before = dict(module.named_children())
    own, _ = apply(module, RecordValues())
    assert dict(own.named_children()) == before
    assert not any(node.meta for body in before.values() for node in body.graph.nodes)
    output = own.graph.output_node().args[0][0]
    assert output.meta["example_value"].shape == (3, 4)


def test_a_graph_without_values_stays_as_it_is() -> None:
    module = fx.symbolic_trace(MLP(marked=False))
    RecordValues()(module)
    assert not any("example_value" in node.meta for node in module.graph.nodes)


def test_what_dynamo_knows_of_data_dependent_sizes_is_kept() -> None:
    layer = MarkedLinear(4, 4, 3)

    def forward(x: Tensor, mask: Tensor) -> Any:
        return layer(x[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        module = capture(forward, torch.randn(3, 4), torch.tensor([True, False, True]))
    before = recorded(module)
    own, _ = apply(module, RecordValues())
    assert recorded(own).count("[u") == before.count("[u") > 0
