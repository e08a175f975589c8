"""`RecordValues`: every value of a graph is computed on fake tensors, for the passes that ask what values are like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from esper_passes._fake_mode import mode_of, undisturbed
from esper_passes._subgraphs import FLAT_OPERANDS, copy_body, subgraphs
from esper_passes.base import PassResult

__all__ = ["RecordValues"]


@dataclass(frozen=True)
class RecordValues:
    """Record at every node what it computes, as `meta["example_value"]`, given what is recorded at the placeholders.

    Those of the outer graph all need a fake value, in the mode of the first; a graph without any stays as it is. A
    graph nested in it is given the values of the operands of its first call, if it belongs to an activation checkpoint,
    `wrap` or `invoke_subgraph`, and is left alone in any other operator. Values know whether they require grad, and
    have no other part of autograd's graph. No guard on a size is added.
    """

    name: ClassVar[str] = "record_values"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        _record(graph_module)
        return PassResult(graph_module, False)


def _record(module: fx.GraphModule) -> None:
    graph = module.graph
    given = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
    mode = mode_of(given)
    if mode is None:
        return
    inside = list(_copied_bodies(module))
    kept = {node: {key: value for key, value in node.meta.items() if key != "val"} for node in graph.nodes}
    with undisturbed(mode):
        _Propagation(module, mode).propagate_dont_convert_inputs(*given)
    for node in graph.nodes:
        value, node.meta = node.meta.get("val"), kept[node]
        if value is not None and node.op != "placeholder":
            node.meta["example_value"] = value
    for call, body in inside:
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        operands = call.args[len(call.args) - len(placeholders) :]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            known = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
            placeholder.meta["example_value"] = known
        _record(body)


def _copied_bodies(module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Puts a copy in the place of each body that is given flat operands, and yields it with its first call."""
    copied: set[str] = set()
    for node in module.graph.nodes:
        for reference, body in subgraphs(node) if node.target in FLAT_OPERANDS else ():
            name = str(reference.target)
            if name not in copied:
                copied.add(name)
                own = copy_body(body)
                module.add_submodule(name, own)
                yield node, own


class _Propagation(FakeTensorProp):
    """Also says of each value whether it requires grad, which a fake tensor's snapshot does not."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.higher_order.invoke_subgraph:
            self.seen_subgraphs.add(str(n.args[1]))  # or it would run the body in the operator's place
        result = super().run_node(n)
        value = n.meta.get("val")
        if isinstance(result, Tensor) and isinstance(value, Tensor) and result.requires_grad:
            value.requires_grad_()
        return result
