"""A blend as the sum that it is: every kernel's share, and what the kernels' outputs are made of.

With alphas a_1 ... a_n in order,

    y = c_0 base + c_1 f_1 + ... + c_n f_n,    c_i = a_i r_(i+1) ... r_n,    a_0 = 1.

A kernel whose output is K_i(x) is blended in as f_i = K_i, and leaves r_i = 1 - a_i of what was there before; one that
adds to that, K_i(x, y) = y + f_i(x), leaves r_i = 1 of it. As a rule f_i is a linear map of something.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from esper_passes._blend import ALPHAS, PARAMETER, carried
from esper_passes._chains import TO_DTYPE, Chain, addition_of, is_addition, recorded, seed_of
from esper_passes._torch_internals import nn_functions

__all__ = ["Addend", "Emitter", "LinearMap", "Shares", "addends", "needs_gradient"]

_LINEAR = nn_functions.linear


@dataclass(frozen=True)
class LinearMap:
    """`weight h + bias`, to so many `features`, by a weight of so many `elements`."""

    features: int
    elements: int
    h: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class Addend:
    """`node`, which the sum has with the share at `index`: 0 is the base's, i that of the i-th kernel."""

    index: int
    node: fx.Node
    linear: LinearMap | None = None


def addends(chain: Chain) -> list[Addend]:
    """What `chain` adds up, kernels in order."""
    found = _parts(0, chain.base, chain)
    for index, (before, blend, output) in enumerate(zip(chain.before, chain.blends, chain.kernels, strict=True), 1):
        found += _parts(index, output, chain, before, addition_of(before, blend))
    return found


def _parts(
    index: int,
    node: fx.Node,
    chain: Chain,
    before: fx.Node | None = None,
    addition: Collection[fx.Node] = (),
) -> list[Addend]:
    """What `node` adds up, without `before` where it stands in `addition`."""
    if node in addition:
        (other,) = (argument for argument in node.args if isinstance(argument, fx.Node) and argument is not before)
        return _parts(index, other, chain)
    if node is chain.host:
        return [Addend(index, node, _arguments(node))]
    if seed_of(node)[0] != chain.call:
        return [Addend(index, node)]
    if node.target is TO_DTYPE and isinstance(node.args[0], fx.Node):  # the base, if that is a fossil's output
        return _parts(index, node.args[0], chain)
    if is_addition(node):
        terms = [argument for argument in node.args if isinstance(argument, fx.Node)]
        parts = [part for term in terms for part in _parts(index, term, chain, before, addition)]
        if any(part.linear is not None for part in parts) or _reaches(node, addition):
            return parts
    linear = _arguments(node)
    return [Addend(index, node, linear if linear is not None and _is_last_layer(node, linear) else None)]


def _reaches(node: fx.Node, addition: Collection[fx.Node]) -> bool:
    """Whether `node` is one of the additions that lead to `addition`."""
    return node in addition or (is_addition(node) and any(_reaches(term, addition) for term in node.all_input_nodes))


def _arguments(node: fx.Node) -> LinearMap | None:
    if node.target is not _LINEAR or node.kwargs:
        return None
    h, weight, bias = (*node.args, None)[:3]
    shape = _shape(weight)
    if isinstance(h, fx.Node) and isinstance(weight, fx.Node) and isinstance(bias, fx.Node | None) and len(shape) == 2:
        return LinearMap(shape[0], shape[0] * shape[1], h, weight, bias)
    return None


def _is_last_layer(node: fx.Node, linear: LinearMap) -> bool:
    """Whether `node` is a map by parameters of the kernel, which nothing else uses."""
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return (
        len(node.users) == 1
        and all(PARAMETER in parameter.meta for parameter in parameters)
        and (linear.bias is None or _shape(linear.bias) == (linear.features,))
        and _has_rows(linear.h)
    )


def _shape(node: object) -> tuple[int, ...]:
    """The shape of `node`'s value, empty where that is not known."""
    value = recorded(node)
    return () if value is None else tuple(value.shape)


