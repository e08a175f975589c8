"""Arithmetic of folded fossils, whose kernels become part of the host's own weights.

A kernel that is affine in what it reads, K(x, y) = A x + B y + b, is blended for good with the share alpha. Where it is
the first at its site, y is W x + c, and the layer that it makes is another linear layer, of the weight and bias

    (1 - alpha) W + alpha (A + B W)    and    (1 - alpha) c + alpha (b + B c).

One that adds to the output, K(x, y) = y + A x + b, makes y + alpha (A x + b) of it. Sums commute: where all that stand
before it at the site add to the output too, it is the same to have it first, and then it is W + alpha A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.artifacts.graph import HOST, INPUT, KernelGraph, Node
from esper.artifacts.operators import find_operator
from esper.execution.kernels.loaded_kernel import LoadedKernel

__all__ = ["fold", "is_added", "is_affine", "is_cheap"]

_SUMS = frozenset({"add", "sub"})
_SCALINGS = frozenset({"mul_scalar", "div_scalar", "neg"})
_SHIFTS = frozenset({"add_scalar", "rsub_scalar"})
_CHEAP_ROWS = 64
_CHEAP_PRODUCTS = 2**24


def is_affine(graph: KernelGraph, *, constant: bool = True) -> bool:
    """Whether the kernel is affine in `x` and `host`, whatever its weights are.

    With `constant=False`, whether it is linear: it adds nothing that does not depend on them.
    """
    depends = _depends(graph)
    for node in graph.nodes:
        given = [depends[name] for name in node.inputs]
        if any(given) and not _keeps_affine(node, given, constant):
            return False
    return depends[graph.output]


def _depends(graph: KernelGraph) -> dict[str, bool]:
    """Which values depend on what the kernel is given."""
    depends: dict[str, bool] = {INPUT: True, HOST: True, **dict.fromkeys(graph.tensor_names, False)}
    for node in graph.nodes:
        depends[node.name] = any(depends[name] for name in node.inputs)
    return depends


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


def is_added(graph: KernelGraph) -> bool:
    """Whether the kernel is `host` plus what depends on `x` alone, whatever its weights are."""
    added: dict[str, bool | None] = {HOST: True, INPUT: False, **dict.fromkeys(graph.tensor_names, False)}
    sums = {"add": ((True, False), (False, True)), "sub": ((True, False),), "add_scalar": ((True,),)}
    for node in graph.nodes:  # True: it is such a sum; False: it does not read `host`; None: anything else
        given = tuple(added[name] for name in node.inputs)
        reads_host = any(each is not False for each in given)
        added[node.name] = (given in sums.get(node.op, ()) or None) if reads_host else False
    return added[graph.output] is True


def is_cheap(graph: KernelGraph) -> bool:
    """Whether folding the kernel is little work at a commit: less than to run the layer on some dozens of rows.

    To fold one linear map is to go over the weights once. Maps one behind the other have to be multiplied first.
    """
    sizes = {spec.name: math.prod(spec.shape) for spec in graph.tensors}
    depends, products = _depends(graph), 0.0
    for node in graph.nodes:
        if node.op in ("linear", "matmul") and depends[node.inputs[0]] and node.inputs[0] != INPUT:
            products += sizes.get(node.inputs[1], math.inf) * graph.in_features
    return products <= max(_CHEAP_PRODUCTS, _CHEAP_ROWS * graph.in_features * graph.out_features)


@torch.no_grad()
def fold(weight: Tensor, bias: Tensor | None, kernel: LoadedKernel, alpha: float) -> None:
    """Make of the linear layer of `weight` and `bias`, in place, what it is with a fossil of share `alpha`.

    `kernel` is affine, and linear if there is no bias. Computed in float32 at least, with its parameters as they are
    now. Called at a commit, on the thread that runs the model; it waits for no device. A backward that still needs the
    old values raises then.
    """
    with torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        own = (parameter.to(dtype) for parameter in kernel.parameters)
        values = dict(zip(kernel.graph.tensor_names, own, strict=True))
        slope = _Slope(kernel.graph, values, weight.to(dtype)).output()
        constant = None if bias is None else _at_zero(kernel.graph, values, bias.to(dtype))
        _blend_in(weight, slope, alpha)
        if bias is not None and constant is not None:
            _blend_in(bias, constant, alpha)
    torch.clear_autocast_cache()  # which may hold the old weight in another dtype


def _blend_in(host: Tensor, value: Tensor, alpha: float) -> None:
    if host.dtype == value.dtype:
        host.lerp_(value, alpha)
    else:
        host.copy_(torch.lerp(host.to(value.dtype), value, alpha))


def _at_zero(graph: KernelGraph, values: dict[str, Tensor], bias: Tensor) -> Tensor:
    """The kernel at `x = 0`, where the layer's own output is its bias: `[out_features]`."""
    values = {**values, INPUT: bias.new_zeros(graph.in_features), HOST: bias}
    for node in graph.nodes:
        values[node.name] = _run(node, values)
    return values[graph.output].expand_as(bias)


class _Slope:
    """The matrices that the values of an affine kernel multiply `x` with, `[features, in_features]`."""

    def __init__(self, graph: KernelGraph, values: dict[str, Tensor], weight: Tensor) -> None:
        self._graph = graph
        self._values = dict(values)  # what does not depend on the input
        self._slopes: dict[str, Tensor] = {HOST: weight}
        self._like = weight

    def output(self) -> Tensor:
        """That of the kernel's output."""
        depends = _depends(self._graph)
        for node in self._graph.nodes:
            if depends[node.name]:
                self._slopes[node.name] = self._slope(node, [depends[name] for name in node.inputs])
            else:
                self._values[node.name] = _run(node, self._values)
        return self._of(self._graph.output).expand_as(self._like)

    def _of(self, name: str) -> Tensor:
        if name == INPUT and name not in self._slopes:
            size = self._graph.in_features
            self._slopes[name] = torch.eye(size, dtype=self._like.dtype, device=self._like.device)
        return self._slopes[name]

    def _slope(self, node: Node, depends: list[bool]) -> Tensor:
        first = node.inputs[0]
        if node.op == "linear":
            weight = self._values[node.inputs[1]]
            return weight if first == INPUT else weight @ self._of(first)
        if node.op == "matmul":
            matrix = self._values[node.inputs[1]].T
            return matrix if first == INPUT else matrix @ self._of(first)
        if node.op in _SUMS and not all(depends):
            return self._beside_a_constant(node, depends)
        if node.op == "add_scalar":
            return self._of(first)
        if node.op == "rsub_scalar":
            return -self._of(first)
        given = {
            name: self._of(name) if varies else _column(self._values[name])
            for name, varies in zip(node.inputs, depends, strict=True)
        }
        return _run(node, given)

    def _beside_a_constant(self, node: Node, depends: list[bool]) -> Tensor:
        """That of a sum with something that does not depend on the input, and may have more features."""
        varying, constant = node.inputs if depends[0] else node.inputs[::-1]
        slope = self._of(varying)
        slope = slope.expand(max(slope.shape[0], *self._values[constant].shape), slope.shape[1])
        return -slope if node.op == "sub" and depends[1] else slope


def _column(value: Tensor) -> Tensor:
    """A vector of features as `[features, 1]`; a single number as it is."""
    return value.unsqueeze(-1) if value.dim() else value


def _run(node: Node, values: dict[str, Tensor]) -> Tensor:
    operator = find_operator(node.op, f"node {node.name!r}")
    args, kwargs = operator.call(tuple(values[name] for name in node.inputs), node.attributes)
    result: Tensor = operator.target(*args, **kwargs)
    return result
