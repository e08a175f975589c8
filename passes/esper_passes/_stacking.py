"""Several kernels of one structure, computed at once: the values of m seeds as one of shape `[*, m, features]`.

What a kernel does it does on trailing dimensions, so that nearly all of it runs unchanged on a value with one more
leading dimension. Linear layers of a common input become one on all their weights, linear layers of stacked inputs a
batched product. What does not depend on the seed (the input, detached or not) is computed once and not stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from esper_passes._blend import PARAMETER, TYPE_AS
from esper_passes._chains import recorded, seed_of
from esper_passes._torch_internals import nn_functions as _nn

__all__ = ["Stacker", "Value"]

_LINEAR = _nn.linear
_NORMS: dict[Any, tuple[int, ...]] = {torch.layer_norm: (2, 3), torch.rms_norm: (2,)}  # where the affine ones are
_LAST_DIMENSION = (torch.softmax, torch.log_softmax)
_ELEMENTWISE = frozenset(
    (
        torch.add, torch.sub, torch.mul, torch.div, torch.rsub, torch.pow, torch.maximum, torch.minimum,
        torch.neg, torch.abs, torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.rsqrt,
        torch.reciprocal, torch.square, torch.sin, torch.cos, torch.erf, torch.clamp, torch.clamp_min,
        torch.clamp_max, torch.relu, torch.sigmoid, torch.tanh, torch.selu, torch.celu, _nn.silu, _nn.mish,
        _nn.hardswish, _nn.hardsigmoid, _nn.log_sigmoid, _nn.gelu, _nn.leaky_relu, _nn.elu, _nn.softplus, _nn.hardtanh,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """The value of a node in all seeds: `[*, m, features]`, or `[*, features]` if it is the same in all."""

    node: fx.Node
    shared: bool


class Stacker:
    """Stacks what the seeds of `call` compute. `emit` adds nodes after all that they read."""

    def __init__(self, call: str, emit: Callable[..., fx.Node]) -> None:
        self._call = call
        self._add = emit
        self._values: dict[tuple[fx.Node, ...], Value] = {}

    def signature(self, node: fx.Node) -> Hashable | None:
        """Equal for nodes of different seeds that can be stacked; None for one that cannot."""
        if seed_of(node)[0] != self._call:
            return _parameter(node) if PARAMETER in node.meta else node
        if not _is_supported(node):
            return None
        arguments: list[Hashable] = [node.target, *sorted(node.kwargs.items())]
        for argument in node.args:
            part = self.signature(argument) if isinstance(argument, fx.Node) else _constant(argument)
            if part is None:
                return None
            arguments.append(part)
        return tuple(arguments)

    def stack(self, nodes: Sequence[fx.Node]) -> Value:
        """The values of `nodes`, one of each seed, of equal signatures."""
        key = tuple(nodes)
        if key not in self._values:
            self._values[key] = self._stacked(key)
        return self._values[key]

    def stacked(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """As :meth:`stack`, with a dimension of size 1 for the seeds where the value is the same in all."""
        value = self.stack(nodes)
        return self._add(torch.unsqueeze, value.node, -2) if value.shared else value.node

    def _stacked(self, nodes: tuple[fx.Node, ...]) -> Value:
        first = nodes[0]
        if all(node is first for node in nodes):
            return Value(first, True)
        columns = [_column(nodes, place) for place in range(len(first.args))]
        inputs = [column for column in columns if column is not None and PARAMETER not in column[0].meta]
        varies = any(column is not None and PARAMETER in column[0].meta for column in columns)
        if not varies and all(self.stack(column).shared for column in inputs):
            return Value(first, True)
        if first.target is _LINEAR:
            return Value(self._linear(nodes, columns), False)
        if first.target in _NORMS:
            return Value(self._norm(first, columns), False)
        args = [
            argument if column is None else self._operand(column)
            for argument, column in zip(first.args, columns, strict=True)
        ]
        return Value(self._add(first.target, *args, **first.kwargs), False)

    def _operand(self, column: Sequence[fx.Node]) -> fx.Node:
        return self._parameters(column) if PARAMETER in column[0].meta else self.stacked(column)

    def _parameters(self, column: Sequence[fx.Node]) -> fx.Node:
        """`[m, features]`, or `[m, 1]` for parameters that are single numbers."""
        together = self._add(torch.stack, list(column))
        value = recorded(column[0])
        return self._add(torch.unsqueeze, together, -1) if value is not None and value.dim() == 0 else together

    def _linear(self, nodes: Sequence[fx.Node], columns: Sequence[Sequence[fx.Node] | None]) -> fx.Node:
        given, weights, biases = (*columns, None)[:3]
        assert given is not None
        assert weights is not None
        x = self.stack(given)
        if x.shared:
            bias = None if biases is None else self._add(torch.cat, list(biases))
            side_by_side = self._add(_LINEAR, x.node, self._add(torch.cat, list(weights)), bias)
            return self._add(torch.unflatten, side_by_side, -1, (len(nodes), -1))
        product = self._add(torch.functional.einsum, "...mi,moi->...mo", x.node, self._add(torch.stack, list(weights)))
        if biases is None:
            return product
        return self._add(torch.add, product, self._add(TYPE_AS, self._add(torch.stack, list(biases)), product))

    def _norm(self, first: fx.Node, columns: Sequence[Sequence[fx.Node] | None]) -> fx.Node:
        places = _NORMS[first.target]
        assert columns[0] is not None
        value = self.stack(columns[0])
        args = [None if place in places else argument for place, argument in enumerate(first.args)]
        result = self._add(first.target, value.node, *args[1:])
        if value.shared:
            result = self._add(torch.unsqueeze, result, -2)
        for place, combine in zip(places, (torch.mul, torch.add), strict=False):
            column = columns[place] if place < len(columns) else None
            if column is not None:
                result = self._add(combine, result, self._add(TYPE_AS, self._parameters(column), result))
        return result


def _column(nodes: Sequence[fx.Node], place: int) -> tuple[fx.Node, ...] | None:
    """The argument at `place` of each of `nodes`; None if it is no node."""
    column = tuple(argument for node in nodes if isinstance(argument := node.args[place], fx.Node))
    return column or None


def _is_supported(node: fx.Node) -> bool:
    if node.op != "call_function" or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return False
    parameters = [place for place, argument in enumerate(node.args) if _dimensions(argument) is not None]
    if node.target in _ELEMENTWISE:
        return all((_dimensions(node.args[place]) or 0) <= 1 for place in parameters)
    if node.kwargs or not node.args or 0 in parameters or not isinstance(node.args[0], fx.Node):
        return False
    check = _CHECKS.get(node.target)
    return check is not None and check(node.args[1:])


def _dimensions(argument: object) -> int | None:
    """The number of dimensions of a parameter, None for anything else."""
    if not isinstance(argument, fx.Node) or PARAMETER not in argument.meta:
        return None
    value = recorded(argument)
    return None if value is None else value.dim()


def _affine_by(dimensions: Sequence[int]) -> Callable[[tuple[Any, ...]], bool]:
    """Whether the arguments from the first on are parameters of so many dimensions, or None."""
    return lambda rest: all(
        argument is None or _dimensions(argument) == wanted for argument, wanted in zip(rest, dimensions, strict=False)
    )


def _is_norm(rest: tuple[Any, ...]) -> bool:
    shape, *others = rest
    affine = [argument for argument in others if isinstance(argument, fx.Node)]
    return len(shape) == 1 and all(_dimensions(argument) == 1 for argument in affine)


_CHECKS: dict[Any, Callable[[tuple[Any, ...]], bool]] = {
    torch.detach: lambda rest: not rest,
    _LINEAR: lambda rest: _dimensions(rest[0]) == 2 and _affine_by((2, 1))(rest),
    **dict.fromkeys(_NORMS, _is_norm),
    **dict.fromkeys(_LAST_DIMENSION, lambda rest: rest == (-1,)),
}


def _parameter(node: fx.Node) -> Hashable | None:
    value = recorded(node)
    return None if value is None else ("parameter", tuple(value.shape), value.dtype, value.requires_grad)


def _constant(argument: object) -> Hashable | None:
    if isinstance(argument, list | tuple):
        parts = tuple(_constant(part) for part in argument)
        return None if None in parts else parts
    plain = argument is None or isinstance(argument, bool | int | float | str)
    return (type(argument), argument) if plain else None
