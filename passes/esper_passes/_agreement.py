"""The check that the fake values recorded in a graph are what its nodes compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from esper_passes._fake_mode import mode_of, undisturbed
from esper_passes._subgraphs import bodies
from esper_passes._torch_internals import FakeTensorMode, HigherOrderOperator, tree_leaves

__all__ = ["check_metadata"]

_KEYS = ("example_value", "val")


class _Unknown:
    """Stands for the value of a node that nothing is known of."""


_UNKNOWN = _Unknown()


def check_metadata(module: fx.GraphModule) -> None:
    """Run the graph on the fake tensors recorded at its placeholders and compare with what is recorded at its nodes.

    Shape, dtype and device are compared. A node without a record is computed; one that cannot be computed (an input
    is unknown, it calls a module or a higher-order operator) is taken at its record. Raises `ValueError`, naming the
    node. Graphs nested in it are checked alike.
    """
    for body in bodies(module).values():
        check_metadata(body)
    mode = mode_of(_recorded(node) for node in module.graph.nodes)
    if mode is not None:
        with undisturbed(mode), mode:
            _Repropagation(module, mode).run(*(None for node in module.graph.nodes if node.op == "placeholder"))


class _Repropagation(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._mode = mode

    def run_node(self, n: fx.Node) -> Any:
        recorded = _recorded(n)
        if n.op == "placeholder":
            return recorded
        if n.op == "get_attr":
            value = super().run_node(n)
            return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        known = not any(isinstance(self.env[source], _Unknown) for source in n.all_input_nodes)
        if n.op == "output" or not known or n.op == "call_module" or _is_higher_order(n):
            return recorded
        computed = super().run_node(n)
        if not isinstance(recorded, _Unknown):
            _compare(n, computed, recorded)
        return computed


def _compare(node: fx.Node, computed: object, recorded: object) -> None:
    left, right = _describe(computed), _describe(recorded)
    if left is not None and right is not None and left != right:
        raise ValueError(f"node {node.name!r} computes {left}, but its metadata says {right}")


def _describe(value: object) -> list[str] | None:
    """What is compared, or None if it depends on data."""
    described = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            sizes = [str(size) for size in leaf.shape]
            if any(size.startswith("u") for size in sizes):  # unbacked: a new symbol at each run
                return None
            described.append(f"{leaf.dtype}[{', '.join(sizes)}] on {leaf.device}")
    return described


def _recorded(node: fx.Node) -> Any:
    return next((node.meta[key] for key in _KEYS if node.meta.get(key) is not None), _UNKNOWN)


def _is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)
