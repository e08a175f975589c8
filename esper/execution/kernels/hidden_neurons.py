"""Kernels that are hidden neurons: `y + B act(A x + a) + b`, recognised by their graphs, whatever they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from esper.artifacts.graph import HOST, INPUT, KernelGraph, Node
from esper.execution.kernels.loaded_kernel import LoadedKernel

__all__ = ["Activation", "HiddenNeurons", "activation_of", "neurons_of"]

Activation = tuple[str, Mapping[str, Any]]
"""An operator of the table and its attributes."""


@dataclass(frozen=True, slots=True)
class HiddenNeurons:
    """`count` neurons: `fan_in`, `[count, in]`, the `activation`, `fan_out`, `[out, count]`, and biases if any."""

    fan_in: Tensor
    bias: Tensor | None
    activation: Activation
    fan_out: Tensor
    out_bias: Tensor | None

    @property
    def count(self) -> int:
        return self.fan_in.shape[0]


def neurons_of(kernel: LoadedKernel) -> HiddenNeurons | None:
    """The neurons that `kernel` is, with its own parameters; None if it is anything else."""
    nodes = _nodes_of(kernel.graph)
    if nodes is None:
        return None
    first, activation, last = nodes
    values = dict(zip(kernel.graph.tensor_names, kernel.parameters, strict=True))
    if not values.keys() >= {*first.inputs[1:], *last.inputs[1:]}:
        return None
    own = [[*(values[name] for name in node.inputs[1:]), None][:2] for node in (first, last)]
    (fan_in, bias), (fan_out, out_bias) = own
    assert fan_in is not None
    assert fan_out is not None
    return HiddenNeurons(fan_in, bias, (activation.op, activation.attributes), fan_out, out_bias)


def _nodes_of(graph: KernelGraph) -> tuple[Node, Node, Node] | None:
    if [node.op for node in graph.nodes[:1]] != ["linear"] or len(graph.nodes) != 4:
        return None
    first, activation, last, total = graph.nodes
    follows = activation.inputs == (first.name,) and last.op == "linear" and last.inputs[0] == activation.name
    added = total.op == "add" and set(total.inputs) == {HOST, last.name} and graph.output == total.name
    return (first, activation, last) if first.inputs[0] == INPUT and follows and added else None


def activation_of(module: nn.Module) -> Activation | None:
    """The operator that an activation of torch.nn is; None if the table has none for it."""
    named = _ACTIVATIONS.get(type(module))
    if named is None:
        return None
    op, options = named
    return op, {name: getattr(module, attribute) for name, attribute in options.items()}


_ACTIVATIONS: Mapping[type[nn.Module], tuple[str, Mapping[str, str]]] = {
    nn.ReLU: ("relu", {}),
    nn.GELU: ("gelu", {"approximate": "approximate"}),
    nn.SiLU: ("silu", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Tanh: ("tanh", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": "negative_slope"}),
    nn.ELU: ("elu", {"alpha": "alpha"}),
    nn.SELU: ("selu", {}),
    nn.Softplus: ("softplus", {"beta": "beta", "threshold": "threshold"}),
    nn.Hardtanh: ("hardtanh", {"min_val": "min_val", "max_val": "max_val"}),
    nn.Hardswish: ("hardswish", {}),
    nn.Mish: ("mish", {}),
}
"""By their class, the operator and its attributes, each with the name that the module has for it."""
