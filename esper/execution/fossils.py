"""Fossils that become part of the host's own weights.

A kernel that is affine in its input, K(x) = A x + b, blended for good with share alpha, makes of a linear layer with
weight W and bias c another linear layer:

    alpha (A x + b) + (1 - alpha) (W x + c) = ((1 - alpha) W + alpha A) x + ((1 - alpha) c + alpha b)

A kernel that also reads the layer's own output W x + c, in an affine way, is affine in x as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.artifacts.graph import HOST, INPUT, KernelGraph, Node
from esper.artifacts.operators import find_operator
from esper.execution.loaded_kernel import LoadedKernel

__all__ = ["folded", "is_affine"]

_SUMS = frozenset({"add", "sub"})
_SCALINGS = frozenset({"mul_scalar", "div_scalar", "neg"})
_SHIFTS = frozenset({"add_scalar", "rsub_scalar"})


def is_affine(graph: KernelGraph, *, constant: bool = True) -> bool:
    """Whether the kernel is affine in `x` and `host`, whatever its weights are.

    With `constant=False`, whether it is linear: it adds nothing that does not depend on them.
    """
    depends: dict[str, bool] = {INPUT: True, HOST: True, **dict.fromkeys(graph.tensor_names, False)}
    for node in graph.nodes:
        given = [depends[name] for name in node.inputs]
        if any(given) and not _keeps_affine(node, given, constant):
            return False
        depends[node.name] = any(given)
    return depends[graph.output]


def _keeps_affine(node: Node, given: list[bool], constant: bool) -> bool:
    """`given` says which inputs depend on `x`, affinely; at least one does."""
    if node.op in _SUMS:
        return constant or all(given)
    if node.op in _SCALINGS:
        return True
    if node.op in _SHIFTS:
        return constant
    if node.op == "mul":
        return given != [True, True]
    if node.op == "linear":
        return given[0] and not any(given[1:]) and (constant or len(given) == 2)
    return node.op in ("matmul", "div") and given == [True, False]


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor | None, kernel: LoadedKernel, alpha: float) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the linear layer that a layer of `weight` and `bias` is with a fossil of share `alpha`.

    `kernel` is affine, and linear if there is no bias. Computed in float64 with its parameters as they are now, from
    its values at the unit vectors and at zero, and rounded once. Called at a commit, on the thread that runs the model;
    it waits for no device.
    """
    outputs = _values_at_units(kernel, weight.double(), None if bias is None else bias.double())
    constant = outputs[-1]
    new_weight = torch.lerp(weight.double(), (outputs[:-1] - constant).T, alpha).to(weight.dtype)
    return new_weight, None if bias is None else torch.lerp(bias.double(), constant, alpha).to(bias.dtype)


def _values_at_units(kernel: LoadedKernel, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel at each unit vector and, in the last row, at zero: `[in_features + 1, out_features]`.

    A linear layer of the input is its own weight there, which saves the product, and the unit vectors as well.
    """
    graph = kernel.graph
    values = dict(zip(graph.tensor_names, (parameter.double() for parameter in kernel.parameters), strict=True))
    if graph.uses_host:
        values[HOST] = _linear_at_units(weight, bias)
    for node in graph.nodes:
        if node.op == "linear" and node.inputs[0] == INPUT:
            parameters = [values[name] for name in node.inputs[1:]]
            if parameters[0].dim() == 2:
                values[node.name] = _linear_at_units(*parameters)
                continue
        if INPUT in node.inputs and INPUT not in values:
            size = graph.in_features
            values[INPUT] = torch.eye(size + 1, size, dtype=torch.float64, device=weight.device)
        operator = find_operator(node.op, f"node {node.name!r}")
        args, kwargs = operator.call(tuple(values[name] for name in node.inputs), node.attributes)
        values[node.name] = operator.target(*args, **kwargs)
    return values[graph.output]


def _linear_at_units(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = torch.cat([weight.T, weight.new_zeros(1, weight.shape[0])])
    return rows if bias is None else rows + bias
