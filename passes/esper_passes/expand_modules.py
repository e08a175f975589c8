"""`ExpandModules`: calls of small torch.nn modules become the one function call that their forward makes."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from esper_passes._get_attr import get_attr
from esper_passes._hooks import hooks_of
from esper_passes._torch_internals import nn_functions
from esper_passes.base import PassResult

__all__ = ["ExpandModules"]


class _Call(NamedTuple):
    """A function call, in whose arguments `_X` stands for the module's input and `_Own` for a tensor of the module."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = types.MappingProxyType({})


class _Own(NamedTuple):
    """The module's own tensor of that name."""

    name: str


class _Input:
    """Stands for the module's input."""


_X = _Input()
_Expansion = Callable[[Any], "_Call | None"]  # Any: the module, of exactly the type it is registered for


@dataclass(frozen=True)
class ExpandModules:
    """Replace the calls of plain torch.nn modules by what they call, bit for bit, with `get_attr` for parameters.

    Plain means: of exactly a type in the table below, without hooks, parametrizations, in-place operation or a
    `forward` of its own. Everything else stays a module call, among it all that depends on `training`. Options such
    as `eps` are read when the pass runs, parameters at each call. `nn.Identity` disappears.
    """

    name: ClassVar[str] = "expand_modules"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module":
                modified = _expand(graph_module, node) or modified
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)


def _expand(owner: fx.GraphModule, node: fx.Node) -> bool:
    path = str(node.target)
    module = owner.get_submodule(path)
    given = (*node.args, *node.kwargs.values())
    if not _is_plain(module) or len(given) != 1 or not isinstance(given[0], fx.Node):
        return False
    x = given[0]
    if type(module) is nn.Identity:
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)
        return True
    expansion = _EXPANSIONS.get(type(module))
    call = None if expansion is None else expansion(module)
    if call is None:
        return False
    with node.graph.inserting_before(node):
        args = tuple(_argument(node.graph, path, module, x, argument) for argument in call.args)
        expanded = node.graph.call_function(call.target, args, dict(call.kwargs))
    expanded.meta = dict(node.meta)
    node.replace_all_uses_with(expanded)
    node.graph.erase_node(node)
    return True


def _is_plain(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else."""
    return hooks_of(module) is None and "forward" not in vars(module) and module._compiled_call_impl is None


def _argument(graph: fx.Graph, path: str, module: nn.Module, x: fx.Node, argument: object) -> Any:
    if isinstance(argument, _Input):
        return x
    if isinstance(argument, _Own):
        return None if getattr(module, argument.name) is None else get_attr(graph, f"{path}.{argument.name}")
    return argument


def _unary(target: Callable[..., Any], *options: str) -> _Expansion:
    """A function of the input and of the module's attributes `options`."""

    def expand(module: Any) -> _Call | None:
        if getattr(module, "inplace", False):
            return None
        return _Call(target, (_X, *(getattr(module, option) for option in options)))

    return expand


def _along_dim(target: Callable[..., Any]) -> _Expansion:
    return lambda module: None if module.dim is None else _Call(target, (_X, module.dim))


def _conv(target: Callable[..., Any]) -> _Expansion:
    def expand(module: Any) -> _Call | None:
        if module.padding_mode != "zeros":
            return None
        options = (module.stride, module.padding, module.dilation, module.groups)
        return _Call(target, (_X, _Own("weight"), _Own("bias"), *options))

    return expand


def _layer_norm(module: nn.LayerNorm) -> _Call:
    shape, cudnn = module.normalized_shape, torch.backends.cudnn.enabled  # the flag has no effect, it is passed along
    return _Call(torch.layer_norm, (_X, shape, _Own("weight"), _Own("bias"), module.eps, cudnn))


def _embedding(module: nn.Embedding) -> _Call | None:
    index = -1 if module.padding_idx is None else module.padding_idx
    if module.max_norm is not None or index >= module.weight.shape[0] or (index < 0 and module.padding_idx is not None):
        return None
    return _Call(torch.embedding, (_Own("weight"), _X, index, module.scale_grad_by_freq, module.sparse))


_EXPANSIONS: Mapping[type[nn.Module], _Expansion] = {
    nn.Linear: lambda _: _Call(nn_functions.linear, (_X, _Own("weight"), _Own("bias"))),
    nn.Conv1d: _conv(torch.conv1d),
    nn.Conv2d: _conv(torch.conv2d),
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: lambda module: _Call(torch.rms_norm, (_X, module.normalized_shape, _Own("weight"), module.eps)),
    nn.ReLU: _unary(torch.relu),
    nn.GELU: lambda module: _Call(nn_functions.gelu, (_X,), {"approximate": module.approximate}),
    nn.SiLU: _unary(nn_functions.silu),
    nn.Mish: _unary(nn_functions.mish),
    nn.Hardswish: _unary(nn_functions.hardswish),
    nn.Tanh: _unary(torch.tanh),
    nn.Sigmoid: _unary(torch.sigmoid),
    nn.LeakyReLU: _unary(nn_functions.leaky_relu, "negative_slope"),
    nn.ELU: _unary(nn_functions.elu, "alpha"),
    nn.Hardtanh: _unary(nn_functions.hardtanh, "min_val", "max_val"),
    nn.ReLU6: _unary(nn_functions.hardtanh, "min_val", "max_val"),
    nn.Softplus: _unary(nn_functions.softplus, "beta", "threshold"),
    nn.Softmax: _along_dim(torch.softmax),
    nn.LogSoftmax: _along_dim(torch.log_softmax),
    nn.Flatten: _unary(torch.flatten, "start_dim", "end_dim"),
}
