"""Nodes that read a module's parameters."""

from __future__ import annotations

from torch import fx

__all__ = ["get_attr"]


def get_attr(graph: fx.Graph, path: str) -> fx.Node:
    """As `fx.Graph.get_attr`, without its warning about tensors that are no `nn.Parameter`.

    While `torch.func.functional_call` runs a module, any tensors stand where its parameters stood.
    """
    return graph.create_node("get_attr", path)
