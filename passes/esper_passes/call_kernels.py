"""`CallKernels`: sites with active seeds become linear, calls of kernels and blends, for a graph that runs eagerly."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from esper_passes._blend import after_placeholders, blend, first_indices
from esper_passes._subgraphs import rewrite_bodies
from esper_passes.base import PassResult
from esper_passes.site_op import is_site, site_id

__all__ = ["CallKernels", "SeedCall"]


@dataclass(frozen=True)
class SeedCall:
    """An active seed: what to call, as `function(x)` or with `uses_host` as `function(x, host)`, and how.

    `isolate` detaches what the kernel is given.
    """

    function: Callable[..., Any]
    uses_host: bool
    isolate: bool


@dataclass(frozen=True)
class CallKernels:
    """Blend the kernels of `seeds`, which maps site ids to active seeds in index order, into the graph by calling them.

    `alphas` is called once in each forward, before anything else, and returns a fresh 1-D tensor with one entry for
    each active seed: sites ascending, seeds in order. What the arithmetic is, `_blend.py` says.
    """

    name: ClassVar[str] = "call_kernels"
    seeds: Mapping[int, tuple[SeedCall, ...]]
    alphas: Callable[[], Tensor]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, self._rewrite(graph_module))

    def _rewrite(self, module: fx.GraphModule) -> bool:
        seeds = {site: self.seeds[site] for site in sorted(self.seeds) if self.seeds[site]}
        modified = rewrite_bodies(module, self._rewrite)
        graph = module.graph
        nodes = [node for node in graph.nodes if is_site(node) and site_id(node) in seeds]
        if not nodes:
            return modified
        first = first_indices(seeds)
        with graph.inserting_before(after_placeholders(graph)):
            alphas = graph.call_function(_printable(self.alphas, "esper_alphas"))
        for node in nodes:
            site = site_id(node)
            blend(node, seeds[site], alphas, first[site], _emitter(graph, site, seeds[site]))
        module.recompile()
        return True


def _emitter(graph: fx.Graph, site: int, seeds: tuple[SeedCall, ...]) -> Callable[[int, tuple[fx.Node, ...]], fx.Node]:
    def emit(position: int, given: tuple[fx.Node, ...]) -> fx.Node:
        return graph.call_function(_printable(seeds[position].function, f"esper_kernel_{site}_{position}"), given)

    return emit


def _printable(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, under a wrapper if torch.fx cannot write its name into generated code (a module, a partial)."""
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType) and function.__name__.isidentifier():
        return function

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = call.__qualname__ = name
    return call
