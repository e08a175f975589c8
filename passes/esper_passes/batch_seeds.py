"""`BatchSeeds`: the kernels of one site run together, as few large products instead of many small ones.

A blend is a weighted sum (`_blend_sums.py`), and a kernel ends in a linear map as a rule, K_i = B_i h_i + b_i. The last
layers of all kernels are then one product, however different the kernels are,

    c_1 B_1 h_1 + ... + c_n B_n h_n = [B_1 ... B_n] [c_1 h_1; ...; c_n h_n],

and nothing of the size of the output is made for any one of them. Where h_i is the site's own input, the host takes
part, and (c_0 W + c_1 B_1 + ...) x costs one product of the size of the host's. What comes before the last layers is
stacked, kernels of equal structure at a time (`_stacking.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from esper_passes._blend import TYPE_AS
from esper_passes._blend_sums import Addend, Emitter, LinearMap, Shares, addends, needs_gradient
from esper_passes._chains import TO_DTYPE, Chain, chains, erase_dead, recorded, release, seed_of
from esper_passes._stacking import Stacker
from esper_passes._subgraphs import rewrite_bodies
from esper_passes._torch_internals import nn_functions
from esper_passes.base import PassResult

__all__ = ["BatchSeeds"]

_LINEAR = nn_functions.linear
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class BatchSeeds:
    """Compute the kernels of each site together, where there are `min_seeds` of them that can share a product.

    It follows :class:`InlineKernels` (and :class:`FoldFossils`), and needs the example values of kernels' parameters
    and of the sites' linear calls: what is not recorded stays as it is. A site that is called twice is batched twice.
    Kernels share a product only if a backward needs the same gradients of them. No guard on a size is added.

    Weights are put side by side at each call, which is worth it for enough rows only. On a CPU, and where the number of
    rows is known, weights of more than `elements_per_row` elements for each row stay apart; for kernels that are one
    linear layer, of more than eight times as many, since of these whole products are saved. The defaults are from
    measurements on one thread of a CPU: from four seeds on, and within that bound, nothing was slower.

    Results differ by rounding, since the order of summation is another one. What has a share of 0 adds exact zeros.
    """

    name: ClassVar[str] = "batch_seeds"
    min_seeds: int = 4
    elements_per_row: int = 1024

    def __post_init__(self) -> None:
        if self.min_seeds < 1:
            raise ValueError(f"min_seeds is {self.min_seeds}, and has to be at least 1")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, self._rewrite(graph_module))

    def _rewrite(self, module: fx.GraphModule) -> bool:
        modified = rewrite_bodies(module, self._rewrite)
        batched = [self._batch(chain) for chain in chains(module.graph)]
        if any(batched):
            module.recompile()
        return modified or any(batched)

    def _batch(self, chain: Chain) -> bool:
        if chain.dtype is None:
            return False
        batch = _Batch(chain, chain.dtype)
        groups = batch.groups(self.min_seeds, self._most_elements(chain))
        if groups:
            batch.build(groups)
        return bool(groups)

    def _most_elements(self, chain: Chain) -> float:
        """Of a weight that is put side by side with others."""
        value = recorded(chain.host)
        rows = [] if value is None else list(value.shape[:-1])
        if value is None or value.device.type != "cpu" or not all(isinstance(size, int) for size in rows):
            return math.inf
        return self.elements_per_row * math.prod(rows)


@dataclass(frozen=True)
class _Group:
    """Addends that are computed together, and how."""

    addends: tuple[Addend, ...]
    build: Callable[[Sequence[Addend]], fx.Node]


class _Batch:
    """One blend."""

    def __init__(self, chain: Chain, dtype: torch.dtype) -> None:
        self._chain = chain
        self._dtype = dtype
        self._addends = addends(chain)
        self._emit = emit = Emitter(chain.end)
        self._shares = Shares(chain, torch.promote_types(dtype, torch.float32), emit)
        self._stacker = Stacker(chain.call, emit)

    # -- what goes together ----------------------------------------------------------------------------------------

    def groups(self, min_seeds: int, most_elements: float) -> list[_Group]:
        """What is worth computing together."""
        host = self._chain.host
        left = [addend for addend in self._addends if addend.node is not host or self._host_is_free()]
        found: list[_Group] = []
        for key, build, least, most in (
            (self._input_key, self._summed_weights, 2, 8 * most_elements),
            (self._product_key, self._wide_product, min_seeds, most_elements),
            (self._structure_key, self._summed_stack, min_seeds, math.inf),
        ):
            small = [addend for addend in left if addend.linear is None or addend.linear.elements <= most]
            for group in _by_key(small, key):
                if len(group) >= least and any(addend.node is not host for addend in group):
                    found.append(_Group(tuple(group), build))
                    left = [addend for addend in left if addend not in group]
        return found

    def _host_is_free(self) -> bool:
        """Whether nothing reads the host's own output but what adds it to the sum."""
        host, call = self._chain.host, self._chain.call
        if host is None:
            return False
        others = [addend for addend in self._addends if addend.node is not host]
        computed = [addend.node if addend.linear is None else addend.linear.h for addend in others]
        return all(seed_of(user)[0] == call for user in host.users) and not any(_reads(node, host) for node in computed)

    def _input_key(self, addend: Addend) -> Hashable | None:
        """The common input of linear maps, and the size of their output."""
        if addend.linear is None:
            return None
        h, features = addend.linear.h, addend.linear.features
        if not seed_of(h)[0]:
            return h, features
        return (torch.detach, *h.args, features) if h.target is torch.detach else None

    def _product_key(self, addend: Addend) -> Hashable | None:
        """The output's size, and which gradients a backward needs: one that nobody asked for would be waste."""
        if addend.linear is None or addend.node is self._chain.host:
            return None
        linear = addend.linear
        return linear.features, needs_gradient(linear.weight), needs_gradient(linear.h)

    def _structure_key(self, addend: Addend) -> Hashable | None:
        """What is computed alike and ends in no linear map."""
        alike = addend.linear is None and seed_of(addend.node)[0]
        return self._stacker.signature(addend.node) if alike else None

    # -- how it is computed ----------------------------------------------------------------------------------------

    def build(self, groups: Sequence[_Group]) -> None:
        """Put the sum in the place of the chain."""
        emit, chain = self._emit, self._chain
        grouped = {addend for group in groups for addend in group.addends}
        parts = [group.build(group.addends) for group in groups]
        rest = self._weighted_sum(
            (addend.node if addend.node is chain.host else emit(TO_DTYPE, addend.node, self._dtype), addend.index)
            for addend in self._addends
            if addend not in grouped
        )
        total = self._sum(parts if rest is None else [*parts, rest])
        chain.end.replace_all_uses_with(total)
        erase_dead(chain.end.graph, chain.call)
        if chain.host is not None:
            release(chain.host)

    def _scaled(self, node: fx.Node, indices: Sequence[int]) -> fx.Node:
        """`node` times the sum of the shares at `indices`."""
        if tuple(indices) == (0,) and all(self._chain.keeps):
            return node  # nothing takes any of it away
        share = self._shares.one(indices[0]) if len(indices) == 1 else self._emit(torch.sum, self._shares.some(indices))
        return self._emit(torch.mul, node, share)

    def _sum(self, nodes: Iterable[fx.Node]) -> fx.Node:
        return functools.reduce(functools.partial(self._emit, torch.add), nodes)

    def _weighted_sum(self, terms: Iterable[tuple[fx.Node | None, int]]) -> fx.Node | None:
        """The sum of nodes times their shares; None of nothing."""
        indices: dict[fx.Node, list[int]] = {}
        for node, index in terms:
            if node is not None:
                indices.setdefault(node, []).append(index)
        return self._sum(starmap(self._scaled, indices.items())) if indices else None

    def _summed_weights(self, group: Sequence[Addend]) -> fx.Node:
        """Linear maps of one input: the map whose weight and bias are the weighted sums of theirs."""
        maps = _maps(group)
        weight = self._weighted_sum((each.weight, index) for each, index in maps)
        bias = self._weighted_sum((each.bias, index) for each, index in maps)
        return self._emit(_LINEAR, maps[0][0].h, weight, bias)

    def _wide_product(self, group: Sequence[Addend]) -> fx.Node:
        """Linear maps of different inputs: one of all the inputs side by side, each scaled by its share."""
        emit, maps = self._emit, _maps(group)
        scaled, weights = [], []
        for stack in _by_key(maps, lambda each: self._stacker.signature(each[0].h) or each[0].h):
            weights += [each.weight for each, _ in stack]
            if len(stack) == 1:
                scaled.append(emit(torch.mul, stack[0][0].h, self._shares.one(stack[0][1])))
            else:
                value = self._stacker.stacked([each.h for each, _ in stack])
                scaled.append(emit(torch.flatten, self._times_shares(value, [index for _, index in stack]), -2))
        side_by_side = scaled[0] if len(scaled) == 1 else emit(torch.cat, scaled, -1)
        product = emit(_LINEAR, side_by_side, emit(torch.cat, weights, 1))
        biases = [(each.bias, index) for each, index in maps if each.bias is not None]
        if not biases:
            return product
        value = emit(torch.stack, [bias for bias, _ in biases])
        bias = emit(torch.sum, self._times_shares(value, [index for _, index in biases]), 0)
        return emit(torch.add, product, emit(TO_DTYPE, bias, self._dtype))

    def _summed_stack(self, group: Sequence[Addend]) -> fx.Node:
        """Any outputs of one structure: stacked, scaled and added up."""
        value = self._stacker.stacked([addend.node for addend in group])
        scaled = self._times_shares(value, [addend.index for addend in group])
        return self._emit(TO_DTYPE, self._emit(torch.sum, scaled, -2), self._dtype)

    def _times_shares(self, value: fx.Node, indices: Sequence[int]) -> fx.Node:
        """`value`, `[*, len(indices), features]`, times the shares at `indices`, in its own dtype."""
        share = self._emit(torch.unsqueeze, self._shares.some(indices), -1)
        return self._emit(torch.mul, value, self._emit(TYPE_AS, share, value))


def _maps(group: Iterable[Addend]) -> list[tuple[LinearMap, int]]:
    return [(addend.linear, addend.index) for addend in group if addend.linear is not None]


def _by_key(items: Iterable[_Item], key: Callable[[_Item], Any]) -> list[list[_Item]]:
    """The items of each key that is not None, in order."""
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        if (found := key(item)) is not None:
            groups.setdefault(found, []).append(item)
    return list(groups.values())


def _reads(node: fx.Node, value: fx.Node) -> bool:
    """Whether a kernel computes `node` from `value`."""
    return node is value or (bool(seed_of(node)[0]) and any(_reads(given, value) for given in node.all_input_nodes))
