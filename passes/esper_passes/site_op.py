"""The marker operators that stand in a graph until a pass rewrites them, and the questions one asks about them.

- `esper::site(Tensor x, Tensor weight, Tensor? bias, int site) -> Tensor` marks the call of a linear layer. Run as it
  stands it is `torch.nn.functional.linear(x, weight, bias)`, the dormant path.
- `esper::enter(int runtime) -> ()` marks the beginning of a model's forward. Run as it stands it does nothing, and
  dead-code elimination leaves it alone.

`site` and `runtime` are plain integers that whoever places the markers chooses.

Questions about a graph look into the graphs nested in it (the body of an activation checkpoint, say), which are
reached through the graph's owning module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from esper_passes._subgraphs import subgraphs

__all__ = [
    "ENTER",
    "SITE",
    "SiteCall",
    "is_enter",
    "is_site",
    "make_linear",
    "runtimes_in",
    "site_call",
    "site_calls_in",
    "site_id",
    "sites_in",
]

_LIBRARY: Any = torch.library.Library("esper", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types here
_LIBRARY.define(
    "site(Tensor x, Tensor weight, Tensor? bias, int site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define("enter(int runtime) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _dormant(x: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> Tensor:
    del site
    return functional.linear(x, weight, bias)


def _nothing(runtime: int) -> None:
    del runtime


_LIBRARY.impl("site", _dormant, "CompositeImplicitAutograd")
_LIBRARY.impl("site", _dormant, "FuncTorchBatchedDecomposition")  # else vmap loops over the batch, and warns
_LIBRARY.impl("enter", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake("esper::enter", _nothing, lib=_LIBRARY)

SITE = torch.ops.esper.site.default
ENTER = torch.ops.esper.enter.default

_SITES = (SITE, torch.ops.esper.site)  # Dynamo records whichever of the two the traced code called
_ENTERS = (ENTER, torch.ops.esper.enter)
for _target in _ENTERS:
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


def site_calls_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the sites that `graph` calls, in order, one for each call."""
    calls: list[int] = []
    for node in graph.nodes:
        if is_site(node):
            calls.append(site_id(node))
        for _, module in subgraphs(node):
            calls.extend(site_calls_in(module.graph))
    return tuple(calls)


def sites_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the sites that `graph` calls, in order of first use, each once."""
    return tuple(dict.fromkeys(site_calls_in(graph)))


def runtimes_in(graph: fx.Graph) -> tuple[int, ...]:
    """The ids of the runtimes that `graph` enters, in order of first use, each once."""
    entered: dict[int, None] = {}
    for node in graph.nodes:
        if is_enter(node):
            entered[_constant(node, node.args[0] if node.args else node.kwargs.get("runtime"))] = None
        for _, module in subgraphs(node):
            entered.update(dict.fromkeys(runtimes_in(module.graph)))
    return tuple(entered)


def make_linear(node: fx.Node) -> None:
    """Turn a site node, in place, into the linear call that it marks: `torch._C._nn.linear(x, weight, bias)`.

    That is what Dynamo records for an `nn.Linear`. The node keeps its name and its metadata.
    """
    x, weight, bias, _ = site_call(node)
    node.target = torch._C._nn.linear
    node.args, node.kwargs = (x, weight, bias), {}


def _constant(node: fx.Node, value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"the id in {node.name!r} is not a constant: {node.format_node()}")
    return value
