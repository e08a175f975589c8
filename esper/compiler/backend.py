"""`torch.compile(model, backend="esper")`.

Dynamo hands over a graph in which every site is a marker. With no active seed the markers become the host's own linear
calls again and the graph goes to the inner compiler, which sees exactly what it would have seen without Esper. What
Dynamo keeps is the entry of a :class:`CompiledGraph`, which knows by the tags among its inputs for which layers a call
is, and runs the variant for their plan.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from esper import torch_internals
from esper.compiler.cold_start import prepare_dormant, start_cold
from esper.compiler.compiled_graph import CompiledGraph
from esper.compiler.debug import pass_callback
from esper.compiler.graph_plan import GraphPlan
from esper.compiler.options import BackendOptions
from esper.compiler.variant_cache import Variant
from esper.compiler.variant_compiler import VariantCompilationError, VariantCompiler
from esper.execution.plans.alphas import load_reading
from esper.execution.site_marker import mark_as_backend
from esper.logs import SayOnce
from esper_passes import ElideDormant, NumberSites, Pipeline, sites_in, tag_inputs

__all__ = ["esper_backend"]

_LOG = logging.getLogger("esper.compiler")
_say_once = SayOnce(_LOG)
_numbers = itertools.count()


@mark_as_backend
def esper_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; registered with torch under the name "esper".

    `mode` and `options` are `torch.compile`'s; :class:`BackendOptions` has Esper's own, and all others go to Inductor.
    Raises :class:`BackendOptionError` for options that cannot be used, :class:`VariantCompilationError` where Inductor
    finds no C++ compiler, and what the inner compiler raises.
    """
    chosen = BackendOptions.read(mode, options)
    tags = tag_inputs(module)
    if not tags:
        _say_once(
            logging.WARNING,
            "this graph has no sites: it compiles exactly as under the inner compiler. "
            "Wrap the model with esper.wrap() before torch.compile() for kernels to be loaded into it",
        )
        return chosen.inner(module, inputs)
    numbered = NumberSites()(torch_internals.copy_of_capture(module)).graph_module
    marked = torch_internals.copy_for_recompile(numbered)
    for device in {value.device for value in inputs if isinstance(value, Tensor)}:
        load_reading(device)
    compiler = VariantCompiler(marked, f"graph {next(_numbers)}", chosen)
    graph = CompiledGraph(marked, compiler, tags)
    dispatcher = graph.for_inputs(inputs)
    plan = GraphPlan() if dispatcher is None else dispatcher.plan
    has_sites = bool(sites_in(marked.graph))
    if chosen.cold_start == "eager" and has_sites:
        compiler.make_sendable()
        if compiler.remote:
            start_cold(graph, plan)
            if not plan.is_dormant:
                prepare_dormant(graph)
            return graph.entry
    misses = torch_internals.cache_misses()
    if plan.is_dormant:
        graph.provide(plan, _compile_host(numbered, graph.kept(inputs), chosen, compiler.name))
        compiler.note_guards()
    elif has_sites:  # now, so that Dynamo's own guards have what it assumes of sizes
        graph.variants.here(plan, while_captured=True)
    if has_sites and not compiler.remote and not compiler.reason:
        compiler.make_sendable()
    if misses is None or torch_internals.cache_misses() != misses:  # a program that is new here, as its kernels will be
        compiler.warm_workers()
    if not plan.is_dormant:
        if compiler.remote:
            prepare_dormant(graph)
        else:  # or whoever unloads the kernels would wait for it
            graph.provide(GraphPlan(), _compile_host(numbered, graph.kept(inputs), chosen, compiler.name))
            compiler.note_guards()
    return graph.entry


def _compile_host(module: fx.GraphModule, inputs: Sequence[Any], options: BackendOptions, name: str) -> Variant:
    """The dormant variant: what the inner compiler makes of the host's own graph."""
    host = Pipeline((ElideDormant(),), pass_callback(name))(module).graph_module
    host.recompile()
    if not any(node.op.startswith("call") for node in host.graph.nodes):
        return Variant(lambda inputs: host.forward(*inputs), "uncompiled", reason="there is nothing to compile")
    started = time.perf_counter()
    try:
        compiled = options.inner(host, inputs)
    except Exception as error:
        if options.fallback != "eager":
            unusable = VariantCompilationError.without_compiler(name, str(error))
            if unusable is None:
                raise
            raise unusable from error
        _LOG.warning("the inner compiler failed; the graph runs uncompiled", exc_info=error)
        return Variant(lambda inputs: host.forward(*inputs), "uncompiled", reason=f"{type(error).__name__}: {error}")
    for node in host.graph.nodes:
        node.meta.pop("grapharg", None)  # weak references to the inputs, which would stop `torch.utils.swap_tensors`
    seconds = time.perf_counter() - started
    return Variant(torch_internals.boxed(compiled), "host compile", seconds)
