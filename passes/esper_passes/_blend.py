"""The arithmetic of a site with active seeds, as nodes. Shared by the passes that place kernels.

    y = linear(x, weight, bias), or what another module has made of x
    for each seed s, in order:  y = a_s * K_s(x[, y]) + (1 - a_s) * y        as  torch.lerp(y, K_s, a_s)

A kernel that reads the site's output, which its graph calls `host`, is given what the seeds before it have made of it.

`isolate` detaches what the kernel is given. The kernel's output and the alpha take the dtype of `y`: in an autocast
region the linear's output is in the lower precision, and `lerp` wants one dtype.

Every node that a seed adds says which in `meta[SEED]`: the name of the site's node, which is another one for each
call of a site, and the seed's position there. The passes that come later know kernels and blends by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import fx

from esper_passes.site_op import host_of, is_module_site, make_dormant, site_input

__all__ = [
    "ALPHAS",
    "PARAMETER",
    "SEED",
    "TYPE_AS",
    "Emit",
    "Seed",
    "after_placeholders",
    "blend",
    "carried",
    "first_indices",
]

ALPHAS = "esper_alphas"
"""Target of the placeholder whose entries are the alphas, and the name of it unless that was taken."""

SEED = "esper_seed"
"""Key in `node.meta`: `(name of the site's node, position)` of the seed that the node was added for."""

PARAMETER = "esper_parameter"
"""Key in `node.meta`, true for the placeholders of kernels' parameters."""

_CARRIED = ("stack_trace", "nn_module_stack", "custom")  # what tells a reader or a profiler where a node comes from

# An operator overload, since AOTAutograd's cache gives up on a `call_method` node that has no `example_value`.
TYPE_AS = torch.ops.aten.type_as.default


class Seed(Protocol):
    """What the blend has to know of an active seed."""

    @property
    def uses_host(self) -> bool: ...

    @property
    def isolate(self) -> bool: ...


_Seed = TypeVar("_Seed", bound=Seed)
Emit = Callable[[int, tuple[fx.Node, ...]], fx.Node]
"""Adds the kernel at a position of the site, called on `(x,)` or `(x, y)`, and returns its output."""


def first_indices(seeds: Mapping[int, Sequence[_Seed]]) -> dict[int, int]:
    """For each site, ascending, the index of its first seed among all active seeds: its place among the alphas."""
    indices: dict[int, int] = {}
    total = 0
    for site in sorted(seeds):
        indices[site] = total
        total += len(seeds[site])
    return indices


def blend(node: fx.Node, seeds: Sequence[Seed], alphas: fx.Node, first: int, emit: Emit) -> None:
    """Put what the host computes at the site `node`, followed by its kernels, in the place of the site.

    `alphas` is a 1-D tensor whose entries from `first` on belong to `seeds`. A linear call stays the same node.
    """
    graph, end = node.graph, node.next
    x, host, name = site_input(node), host_of(node), node.name
    if not is_module_site(node):
        make_dormant(node)
    y, meta = host, carried(node)
    added: set[fx.Node] = set()
    with graph.inserting_before(end):
        for position, seed in enumerate(seeds):
            last = end.prev
            given: tuple[fx.Node, ...] = (x, y) if seed.uses_host else (x,)
            if seed.isolate:
                given = tuple(graph.call_function(torch.detach, (value,)) for value in given)
            kernel = graph.call_function(TYPE_AS, (emit(position, given), host))
            alpha = graph.call_function(torch.select, (alphas, 0, first + position))
            y = graph.call_function(torch.lerp, (y, kernel, graph.call_function(TYPE_AS, (alpha, host))))
            new = last.next
            while new is not end:
                new.meta = {**meta, SEED: (name, position)}
                added.add(new)
                new = new.next
    node.replace_all_uses_with(y, delete_user_cb=lambda user: user not in added)
    if node is not host:
        graph.erase_node(node)


def carried(node: fx.Node) -> dict[str, Any]:
    """What the nodes that are added for `node` keep of its metadata."""
    return {key: node.meta[key] for key in _CARRIED if key in node.meta}


def after_placeholders(graph: fx.Graph) -> fx.Node:
    """The node to insert before, for what is to stand after all placeholders and before anything else."""
    last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    first: fx.Node = next(iter(graph.nodes))
    return first if last is None else last.next
