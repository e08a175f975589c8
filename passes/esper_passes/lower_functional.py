"""`LowerFunctional`: calls of wrappers in torch.nn.functional become calls of the built-in that the wrapper ends in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional

from esper_passes._torch_internals import nn_functions
from esper_passes.base import PassResult

__all__ = ["LowerFunctional"]

_Call = tuple[Callable[..., Any], tuple[Any, ...]]
_Arguments = Mapping[str, Any]
_Lowering = Callable[[_Arguments], "_Call | None"]  # given all arguments by name, the defaults too


@dataclass(frozen=True)
class LowerFunctional:
    """Replace calls such as `functional.layer_norm(x, ...)` by `torch.layer_norm(x, ...)`, bit for bit.

    Only where the arguments that select a path in the wrapper are constants of the plain path: not in place, `dim`
    given, no other `dtype`, no `max_norm`. The node stays the same and keeps its name and its metadata. What a tensor
    subclass or a `TorchFunctionMode` intercepts is then the built-in and no longer the wrapper.
    """

    name: ClassVar[str] = "lower_functional"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.nodes:
            lowering = _LOWERINGS.get(node.target) if node.op == "call_function" else None
            if lowering is None:
                continue
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            call = lowering(bound.arguments)
            if call is not None:
                node.target, node.args = call
                node.kwargs = {}
                modified = True
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)


def _unary(target: Callable[..., Any], *options: str) -> _Lowering:
    """A function of `input` and the arguments `options`, that has an in-place form in the same wrapper."""

    def lower(given: _Arguments) -> _Call | None:
        if given.get("inplace", False) is not False:
            return None
        return target, (given["input"], *(given[option] for option in options))

    return lower


def _along_dim(target: Callable[..., Any]) -> _Lowering:
    def lower(given: _Arguments) -> _Call | None:
        if given["dim"] is None or given["dtype"] is not None:
            return None
        return target, (given["input"], given["dim"])

    return lower


def _hardtanh(given: _Arguments) -> _Call | None:
    low, high = given["min_val"], given["max_val"]
    if given["inplace"] is not False or isinstance(low, fx.Node) or isinstance(high, fx.Node) or low > high:
        return None
    return nn_functions.hardtanh, (given["input"], low, high)


def _layer_norm(given: _Arguments) -> _Call:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    return torch.layer_norm, (*(given[name] for name in names), torch.backends.cudnn.enabled)


def _rms_norm(given: _Arguments) -> _Call:
    return torch.rms_norm, tuple(given[name] for name in ("input", "normalized_shape", "weight", "eps"))


def _embedding(given: _Arguments) -> _Call | None:
    if given["padding_idx"] is not None or given["max_norm"] is not None:
        return None
    return torch.embedding, (given["weight"], given["input"], -1, given["scale_grad_by_freq"], given["sparse"])


def _dropout(given: _Arguments) -> _Call | None:
    p = given["p"]
    if given["inplace"] is not False or not isinstance(p, float | int) or not 0.0 <= p <= 1.0:
        return None
    return torch.dropout, (given["input"], p, given["training"])


_LOWERINGS: Mapping[Any, _Lowering] = {
    functional.relu: _unary(torch.relu),
    functional.relu6: _unary(nn_functions.relu6),
    functional.silu: _unary(nn_functions.silu),
    functional.mish: _unary(nn_functions.mish),
    functional.hardswish: _unary(nn_functions.hardswish),
    functional.selu: _unary(torch.selu),
    functional.celu: _unary(torch.celu, "alpha"),
    functional.leaky_relu: _unary(nn_functions.leaky_relu, "negative_slope"),
    functional.elu: _unary(nn_functions.elu, "alpha"),
    functional.hardtanh: _hardtanh,
    functional.softmax: _along_dim(torch.softmax),
    functional.log_softmax: _along_dim(torch.log_softmax),
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.embedding: _embedding,
    functional.dropout: _dropout,
}
