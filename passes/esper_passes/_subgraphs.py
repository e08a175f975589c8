"""Graphs nested in graphs: the bodies of higher-order operators such as an activation checkpoint.

A body is a `GraphModule` that the outer module owns and a `get_attr` node names. Copies of an outer graph share its
bodies, so a pass never changes one in place: it changes a copy and puts that in the body's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from esper_passes._torch_internals import HigherOrderOperator

__all__ = ["FLAT_OPERANDS", "bodies", "copy_body", "rewrite_bodies", "subgraphs"]

FLAT_OPERANDS = tuple(
    getattr(torch.ops.higher_order, name)
    for name in ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph")
)
"""Operators whose operands are the last positional arguments and become the placeholders of their body, in order."""


def bodies(module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The bodies that the graph of `module` names, by the name of the attribute."""
    found: dict[str, fx.GraphModule] = {}
    for node in module.graph.nodes:
        body = _body(module, node)
        if body is not None:
            found[str(node.target)] = body
    return found


def subgraphs(node: fx.Node) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The bodies that the call `node` is given, each with the `get_attr` node that names it.

    Raises `ValueError` if there may be such bodies but the graph belongs to no module, or to several.
    """
    if not isinstance(node.target, HigherOrderOperator):
        return
    named = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
    owner = node.graph.owning_module
    if named and owner is None:
        raise ValueError(f"cannot look into {node.target}: its graph is not owned by exactly one graph module")
    for argument in named:
        body = _body(owner, argument)
        if body is not None:
            yield argument, body


def copy_body(body: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own; parameters and deeper bodies are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    graph.output_node().meta = dict(body.graph.output_node().meta)
    copied = fx.GraphModule(body, graph, class_name=type(body).__name__)
    copied.meta.update(body.meta)
    return copied


def rewrite_bodies(module: fx.GraphModule, rewrite: Callable[[fx.GraphModule], bool]) -> bool:
    """Put in place of each body a copy that `rewrite` has changed in place. Returns whether it changed any."""
    modified = False
    for name, body in bodies(module).items():
        copied = copy_body(body)
        if rewrite(copied):
            module.add_submodule(name, copied)
            modified = True
    return modified


def _body(owner: object, node: fx.Node) -> fx.GraphModule | None:
    if node.op != "get_attr":
        return None
    value: object = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, fx.GraphModule) else None
