"""Translation rules from ATen operations on shapes to the operator table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch

from esper.artifacts.translation import Call, Refusal, Rules, Value, Values

__all__ = ["SHAPE_RULES", "same"]

aten: Any = torch.ops.aten


def same(call: Call) -> Value:
    """The first argument itself."""
    value = call.all[0]
    assert isinstance(value, Value)
    return value


def _reshape(call: Call, value: Value, shape: tuple[int, ...]) -> Value:
    """`value` with another trailing shape: what differs after the common prefix is joined, then split."""
    if value.batched and shape[:1] != (call.batch,):
        raise Refusal(f"it reshapes {list(value.shape)} to {list(shape)} across the leading dimension")
    lead = value.shape[:1] if value.batched else ()
    old, new = value.trailing, shape[len(lead) :]
    prefix = 0
    while prefix < min(len(old), len(new)) and old[prefix] == new[prefix]:
        prefix += 1
    head, old, new = (*lead, *old[:prefix]), old[prefix:], new[prefix:]
    if not old and new:  # only dimensions of size 1 are added
        for count in range(1, len(new) + 1):
            value = call.emit((*head, *new[:count]), "unsqueeze", value, dim=-1)
        return value
    if len(old) > 1:
        value = call.emit((*head, math.prod(old)), "flatten", value, start=-len(old), end=-1)
    if old and not new:  # only dimensions of size 1 are dropped
        return call.emit(head, "squeeze", value, dim=-1)
    if len(new) > 1:
        value = call.emit((*head, *new), "unflatten", value, dim=-1, sizes=new)
    return value


def _to_exported_shape(call: Call) -> Values:
    return _reshape(call, same(call), call.shape)


def _permute(call: Call) -> Values:
    value: Value = call["self"]
    rank = len(value.shape)
    dims = [dim % rank for dim in call["dims"]]
    return _permuted(call, value, dims)


def _permuted(call: Call, value: Value, dims: Sequence[int]) -> Value:
    rank = len(value.shape)
    if value.batched and dims[0] != 0:
        raise Refusal("it moves the leading dimension; a kernel treats leading positions apart")
    order = tuple(dim - rank for dim in dims[1 if value.batched else 0 :])
    if order == tuple(range(-len(order), 0)):
        return value
    return call.emit([value.shape[dim] for dim in dims], "permute", value, order=order)


def _transpose(call: Call) -> Values:
    value: Value = call["self"]
    return _swap(call, value, call["dim0"], call["dim1"])


def _swap(call: Call, value: Value, dim0: int, dim1: int) -> Value:
    dims = list(range(len(value.shape)))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permuted(call, value, dims)


def _transpose_matrix(call: Call) -> Values:
    value = same(call)
    return value if len(value.shape) < 2 else _swap(call, value, -1, -2)


def _movedim(call: Call) -> Values:
    value: Value = call["self"]
    sources, targets = call["source"], call["destination"]
    pairs = [(sources, targets)] if isinstance(sources, int) else list(zip(sources, targets, strict=True))
    rank = len(value.shape)
    placed = {target % rank: source % rank for source, target in pairs}
    rest = iter(dim for dim in range(rank) if dim not in placed.values())
    return _permuted(call, value, [placed[dim] if dim in placed else next(rest) for dim in range(rank)])


def _unsqueeze(call: Call) -> Values:
    value: Value = call["self"]
    rank = len(value.shape) + 1
    position = call["dim"] % rank
    if value.batched and position == 0:
        raise Refusal("it adds a dimension before the leading one")
    return call.emit(call.shape, "unsqueeze", value, dim=position - rank)


def _squeeze(call: Call) -> Values:
    value: Value = call["self"]
    dims = call["dim"]
    for dim in sorted(call.axes(value, [dims] if isinstance(dims, int) else dims)):
        if value.shape[dim] == 1:
            position = len(value.shape) + dim
            shape = value.shape[:position] + value.shape[position + 1 :]
            value = call.emit(shape, "squeeze", value, dim=dim)
    return value


def _expand(call: Call) -> Values:
    return _expanded(call, same(call), call.shape)


def _expanded(call: Call, value: Value, shape: tuple[int, ...]) -> Value:
    if value.batched and len(shape) != len(value.shape):
        raise Refusal("it adds a dimension before the leading one")
    if not value.batched and call.batch in shape:
        raise Refusal("it repeats a weight for each leading position; add it to a value that has them")
    while len(value.shape) < len(shape):
        value = call.emit((1, *value.shape), "unsqueeze", value, dim=-len(value.shape) - 1)
    for dim in range(-len(shape), 0):
        if value.shape[dim] != shape[dim]:
            position = len(shape) + dim
            wider = (*value.shape[:position], shape[dim], *value.shape[position + 1 :])
            value = call.emit(wider, "repeat_interleave", value, repeats=shape[dim], dim=dim)
    return value


def _repeat_interleave(call: Call) -> Values:
    value: Value = call["self"]
    if call["dim"] is None:
        raise Refusal("it flattens every dimension; name a trailing one")
    dim = call.axis(value, call["dim"])
    return call.emit(call.shape, "repeat_interleave", value, repeats=call["repeats"], dim=dim)


def _cut(call: Call, value: Value, dim: int, start: int, length: int) -> Value:
    if length == value.shape[dim]:
        return value
    if length == 0:
        raise Refusal("it keeps nothing of a dimension")
    position = len(value.shape) + dim
    shape = (*value.shape[:position], length, *value.shape[position + 1 :])
    return call.emit(shape, "slice", value, dim=dim, start=start, length=length)


def _slice(call: Call) -> Values:
    value: Value = call["self"]
    shape = call.shape
    if shape == value.shape:
        return value
    if call["step"] != 1:
        raise Refusal(f"its step is {call['step']}; use 1")
    dim = call.axis(value, call["dim"])
    size, start = value.shape[dim], call["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    return _cut(call, value, dim, start, shape[dim])


def _narrow(call: Call) -> Values:
    value: Value = call["self"]
    dim = call.axis(value, call["dim"])
    return _cut(call, value, dim, call["start"] % value.shape[dim], call["length"])


def _select(call: Call) -> Values:
    value: Value = call["self"]
    dim = call.axis(value, call["dim"])
    index = call["index"] % value.shape[dim]
    return call.emit(call.shape, "select", value, dim=dim, index=index)


def _split(call: Call) -> Values:
    """chunk, split and split_with_sizes: the exported shapes say where the cuts are."""
    value = same(call)
    dim = call.axis(value, call["dim"])
    pieces, start = [], 0
    for piece in call.node.meta["val"]:
        length = int(piece.shape[dim])
        pieces.append(_cut(call, value, dim, start, length))
        start += length
    return tuple(pieces)


def _unbind(call: Call) -> Values:
    value: Value = call["self"]
    dim = call.axis(value, call["dim"])
    shape = tuple(call.node.meta["val"][0].shape)
    return tuple(call.emit(shape, "select", value, dim=dim, index=index) for index in range(value.shape[dim]))


def _cat(call: Call) -> Values:
    return _joined(call, list(call["tensors"]), call["dim"], call.shape)


def _joined(call: Call, values: list[Value], dim: int, shape: tuple[int, ...]) -> Value:
    if len({value.batched for value in values}) > 1:
        raise Refusal("it joins a weight to a value that has leading positions; add or multiply instead")
    return call.emit(shape, "concat", *values, dim=call.axis(values[0], dim))


def _stack(call: Call) -> Values:
    shape = call.shape
    position = call["dim"] % len(shape)
    values = []
    for value in call["tensors"]:
        if value.batched and position == 0:
            raise Refusal("it adds a dimension before the leading one")
        wider = (*shape[:position], 1, *shape[position + 1 :])
        values.append(call.emit(wider, "unsqueeze", value, dim=position - len(shape)))
    return _joined(call, values, position, shape)


def _flip(call: Call) -> Values:
    value: Value = call["self"]
    return call.emit(value.shape, "flip", value, dims=call.axes(value, call["dims"]))


SHAPE_RULES: Rules = MappingProxyType(
    {
        **dict.fromkeys(
            (
                aten.view.default,
                aten._unsafe_view.default,
                aten.reshape.default,
                aten.flatten.using_ints,
                aten.unflatten.int,
                aten.view_as.default,
                aten.reshape_as.default,
            ),
            _to_exported_shape,
        ),
        **dict.fromkeys((aten.t.default, aten.numpy_T.default, aten.mT.default), _transpose_matrix),
        **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeeze),
        **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _expand),
        **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _split),
        **dict.fromkeys((aten.cat.default, aten.concat.default), _cat),
        **dict.fromkeys((aten.movedim.int, aten.movedim.intlist), _movedim),
        **dict.fromkeys(
            (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default), same
        ),
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.unsqueeze.default: _unsqueeze,
        aten.repeat_interleave.self_int: _repeat_interleave,
        aten.slice.Tensor: _slice,
        aten.narrow.default: _narrow,
        aten.select.int: _select,
        aten.unbind.int: _unbind,
        aten.stack.default: _stack,
        aten.flip.default: _flip,
    }
)
