"""`ElideDormant`: sites without an active seed become what stood there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from esper_passes._subgraphs import rewrite_bodies
from esper_passes.base import PassResult
from esper_passes.site_op import is_enter, is_site, make_dormant, site_id

__all__ = ["ElideDormant"]


@dataclass(frozen=True)
class ElideDormant:
    """Turn every site that is not in `active` into `torch._C._nn.linear(x, weight, bias)`, and remove every `enter`.

    That is the call that Dynamo records for an `nn.Linear`, so what is left of a marked model whose seeds all sleep is
    the graph of the plain model. A site's node stays the same node and keeps its name and its metadata. The marker
    behind another module is removed.
    """

    name: ClassVar[str] = "elide_dormant"
    active: frozenset[int] = frozenset()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, self._rewrite(graph_module))

    def _rewrite(self, module: fx.GraphModule) -> bool:
        modified = rewrite_bodies(module, self._rewrite)
        for node in list(module.graph.nodes):
            if is_enter(node):
                module.graph.erase_node(node)
                modified = True
            elif is_site(node) and site_id(node) not in self.active:
                make_dormant(node)
                modified = True
        if modified:
            module.recompile()
        return modified
