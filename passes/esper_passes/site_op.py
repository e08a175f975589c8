"""The marker operators that stand in a graph until a pass rewrites them, and the questions one asks about them.

- `esper::site(Tensor x, Tensor weight, Tensor? bias, int site) -> Tensor` marks the call of a linear layer. Run as it
  stands it is `torch.nn.functional.linear(x, weight, bias)`, the dormant path.
- `esper::enter(int runtime) -> ()` marks the beginning of a model's forward. Run as it stands it does nothing, and
  dead-code elimination leaves it alone.

`site` and `runtime` are plain integers that whoever places the markers chooses.

- `esper::tagged_site(Tensor x, Tensor weight, Tensor? bias, Tensor tag) -> Tensor` and
  `esper::tagged_enter(Tensor tag) -> ()` are the same with a *tag*: a tensor of no elements that stands for a site or a
  runtime by being that very tensor. A tracer takes it for an input like any other, so that one graph serves all sites
  and models of one structure. `NumberSites` makes numbers of tags; all other passes know numbers alone.

Questions about a graph look into the graphs nested in it (the body of an activation checkpoint, say), which are
reached through the graph's owning module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from esper_passes._subgraphs import subgraphs
from esper_passes._torch_internals import nn_functions

__all__ = [
    "ENTER",
    "SITE",
    "TAGGED_ENTER",
    "TAGGED_SITE",
    "SiteCall",
    "is_enter",
    "is_site",
    "make_linear",
    "markers_in",
    "number",
    "runtimes_in",
    "site_call",
    "site_calls_in",
    "site_id",
    "sites_in",
    "tag_of",
]

_LIBRARY: Any = torch.library.Library("esper", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types here
_LIBRARY.define(
    "site(Tensor x, Tensor weight, Tensor? bias, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "tagged_site(Tensor x, Tensor weight, Tensor? bias, Tensor tag) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("enter(int runtime)", "tagged_enter(Tensor tag)"):
    _LIBRARY.define(f"{_name} -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _dormant(x: Tensor, weight: Tensor, bias: Tensor | None, _: int | Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def _nothing(_: int | Tensor) -> None:
    return None


for _name in ("site", "tagged_site"):
    _LIBRARY.impl(_name, _dormant, "CompositeImplicitAutograd")
    _LIBRARY.impl(_name, _dormant, "FuncTorchBatchedDecomposition")  # else vmap loops over the batch, and warns
for _name in ("enter", "tagged_enter"):
    _LIBRARY.impl(_name, _nothing, "CompositeExplicitAutograd")
    torch.library.register_fake(f"esper::{_name}", _nothing, lib=_LIBRARY)

SITE = torch.ops.esper.site.default
ENTER = torch.ops.esper.enter.default
TAGGED_SITE = torch.ops.esper.tagged_site.default
TAGGED_ENTER = torch.ops.esper.tagged_enter.default

_SITES = (SITE, torch.ops.esper.site)  # Dynamo records whichever of the two the traced code called
_ENTERS = (ENTER, torch.ops.esper.enter)
_TAGGED = {
    TAGGED_SITE: SITE,
    torch.ops.esper.tagged_site: SITE,
    TAGGED_ENTER: ENTER,
    torch.ops.esper.tagged_enter: ENTER,
}
for _target in (*_ENTERS, TAGGED_ENTER, torch.ops.esper.tagged_enter):
    fx.node.has_side_effect(_target)


class SiteCall(NamedTuple):
    """What a site node was called with."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    site: int


def is_site(node: fx.Node) -> bool:
    """Whether `node` calls `esper::site`."""
    return node.op == "call_function" and node.target in _SITES


def is_enter(node: fx.Node) -> bool:
    """Whether `node` calls `esper::enter`."""
    return node.op == "call_function" and node.target in _ENTERS


def site_call(node: fx.Node) -> SiteCall:
    """The arguments of a site node, however they were passed.

    Raises `ValueError` if `node` is no site, or if its tensors are no nodes or its id is no plain integer.
    """
    if not is_site(node):
        raise ValueError(f"node {node.name!r} is no esper::site call: {node.format_node()}")
    names = ("x", "weight", "bias", "site")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, bias, site = (given.get(name) for name in names)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node | None):
        raise ValueError(f"site {node.name!r} was not called with tensors: {node.format_node()}")
    return SiteCall(x, weight, bias, _constant(node, site))


def site_id(node: fx.Node) -> int:
    """The id that a site node was called with. Raises `ValueError` as :func:`site_call` does."""
    return site_call(node).site


def markers_in(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """The markers of `graph` and the ids of their sites and runtimes, in order."""
    for node in graph.nodes:
        if is_site(node):
            yield node, site_id(node)
        elif is_enter(node):
            yield node, _constant(node, node.args[0] if node.args else node.kwargs.get("runtime"))
        for _, module in subgraphs(node):
            yield from markers_in(module.graph)


def site_calls_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the sites that `graph` calls, in order, one for each call."""
    return tuple(number for node, number in markers_in(graph) if is_site(node))


def sites_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the sites that `graph` calls, in order of first use, each once."""
    return tuple(dict.fromkeys(site_calls_in(graph)))


def runtimes_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the runtimes that `graph` enters, in order of first use, each once."""
    return tuple(dict.fromkeys(number for node, number in markers_in(graph) if is_enter(node)))


def tag_of(node: fx.Node) -> fx.Node | None:
    """The tag with which `node` calls a tagged marker, None if it calls none. Raises `ValueError` if it is no node."""
    if node.op != "call_function" or node.target not in _TAGGED:
        return None
    tag = node.kwargs.get("tag", node.args[-1] if node.args else None)
    if not isinstance(tag, fx.Node):
        raise ValueError(f"the tag in {node.name!r} is no tensor of the graph: {node.format_node()}")
    return tag


def number(node: fx.Node, number: int) -> None:
    """Turn a tagged marker, in place, into the one with `number`. The node keeps its name and its metadata."""
    marker = _TAGGED[node.target]
    names = ("x", "weight", "bias")
    given = {**dict(zip(names, node.args[:-1] if "tag" not in node.kwargs else node.args, strict=False)), **node.kwargs}
    node.args = (*(given.get(name) for name in names), number) if marker is SITE else (number,)
    node.target, node.kwargs = marker, {}


def make_linear(node: fx.Node) -> None:
    """Turn a site node, in place, into the linear call that it marks: `torch._C._nn.linear(x, weight, bias)`.

    That is what Dynamo records for an `nn.Linear`. The node keeps its name and its metadata.
    """
    x, weight, bias, _ = site_call(node)
    node.target = nn_functions.linear
    node.args, node.kwargs = (x, weight, bias), {}


def _constant(node: fx.Node, value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"the id in {node.name!r} is not a constant: {node.format_node()}")
    return value