def _has_rows(node: fx.Node) -> bool:
    """Whether a kernel's value depends on its input, and so has the input's leading dimensions."""
    if not seed_of(node)[0]:
        return PARAMETER not in node.meta
    return any(_has_rows(given) for given in node.all_input_nodes)


def needs_gradient(node: fx.Node) -> bool:
    """Whether a backward may need the gradient with respect to `node`, a kernel's value.

    What the host computes counts as needing it: of that, records may have the shape and the dtype alone.
    """
    if not seed_of(node)[0]:
        value = recorded(node) if node.op == "placeholder" else None
        return value is None or value.requires_grad
    return node.target is not torch.detach and any(needs_gradient(given) for given in node.all_input_nodes)


class Emitter:
    """Adds calls to the graph before `end`, with what of its metadata is to be kept."""

    def __init__(self, end: fx.Node) -> None:
        self._end = end
        self._meta = carried(end)

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self._end.graph.inserting_before(self._end):
            node = self._end.graph.call_function(target, args, kwargs)
        node.meta = dict(self._meta)
        return node


class Shares:
    """The vector `[c_0, ..., c_n]` of a chain, in `dtype`, added to the graph when it is first asked for."""

    def __init__(self, chain: Chain, dtype: torch.dtype, emit: Emitter) -> None:
        self._chain = chain
        self._dtype = dtype
        self._emit = emit
        self._single: dict[int, fx.Node] = {}

    @cached_property
    def all(self) -> fx.Node:
        """`[n + 1]`."""
        emit, keeps, count = self._emit, self._chain.keeps, len(self._chain.alphas) + 1
        alphas = emit(nn_functions.pad, self._vector(self._chain.alphas), (1, 0), "constant", 1.0)
        if all(keeps):
            return alphas
        replaced = alphas
        if any(keeps):
            blended = [0.0 if kept else alpha for alpha, kept in zip(self._chain.alphas, keeps, strict=True)]
            replaced = emit(nn_functions.pad, self._vector(blended), (1, 0), "constant", 1.0)
        left = emit(torch.broadcast_to, emit(torch.rsub, replaced, 1), (count, count))  # what each leaves of the others
        ones = emit(torch.tril, emit(torch.ones_like, left))
        return emit(torch.mul, alphas, emit(torch.prod, emit(torch.add, emit(torch.triu, left, 1), ones), 1))

    def some(self, indices: Sequence[int]) -> fx.Node:
        """Those at `indices`, in that order: `[len(indices)]`."""
        first, count = indices[0], len(indices)
        if list(indices) != list(range(first, first + count)):
            return self._emit(torch.stack, [self.one(index) for index in indices])
        return self.all if count == len(self._chain.alphas) + 1 else self._emit(torch.narrow, self.all, 0, first, count)

    def one(self, index: int) -> fx.Node:
        """That at `index`, a tensor without dimensions."""
        if index not in self._single:
            self._single[index] = self._emit(torch.select, self.all, 0, index)
        return self._single[index]

    def _vector(self, alphas: Sequence[fx.Node | float]) -> fx.Node:
        """`[n]`: a part of the graph's vector of alphas, or put together where some are numbers."""
        emit = self._emit
        selects = [alpha for alpha in alphas if isinstance(alpha, fx.Node)]
        if len(selects) == len(alphas):
            places: list[Any] = [select.args[2] for select in selects]
            if places == list(range(places[0], places[0] + len(places))):
                return emit(TO_DTYPE, emit(torch.narrow, selects[0].args[0], 0, places[0], len(places)), self._dtype)
        vector = next(
            node for node in self._chain.end.graph.nodes if node.op == "placeholder" and node.target == ALPHAS
        )
        like = emit(torch.select, vector, 0, 0)
        return emit(
            torch.stack,
            [
                emit(TO_DTYPE, alpha, self._dtype)
                if isinstance(alpha, fx.Node)
                else emit(torch.full_like, like, alpha, dtype=self._dtype)
                for alpha in alphas
            ],
        )
