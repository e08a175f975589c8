"""`InlineKernels`: sites with active seeds become linear, kernels and blends, with their tensors as inputs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from esper_passes._blend import ALPHAS, PARAMETER, after_placeholders, blend, first_indices
from esper_passes._subgraphs import FLAT_OPERANDS, copy_body, subgraphs
from esper_passes.base import PassResult
from esper_passes.site_op import is_site, site_id, sites_in

__all__ = ["InlineKernels", "KernelInput", "SeedGraph", "closed_sites", "inputs"]

KernelInput = tuple[int, int, str]
"""An input that a kernel brings: the site's id, the seed's position at the site, the parameter's name."""


@dataclass(frozen=True)
class SeedGraph:
    """An active seed: its kernel's graph and how it is attached.

    `graph` has the placeholders `x`, then `host` if `uses_host`, then one for each name in `parameters`; after them
    only `call_function` and `call_method` nodes, and one output: the kernel's, [*, out_features].
    `isolate` detaches what the kernel is given. Raises `ValueError` for any other graph.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    uses_host: bool
    isolate: bool

    def __post_init__(self) -> None:
        nodes = list(self.graph.nodes)
        expected = 1 + self.uses_host + len(self.parameters)
        given = sum(node.op == "placeholder" for node in nodes)
        if given != expected:
            raise ValueError(
                f"the kernel's graph has {given} placeholders; x{', host' if self.uses_host else ''} "
                f"and {len(self.parameters)} parameters make {expected}"
            )
        foreign = next((node for node in nodes if node.op in ("get_attr", "call_module")), None)
        if foreign is not None:
            raise ValueError(f"the kernel's graph refers to a module: {foreign.format_node()}")
        if not nodes or nodes[-1].op != "output" or not isinstance(nodes[-1].args[0], fx.Node):
            raise ValueError("the kernel's graph does not end in one output, a tensor")


def inputs(seeds: Mapping[int, Sequence[SeedGraph]]) -> list[KernelInput]:
    """The placeholders that :class:`InlineKernels` appends for `seeds`, in order, without the alphas that come last."""
    return [
        (site, position, name)
        for site in sorted(seeds)
        for position, seed in enumerate(seeds[site])
        for name in seed.parameters
    ]


@dataclass(frozen=True)
class InlineKernels:
    """Blend the kernels of `seeds`, which maps site ids to active seeds in index order, into the graph.

    After the existing placeholders come those that :func:`inputs` lists, and last `esper_alphas`, a 1-D tensor with one
    entry for each active seed, of any float dtype: sites ascending, seeds in order. They are there for every seed that
    is given, even at a site that this graph does not call. A site that is called twice uses its placeholders twice.
    What the arithmetic is, `_blend.py` says. The module is changed in place: while Dynamo still works with a graph,
    which it does until its backend has returned, give this pass a copy.

    `values` are example values of the new placeholders, in their order, fake tensors in a compilation; they are
    recorded as `meta["example_value"]`, from which later passes take shapes, dtypes and whether a parameter learns.

    Raises `ValueError` for a site with seeds inside the body of a higher-order operator that cannot be given further
    operands (everything but activation checkpoints, `wrap` and `invoke_subgraph`), and for another number of values
    than there are new placeholders.
    """

    name: ClassVar[str] = "inline_kernels"
    seeds: Mapping[int, tuple[SeedGraph, ...]]
    values: tuple[torch.Tensor, ...] | None = None

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        seeds = {site: self.seeds[site] for site in sorted(self.seeds) if self.seeds[site]}
        if not seeds:
            return PassResult(graph_module, False)
        _check_reachable(graph_module.graph, seeds)
        _Inlining(seeds, self._values_by_key(seeds)).into(graph_module, list(seeds))
        return PassResult(graph_module, True)

    def _values_by_key(self, seeds: Mapping[int, tuple[SeedGraph, ...]]) -> dict[str, torch.Tensor]:
        if self.values is None:
            return {}
        keys = [*(_key(*entry) for entry in inputs(seeds)), ALPHAS]
        if len(keys) != len(self.values):
            raise ValueError(f"{len(self.values)} example values for the {len(keys)} placeholders that the seeds bring")
        return dict(zip(keys, self.values, strict=True))


class _Inlining:
    """One application of the pass."""

    def __init__(self, seeds: Mapping[int, tuple[SeedGraph, ...]], values: Mapping[str, torch.Tensor]) -> None:
        self._seeds = seeds
        self._values = values
        self._first = first_indices(seeds)

    def into(self, module: fx.GraphModule, sites: Sequence[int]) -> list[str]:
        """Give `module` the placeholders for `sites` and blend them in. Returns the placeholders' keys, in order."""
        graph = module.graph
        added = self._append_placeholders(graph, sites)
        rewritten: dict[str, list[str]] = {}
        for node in list(graph.nodes):
            if is_site(node) and (site := site_id(node)) in self._seeds:
                emit = self._emitter(site, graph, added)
                blend(node, self._seeds[site], added[ALPHAS], self._first[site], emit)
            for reference, body in list(subgraphs(node)):
                target = str(reference.target)
                if target not in rewritten:
                    rewritten[target] = self._into_body(module, target, body)
                node.args = (*node.args, *(added[key] for key in rewritten[target]))
        module.recompile()
        return list(added)

    def _into_body(self, owner: fx.GraphModule, target: str, body: fx.GraphModule) -> list[str]:
        sites = [site for site in self._seeds if site in sites_in(body.graph)]
        if not sites:
            return []
        copied = copy_body(body)
        keys = self.into(copied, sites)
        owner.add_submodule(target, copied)
        return keys

    def _append_placeholders(self, graph: fx.Graph, sites: Sequence[int]) -> dict[str, fx.Node]:
        keys = [_key(*entry) for entry in inputs({site: self._seeds[site] for site in sites})]
        with graph.inserting_before(after_placeholders(graph)):
            added = {key: graph.placeholder(key) for key in [*keys, ALPHAS]}
        for key in keys:
            added[key].meta[PARAMETER] = True
        for key in added.keys() & self._values.keys():
            added[key].meta["example_value"] = self._values[key]
        return added

    def _emitter(
        self, site: int, graph: fx.Graph, added: Mapping[str, fx.Node]
    ) -> Callable[[int, tuple[fx.Node, ...]], fx.Node]:
        def emit(position: int, given: tuple[fx.Node, ...]) -> fx.Node:
            seed = self._seeds[site][position]
            parameters = [added[_key(site, position, name)] for name in seed.parameters]
            placeholders = [node for node in seed.graph.nodes if node.op == "placeholder"]
            output = graph.graph_copy(seed.graph, dict(zip(placeholders, [*given, *parameters], strict=True)))
            assert isinstance(output, fx.Node)  # SeedGraph has seen to it
            return output

        return emit


def closed_sites(graph: fx.Graph) -> frozenset[int]:
    """The sites of `graph` at which no kernel can be inlined, as :class:`InlineKernels` says."""
    closed: set[int] = set()
    for node in graph.nodes:
        for _, body in subgraphs(node):
            inside = sites_in(body.graph) if node.target not in FLAT_OPERANDS else closed_sites(body.graph)
            closed.update(inside)
    return frozenset(closed)


def _check_reachable(graph: fx.Graph, seeds: Container[int]) -> None:
    """Raise `ValueError` if a site with seeds lies where no kernel parameter can be passed to."""
    for node in graph.nodes:
        for _, body in subgraphs(node):
            inside = [site for site in sites_in(body.graph) if site in seeds]
            if inside and node.target not in FLAT_OPERANDS:
                names = f"site{'s' if len(inside) > 1 else ''} {', '.join(map(str, inside))}"
                raise ValueError(
                    f"{names} with active seeds inside {node.target}, whose body cannot be given kernel parameters"
                )
            _check_reachable(body.graph, seeds)


def _key(site: int, position: int, name: str) -> str:
    return f"esper_{site}_{position}_{name}"
