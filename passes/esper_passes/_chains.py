"""Blends as they stand in a graph: the chain of `lerp` that `_blend.py` builds at the call of a site, read back.

    y_0 = base;  y_i = y_(i-1) + alpha_i * (kernel_i - y_(i-1));  the site's value is the last y

`FoldFossils` may have shortened it: an alpha is then a number, and the base the output of a kernel.

Where kernel_i reads y_(i-1), and does so in one final addition and nowhere else, y_i is a sum still, of y_(i-1) and
alpha_i times the rest. A kernel that reads it in another way needs its value, and a chain begins there anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from esper_passes._blend import ALPHAS, SEED, TYPE_AS
from esper_passes._torch_internals import nn_functions

__all__ = [
    "TO_DTYPE",
    "Chain",
    "addition_of",
    "alpha_index",
    "cast_of",
    "chains",
    "erase_dead",
    "is_addition",
    "is_blend",
    "recorded",
    "release",
    "seed_of",
]

TO_DTYPE = torch.ops.aten.to.dtype


@dataclass(frozen=True)
class Chain:
    """One blend.

    `base` is what the first kernel is blended with, `blends` are the `lerp` nodes in order, `kernels` the outputs of
    the kernels before they are cast to the site's `dtype`, `alphas` one `select` or number for each. `host` is the
    site's linear call, None if there is nothing left of it. `dtype` is None if it is not known. `keeps` says of each
    kernel whether it is added to what was there before it, which :attr:`before` names.
    """

    host: fx.Node | None
    dtype: torch.dtype | None
    base: fx.Node
    blends: tuple[fx.Node, ...]
    kernels: tuple[fx.Node, ...]
    alphas: tuple[fx.Node | float, ...]
    keeps: tuple[bool, ...]

    @property
    def before(self) -> tuple[fx.Node, ...]:
        """What each kernel is blended with."""
        return (self.base, *self.blends[:-1])

    @property
    def end(self) -> fx.Node:
        """The last blend, which is the value of the site."""
        return self.blends[-1]

    @property
    def call(self) -> str:
        """What the nodes of all seeds of this call have in common."""
        return seed_of(self.end)[0]


def seed_of(node: fx.Node) -> tuple[str, int]:
    """The call and the position of the seed that `node` was added for; `("", -1)` for a node of the host."""
    seed: tuple[str, int] = node.meta.get(SEED, ("", -1))
    return seed


def is_blend(node: fx.Node) -> bool:
    """Whether `node` is the `lerp` that blends a kernel in."""
    if node.op != "call_function" or node.target is not torch.lerp or SEED not in node.meta:
        return False
    y, kernel, alpha = node.args
    known = isinstance(alpha, float) or alpha_index(node) is not None
    return isinstance(y, fx.Node) and _is_cast(kernel) and known


def alpha_index(blend: fx.Node) -> int | None:
    """The index among the alphas of the seed that `blend` blends in; None if its alpha is a number."""
    cast: Any = blend.args[2]
    if not _is_cast(cast) or cast.args[0].target is not torch.select:
        return None
    alphas, _, index = cast.args[0].args
    return index if isinstance(index, int) and alphas.target == ALPHAS else None


def cast_of(blend: fx.Node) -> tuple[fx.Node, fx.Node | None, torch.dtype | None]:
    """The kernel's output in `blend`; the site's linear call, and its dtype, as far as they are known."""
    cast: Any = blend.args[1]
    kernel, to = cast.args
    if isinstance(to, torch.dtype):
        return kernel, None, to
    value = recorded(to)
    return kernel, to, None if value is None else value.dtype


def _is_cast(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in (TYPE_AS, TO_DTYPE) and isinstance(node.args[0], fx.Node)


def chains(graph: fx.Graph) -> Iterator[Chain]:
    """The blends of `graph` itself, in the order of their calls; each as it is when its turn comes."""
    by_call: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_blend(node):
            by_call.setdefault(seed_of(node)[0], []).append(node)
    for blends in by_call.values():
        for linked in _linked(blends):
            yield _chain(linked)


def _linked(blends: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """`blends`, divided where the value between two of them is used by more than the sum."""
    linked: list[list[fx.Node]] = []
    for blend in blends:
        before = linked[-1][-1] if linked else None
        if before is not None and blend.args[0] is before and _readers(before, blend) == addition_of(before, blend):
            linked[-1].append(blend)
        else:
            linked.append([blend])
    return linked


def _readers(value: fx.Node, blend: fx.Node) -> set[fx.Node]:
    return {user for user in value.users if user is not blend}


def addition_of(value: fx.Node, blend: fx.Node) -> set[fx.Node]:
    """The addition by which the kernel of `blend` adds something to `value`, if that is what its output is."""
    pending = [cast_of(blend)[0]]
    while pending:
        node = pending.pop()
        if not is_addition(node):
            continue
        if [argument is value for argument in node.args].count(True) == 1:
            return {node}
        pending += [argument for argument in node.args if isinstance(argument, fx.Node)]
    return set()


def is_addition(node: fx.Node) -> bool:
    """Whether `node` is a sum of two that a kernel computes, and of which only one thing is made."""
    plain = node.target is torch.add and not node.kwargs and len(node.users) == 1 and bool(seed_of(node)[0])
    return plain and all(isinstance(argument, fx.Node) for argument in node.args)


def _chain(blends: Sequence[fx.Node]) -> Chain:
    base, _, _ = blends[0].args
    _, host, dtype = cast_of(blends[0])
    alphas: list[Any] = [blend.args[2] for blend in blends]
    assert isinstance(base, fx.Node)
    return Chain(
        host,
        dtype,
        base,
        tuple(blends),
        tuple(cast_of(blend)[0] for blend in blends),
        tuple(alpha if isinstance(alpha, float) else alpha.args[0] for alpha in alphas),
        tuple(bool(addition_of(before, blend)) for before, blend in zip((base, *blends), blends, strict=False)),
    )


def recorded(node: object) -> Tensor | None:
    """The example value that is recorded at `node`, if there is one and it is a tensor."""
    if not isinstance(node, fx.Node):
        return None
    values = (node.meta.get(key) for key in ("example_value", "val"))
    return next((value for value in values if isinstance(value, Tensor)), None)


def erase_dead(graph: fx.Graph, call: str) -> None:
    """Erase what the seeds of `call` added and nothing uses any more."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and seed_of(node)[0] == call:
            graph.erase_node(node)


def release(host: fx.Node) -> None:
    """Let go of what the host computes at a site if nothing uses it, or nothing but its dtype.

    A linear call is erased then. Anything else may be an input, or write to one.
    """
    users, value = list(host.users), recorded(host)
    if users and (value is None or not all(SEED in user.meta and _is_cast_to(user, host) for user in users)):
        return
    for user in users:
        assert value is not None
        user.target, user.args = TO_DTYPE, (user.args[0], value.dtype)
    if host.target is nn_functions.linear:
        host.graph.erase_node(host)


def _is_cast_to(node: fx.Node, host: fx.Node) -> bool:
    return node.target is TYPE_AS and node.args[0] is not host
