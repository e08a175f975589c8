"""Builder of a kernel's graph, node by node."""

from __future__ import annotations

from collections.abc import Collection

from esper.artifacts.document import Json
from esper.artifacts.graph import KernelGraph, Node, TensorSpec
from esper.artifacts.initialisation import Init

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Collects tensors and nodes; :meth:`finish` returns the graph. Belongs to one thread."""

    def __init__(self, in_features: int, out_features: int, dtype: str) -> None:
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.initialisations: dict[str, Init] = {}
        self._tensors: dict[str, TensorSpec] = {}
        self._nodes: list[Node] = []

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of the weights declared so far."""
        return self._tensors.keys()

    def tensor(self, name: str, shape: tuple[int, ...], init: Init = "zeros") -> str:
        """Declares a weight and how it starts; returns its name."""
        self._tensors[name] = TensorSpec(name, shape, self.dtype)
        self.initialisations[name] = init
        return name

    def call(self, op: str, *inputs: str, **attributes: Json) -> str:
        """Appends a node; returns its name."""
        node = Node(f"{op}_{len(self._nodes)}", op, inputs, attributes)
        self._nodes.append(node)
        return node.name

    def linear(self, value: str, name: str, in_features: int, out_features: int, init: Init, *, bias: bool) -> str:
        """``value @ weight.T + bias`` with tensors ``<name>.weight`` and ``<name>.bias``."""
        inputs = [value, self.tensor(f"{name}.weight", (out_features, in_features), init)]
        if bias:
            inputs.append(self.tensor(f"{name}.bias", (out_features,)))
        return self.call("linear", *inputs)

    def finish(self, output: str) -> KernelGraph:
        """The graph with what `output` needs; nodes and tensors that it does not need are left out."""
        needed, nodes = {output}, []
        for node in reversed(self._nodes):
            if node.name in needed:
                needed.update(node.inputs)
                nodes.append(node)
        tensors = tuple(spec for name, spec in self._tensors.items() if name in needed)
        self.initialisations = {spec.name: self.initialisations[spec.name] for spec in tensors}
        return KernelGraph(self.in_features, self.out_features, self.dtype, tensors, tuple(reversed(nodes)), output)
