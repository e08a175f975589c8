"""Shape inference of kernels, on the meta device, where nothing is allocated."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from esper.artifacts.errors import ArtifactGraphError
from esper.artifacts.graph import DTYPES, HOST, INPUT, KernelGraph, Node
from esper.artifacts.limits import Limits
from esper.artifacts.operators import find_operator
from esper.torch_internals import without_collections

__all__ = ["LEADING", "check_shapes", "import_meta_kernels"]

LEADING: tuple[tuple[int, ...], ...] = ((1,), (5,), (2, 3), (0, 2), (3, 1, 2))
"""Leading dimensions that every kernel is checked with, besides none at all."""

Shapes = dict[str, tuple[int, ...]]


def check_shapes(
    graph: KernelGraph,
    leads: tuple[tuple[int, ...], ...] = LEADING,
    limits: Limits | None = None,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Runs `graph` on the meta device without leading dimensions and with each of `leads`.

    A value that depends on an input must have, with leading dimensions, the shape that it has without them, behind
    them: so a kernel never reads across leading positions. Raises :class:`ArtifactGraphError` or
    ``ArtifactLimitError``. A graph that passed is not run again: kernels of one family differ in their weights only.

    `pause` is called after every operator: each takes a millisecond of Python, which who trains beside has to wait for.
    """
    _check(_Structure(graph, pause), leads, limits or Limits())


@functools.cache
def import_meta_kernels() -> None:
    """Imports what torch's operators need on the meta device: Dynamo, Inductor's shapes and SymPy, which take seconds.

    Torch does so at the first call of one. A server calls this before it answers; later checks import nothing.
    """
    with without_collections(), torch.no_grad():
        torch.addmm(*(torch.empty(2, 2, device="meta") for _ in range(3)))


class _Structure:
    """A graph that equals those of the same structure."""

    def __init__(self, graph: KernelGraph, pause: Callable[[], None]) -> None:
        self.graph = graph
        self.pause = pause

    def __hash__(self) -> int:
        return hash(self.graph.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self.graph.digest == other.graph.digest


@functools.lru_cache(maxsize=256)
def _check(structure: _Structure, leads: tuple[tuple[int, ...], ...], limits: Limits) -> None:
    import_meta_kernels()
    graph = structure.graph
    batched = _batched(graph)
    if graph.output not in batched:
        raise ArtifactGraphError(f"the output {graph.output!r} does not depend on the input; a kernel maps its input")
    alone = _run(graph, (), limits, structure.pause)
    if alone[graph.output] != (graph.out_features,):
        raise ArtifactGraphError(
            f"the output has shape {['*', *alone[graph.output]]}, the kernel declares ['*', {graph.out_features}]"
        )
    for lead in leads:
        shapes = _run(graph, lead, limits, structure.pause)
        for name, shape in alone.items():
            expected = (*lead, *shape) if name in batched else shape
            if shapes[name] != expected:
                raise ArtifactGraphError(
                    f"node {name!r} has shape {shapes[name]} for leading dimensions {lead}, not {expected}: a kernel "
                    "must treat leading dimensions alike; work on trailing dimensions only"
                )


def _batched(graph: KernelGraph) -> set[str]:
    """Names of the values that carry leading dimensions."""
    batched = {INPUT, HOST}
    for node in graph.nodes:
        if batched.intersection(node.inputs):
            batched.add(node.name)
    return batched


def _run(graph: KernelGraph, lead: tuple[int, ...], limits: Limits, pause: Callable[[], None]) -> Shapes:
    """The shape of every node."""
    dtype = DTYPES[graph.dtype]
    values = {
        INPUT: torch.empty((*lead, graph.in_features), dtype=dtype, device="meta"),
        HOST: torch.empty((*lead, graph.out_features), dtype=dtype, device="meta"),
    }
    for spec in graph.tensors:
        values[spec.name] = torch.empty(spec.shape, dtype=dtype, device="meta")
    shapes: Shapes = {}
    with torch.no_grad():
        for node in graph.nodes:
            value = _call(node, tuple(values[name] for name in node.inputs), lead)
            limits.check_count(f"the rank of node {node.name!r}", value.dim() - len(lead), "max_rank")
            if not lead:
                limits.check_count(f"the number of elements of node {node.name!r}", value.numel(), "max_value_elements")
            values[node.name] = value
            shapes[node.name] = tuple(value.shape)
            pause()
    return shapes


def _call(node: Node, inputs: tuple[Tensor, ...], lead: tuple[int, ...]) -> Tensor:
    operator = find_operator(node.op, f"node {node.name!r}")
    if not lead and operator.depth(node.attributes) > inputs[0].dim():
        # torch's meta kernels do not all look, and treat a value without dimensions as if it had one
        raise ArtifactGraphError(
            f"node {node.name!r}: {node.op} names the last {operator.depth(node.attributes)} dimensions, its input has "
            f"{inputs[0].dim()} trailing ones"
        )
    args, kwargs = operator.call(inputs, node.attributes)
    try:
        result: object = operator.target(*args, **kwargs)
    except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AssertionError) as cause:
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs)
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ArtifactGraphError(f"node {node.name!r}: {node.op} does not accept shapes {shapes}: {reason}") from cause
    if not isinstance(result, Tensor) or result.dtype != inputs[0].dtype:
        raise ArtifactGraphError(f"node {node.name!r}: {node.op} does not give one tensor of dtype {inputs[0].dtype}")
    return result
