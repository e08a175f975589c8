"""The marker operators that stand in a graph until a pass rewrites them, and the questions one asks about them.

- `esper::site(Tensor x, Tensor weight, Tensor? bias, int site) -> Tensor` marks the call of a linear layer. Run as it
  stands it is `torch.nn.functional.linear(x, weight, bias)`, the dormant path.
- `esper::module_site(Tensor x, Tensor y, int site) -> Tensor` stands behind the call of any other module, which has
  made `y` of `x`. Run as it stands it is `y`.
- `esper::enter(int runtime) -> ()` marks the beginning of a model's forward. Run as it stands it does nothing, and
  dead-code elimination leaves it alone.

`site` and `runtime` are plain integers that whoever places the markers chooses.

- `esper::tagged_site(Tensor x, Tensor weight, Tensor? bias, Tensor tag) -> Tensor`,
  `esper::tagged_module_site(Tensor x, Tensor y, Tensor tag) -> Tensor` and `esper::tagged_enter(Tensor tag) -> ()` are
  the same with a *tag*: a tensor of no elements that stands for a site or a
  runtime by being that very tensor. A tracer takes it for an input like any other, so that one graph serves all sites
  and models of one structure. `NumberSites` makes numbers of tags; all other passes know numbers alone.

Questions about a graph look into the graphs nested in it (the body of an activation checkpoint, say), which are
reached through the graph's owning module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from esper_passes._subgraphs import subgraphs
from esper_passes._torch_internals import nn_functions

__all__ = [
    "ENTER",
    "MODULE_SITE",
    "SITE",
    "TAGGED_ENTER",
    "TAGGED_MODULE_SITE",
    "TAGGED_SITE",
    "SiteCall",
    "host_of",
    "is_enter",
    "is_module_site",
    "is_site",
    "make_dormant",
    "markers_in",
    "number",
    "runtimes_in",
    "site_call",
    "site_calls_in",
    "site_id",
    "site_input",
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
for _name in ("module_site(Tensor x, Tensor(a) y, int site)", "tagged_module_site(Tensor x, Tensor(a) y, Tensor tag)"):
    _LIBRARY.define(f"{_name} -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
for _name in ("enter(int runtime)", "tagged_enter(Tensor tag)"):
    _LIBRARY.define(f"{_name} -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _dormant(x: Tensor, weight: Tensor, bias: Tensor | None, _: int | Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def _behind(_: Tensor, y: Tensor, __: int | Tensor) -> Tensor:
    return y


def _nothing(_: int | Tensor) -> None:
    return None


for _name in ("site", "tagged_site", "module_site", "tagged_module_site"):
    _path = _behind if "module" in _name else _dormant
    _LIBRARY.impl(_name, _path, "CompositeImplicitAutograd")
    _LIBRARY.impl(_name, _path, "FuncTorchBatchedDecomposition")  # else vmap loops over the batch, and warns
for _name in ("enter", "tagged_enter"):
    _LIBRARY.impl(_name, _nothing, "CompositeExplicitAutograd")
    torch.library.register_fake(f"esper::{_name}", _nothing, lib=_LIBRARY)

SITE = torch.ops.esper.site.default
MODULE_SITE = torch.ops.esper.module_site.default
ENTER = torch.ops.esper.enter.default
TAGGED_SITE = torch.ops.esper.tagged_site.default
TAGGED_MODULE_SITE = torch.ops.esper.tagged_module_site.default
TAGGED_ENTER = torch.ops.esper.tagged_enter.default

_LINEAR_SITES = (SITE, torch.ops.esper.site)  # Dynamo records whichever of the two the traced code called
_MODULE_SITES = (MODULE_SITE, torch.ops.esper.module_site)
_ENTERS = (ENTER, torch.ops.esper.enter)
_TAGGED = {
    TAGGED_SITE: SITE,
    torch.ops.esper.tagged_site: SITE,
    TAGGED_MODULE_SITE: MODULE_SITE,
    torch.ops.esper.tagged_module_site: MODULE_SITE,
    TAGGED_ENTER: ENTER,
    torch.ops.esper.tagged_enter: ENTER,
}
for _target in (*_ENTERS, TAGGED_ENTER, torch.ops.esper.tagged_enter):
    fx.node.has_side_effect(_target)


_ARGUMENTS = {SITE: ("x", "weight", "bias"), MODULE_SITE: ("x", "y"), ENTER: ()}
"""What the markers are called with before their number or tag."""


class SiteCall(NamedTuple):
    """What the site of a linear layer was called with."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    site: int


def is_site(node: fx.Node) -> bool:
    """Whether `node` calls `esper::site` or `esper::module_site`."""
    return node.op == "call_function" and (node.target in _LINEAR_SITES or node.target in _MODULE_SITES)


def is_module_site(node: fx.Node) -> bool:
    """Whether `node` calls `esper::module_site`."""
    return node.op == "call_function" and node.target in _MODULE_SITES


def is_enter(node: fx.Node) -> bool:
    """Whether `node` calls `esper::enter`."""
    return node.op == "call_function" and node.target in _ENTERS


def site_call(node: fx.Node) -> SiteCall:
    """The arguments of the site of a linear layer, however they were passed.

    Raises `ValueError` if `node` is no such site, or if its tensors are no nodes or its id is no plain integer.
    """
    if not is_site(node) or is_module_site(node):
        raise ValueError(f"node {node.name!r} is no esper::site call: {node.format_node()}")
    x, weight, bias, site = _given(node, (*_ARGUMENTS[SITE], "site"))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node | None):
        raise ValueError(f"site {node.name!r} was not called with tensors: {node.format_node()}")
    return SiteCall(x, weight, bias, _constant(node, site))


def site_id(node: fx.Node) -> int:
    """The id that a site node was called with. Raises `ValueError` as :func:`site_call` does."""
    return _module_site_call(node)[2] if is_module_site(node) else site_call(node).site


def site_input(node: fx.Node) -> fx.Node:
    """What the layer or module of a site was called with. Raises `ValueError` as :func:`site_call` does."""
    return _module_site_call(node)[0] if is_module_site(node) else site_call(node).x


def host_of(node: fx.Node) -> fx.Node:
    """The node of what the host computes at a site: the site itself, for a linear layer."""
    return _module_site_call(node)[1] if is_module_site(node) else node


def _module_site_call(node: fx.Node) -> tuple[fx.Node, fx.Node, int]:
    x, y, site = _given(node, (*_ARGUMENTS[MODULE_SITE], "site"))
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        raise ValueError(f"site {node.name!r} was not called with tensors: {node.format_node()}")
    return x, y, _constant(node, site)


def _given(node: fx.Node, names: Sequence[str]) -> list[Any]:
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [given.get(name) for name in names]


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
    node.args = (*_given(node, (*_ARGUMENTS[marker], "tag"))[:-1], number)
    node.target, node.kwargs = marker, {}


def make_dormant(node: fx.Node) -> None:
    """Turn a site node into what stood there.

    That of a linear layer becomes in place the call that it marks, `torch._C._nn.linear(x, weight, bias)`, which is
    what Dynamo records for an `nn.Linear`; the node keeps its name and its metadata. That of another module goes.
    """
    if is_module_site(node):
        node.replace_all_uses_with(host_of(node))
        node.graph.erase_node(node)
        return
    x, weight, bias, _ = site_call(node)
    node.target = nn_functions.linear
    node.args, node.kwargs = (x, weight, bias), {}


def _constant(node: fx.Node, value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"the id in {node.name!r} is not a constant: {node.format_node()}")
    return value
