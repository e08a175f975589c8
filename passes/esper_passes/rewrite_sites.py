"""`RewriteSites`: the calls of linear layers become site markers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from esper_passes._get_attr import get_attr
from esper_passes._hooks import hooks_of
from esper_passes.base import PassResult
from esper_passes.site_op import SITE

__all__ = ["RewriteSites"]


@dataclass(frozen=True)
class RewriteSites:
    """Turn the calls of the modules named in `sites` into `esper::site(x, weight, bias, id)`.

    `sites` maps a module's dotted name in the graph module to its site id. Such a module has `weight` and `bias`
    (which may be None) and computes `linear(x, weight, bias)`. Both are fetched at each call by `get_attr`. Names that
    the graph does not call are ignored. Raises `ValueError` for a module that has hooks, which no marker would run.
    """

    name: ClassVar[str] = "rewrite_sites"
    sites: Mapping[str, int]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if node.op == "call_module" and node.target in self.sites:
                self._mark(graph_module, node)
                modified = True
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)

    def _mark(self, owner: fx.GraphModule, node: fx.Node) -> None:
        path = str(node.target)
        module: nn.Module = owner.get_submodule(path)
        hooks = hooks_of(module)
        if hooks is not None:
            raise ValueError(f"module {path!r} has {hooks}, which a site would not run")
        graph = node.graph
        (x,) = (*node.args, *node.kwargs.values())
        with graph.inserting_before(node):
            weight = get_attr(graph, f"{path}.weight")
            bias = None if getattr(module, "bias", None) is None else get_attr(graph, f"{path}.bias")
            site = graph.call_function(SITE, (x, weight, bias, self.sites[path]))
        site.meta = dict(node.meta)
        node.replace_all_uses_with(site)
        graph.erase_node(node)
