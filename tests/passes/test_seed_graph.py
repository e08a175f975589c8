"""SeedGraph: which graphs are kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import fx

from esper_passes import SeedGraph
from tests.passes.graphs import low_rank


def _kernel_that_ends_in_two() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((x, x))
    return graph


def _kernel_with_a_module() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SeedGraph(low_rank().graph, ("a", "b"), False, False), r"4 placeholders; x and 2 parameters make 3"),
        (lambda: SeedGraph(low_rank().graph, ("a", "b", "c"), True, False), r"x, host and 3 parameters make 5"),
        (lambda: SeedGraph(_kernel_with_a_module(), (), False, False), r"refers to a module"),
        (lambda: SeedGraph(_kernel_that_ends_in_two(), (), False, False), r"one output, a tensor"),
    ],
    ids=["parameters", "host", "module", "outputs"],
)
def test_a_kernel_graph_of_another_form_is_refused(make: Callable[[], SeedGraph], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()
