"""Captured graphs: one that Dynamo has captured, and all models whose forwards run it.

Sites and models are inputs of the graph, as tags (see `esper.execution.plans.registry`): layers and models of one
structure share it, as plain ones do. At a call the tags among the inputs say for which sites it is, and the
:class:`Dispatcher` of these sites runs it. Tags are told apart by identity, never read.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from esper.compiler.dispatcher import Dispatcher, SiteNumber
from esper.compiler.graph_plan import GraphPlan
from esper.compiler.graph_variants import GraphVariants
from esper.compiler.variant_cache import Variant
from esper.compiler.variant_compiler import VariantCompiler
from esper.execution.plans.registry import runtime_by_id, runtime_of_site, tag_number
from esper.execution.plans.runtime import Runtime
from esper.forking import reset_after_fork
from esper_passes import host_of, is_module_site, is_site, markers_in, site_calls_in, site_input

__all__ = ["CompiledGraph"]

_Key = tuple[int, ...]


class CompiledGraph:
    """What Dynamo calls: `entry`, with the graph's inputs, of which those at `tag_positions` are tags.

    `marked` is the graph with its sites numbered, without the tags.
    """

    def __init__(self, marked: fx.GraphModule, compiler: VariantCompiler, tag_positions: Sequence[int]) -> None:
        others = sum(node.op == "placeholder" for node in marked.graph.nodes)
        self._tags = _getter(tag_positions)
        self._kept = _getter([i for i in range(others + len(tag_positions)) if i not in set(tag_positions)])
        self._markers = [(is_site(node), number) for node, number in markers_in(marked.graph)]
        self._site_calls = site_calls_in(marked.graph)
        self._features = dict(_features_in(marked))
        self._dispatchers: dict[_Key, Dispatcher] = {}
        self._latest: Dispatcher | None = None
        self._lock = threading.Lock()
        self.variants = GraphVariants(compiler, self._structures_in_force)
        self.entry = self._make_entry()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self._lock = threading.Lock()

    def _make_entry(self) -> Callable[..., Any]:
        tags, kept, same = self._tags, self._kept, operator.is_

        def entry(*inputs: Any) -> Any:
            given = tags(inputs)
            dispatcher = self._latest
            if dispatcher is None or not all(map(same, given, dispatcher.tags)):
                if not _are_real(given):  # somebody propagates fake tensors, as DDPOptimizer does while it compiles
                    return self.variants.here(GraphPlan()).call(list(kept(inputs)))
                self._latest = dispatcher = self._dispatcher(given)
            dispatcher.tick()
            return dispatcher.variant(list(kept(inputs)))

        return entry

    def provide(self, plan: GraphPlan, variant: Variant | None) -> None:
        """Take `variant` for plans like `plan`, which from the next forward on are run by it. On any thread.

        None has it compiled at the next call.
        """
        self.variants.cache.put(plan.specialization_key, variant)
        for dispatcher in list(self._dispatchers.values()):
            dispatcher.renew(plan)

    def kept(self, inputs: Sequence[Any]) -> list[Any]:
        """Those inputs that are no tags."""
        return list(self._kept(inputs))

    def for_inputs(self, inputs: Sequence[Any]) -> Dispatcher | None:
        """The dispatcher for the sites whose tags are among `inputs`; None if these only stand for inputs to come."""
        given = self._tags(inputs)
        return self._dispatcher(given) if _are_real(given) else None

    def _structures_in_force(self) -> set[Hashable]:
        return {dispatcher.plan.specialization_key for dispatcher in list(self._dispatchers.values())}

    def _dispatcher(self, tags: tuple[Tensor, ...]) -> Dispatcher:
        key = tuple(map(id, tags))
        found = self._dispatchers.get(key)
        if found is None:
            with self._lock:
                found = self._dispatchers.get(key)
                if found is None:
                    found = self._dispatchers[key] = self._made(tags, key)
        return found

    def _made(self, tags: tuple[Tensor, ...], key: _Key) -> Dispatcher:
        numbers = [tag_number(tag) for tag in tags]
        sites: dict[int, SiteNumber] = {}
        markers: list[tuple[bool, Runtime]] = []
        for at_site, index in self._markers:
            number = numbers[index]
            if number is None:
                raise RuntimeError(
                    f"{self.variants.compiler.name} was called with {tags[index]!r} in the place of a site"
                )
            runtime = runtime_of_site(number) if at_site else runtime_by_id(number)
            markers.append((at_site, runtime))
            if at_site:
                sites[index] = SiteNumber(number, runtime)
                if index in self._features:
                    runtime.features_seen[number] = self._features[index]
        runtimes = list(dict.fromkeys(runtime for _, runtime in markers))
        dispatcher = Dispatcher(self.variants, tags, sites, self._site_calls, runtimes, _begun(markers))
        for runtime in runtimes:
            weakref.finalize(runtime, _forget, weakref.ref(self), key).atexit = False
        return dispatcher


def _features_in(module: fx.GraphModule) -> Iterator[tuple[int, tuple[int, int]]]:
    """The sites of `module` at modules that are no linear layers, and how many features these take and give."""
    for node, index in markers_in(module.graph):
        if is_module_site(node):
            x, y = (each.meta.get("example_value") for each in (site_input(node), host_of(node)))
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() and x.shape[:-1] == y.shape[:-1]:
                features = x.shape[-1], y.shape[-1]
                if all(isinstance(size, int) for size in features):
                    yield index, features


def _begun(markers: Sequence[tuple[bool, Runtime]]) -> list[Runtime]:
    """The runtimes of which no forward is under way where the graph begins, and one begins in it.

    When Dynamo breaks graphs inside of inlined calls, a graph can hold the end of one forward and the beginning of the
    next. The beginning comes before all of the forward's sites, so sites before it belong to an earlier one.
    """
    first: dict[Runtime, bool] = {}
    for at_site, runtime in markers:
        first.setdefault(runtime, not at_site)
    return [runtime for runtime, begins in first.items() if begins]


def _forget(reference: weakref.ref[CompiledGraph], key: _Key) -> None:
    """A model is gone: so is what ran the graph for it."""
    graph = reference()
    if graph is not None:
        dispatcher = graph._dispatchers.pop(key, None)
        if graph._latest is dispatcher:
            graph._latest = None


def _are_real(tags: Sequence[object]) -> bool:
    """Whether these are tags, rather than what stands for them while something is traced."""
    return all(tag_number(tag) is not None for tag in tags)


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the values at `positions` out of a sequence."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[position] for position in positions)
