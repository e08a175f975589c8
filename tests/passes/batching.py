"""What the tests of passes over inlined kernels share: graphs with kernels in them, and blueprints' kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from esper.artifacts import Blueprint
from esper.torch_internals import fake_inputs, fake_like
from esper_passes import BatchSeeds, Callback, ElideDormant, GraphPass, InlineKernels, Pipeline, SeedGraph, verify
from tests.passes.graphs import capture_with_inputs, copied

__all__ = ["TWO", "Seeds", "apply", "inlined", "linear_seed", "of_blueprint", "with_seeds"]

Seeds = Mapping[int, Sequence[tuple[SeedGraph, Sequence[Tensor]]]]
"""By site, seeds with the values of their parameters."""

TWO = BatchSeeds(min_seeds=2)
"""Batches wherever it can, which takes two."""


def of_blueprint(blueprint: Blueprint, isolate: bool = False, learns: bool = True) -> tuple[SeedGraph, list[Tensor]]:
    """A seed with the kernel of `blueprint` and its parameters' values."""
    graph, tensors = blueprint.build()
    values = [tensors[name].clone().requires_grad_(learns) for name in graph.tensor_names]
    return SeedGraph(graph.to_fx(), graph.parameter_names, graph.uses_host, isolate), values


def linear_seed(start: int) -> tuple[SeedGraph, list[Tensor]]:
    """A seed with a kernel of two linear layers, 4 to 2 to 4 features; `start` is the seed of its initialisation."""
    return of_blueprint(Blueprint.low_rank(4, 4, 2, start="kaiming", seed=start))


def inlined(
    model: Callable[..., Any], x: Tensor, seeds: Seeds, alphas: Tensor, dynamic: bool = False
) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of `model` with `seeds` in it and no markers, and its inputs, the last of which is `alphas`."""
    module, given = capture_with_inputs(model, x, dynamic=dynamic)
    added = [value for site in sorted(seeds) for _, values in seeds[site] for value in values]
    return with_seeds(module, seeds, alphas), [*given, *added, alphas]


def with_seeds(
    marked: fx.GraphModule, seeds: Seeds, alphas: Tensor, callback: Callback | None = verify
) -> fx.GraphModule:
    """A copy of `marked` with `seeds` in it and no markers; what is known of the parameters is recorded."""
    added = [value for site in sorted(seeds) for _, values in seeds[site] for value in values]
    values = tuple(fake_like([*added, alphas], fake_inputs(marked.graph)))
    graphs = {site: tuple(graph for graph, _ in each) for site, each in seeds.items()}
    return Pipeline((InlineKernels(graphs, values), ElideDormant()), callback)(copied(marked)).graph_module


def apply(
    module: fx.GraphModule, *passes: GraphPass, callback: Callback | None = verify
) -> tuple[fx.GraphModule, bool]:
    """A copy of `module` after `passes`, verified after each, and whether they modified it."""
    result = Pipeline(passes, callback)(copied(module))
    return result.graph_module, result.modified
