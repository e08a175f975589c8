"""`torch.compile(model, backend="esper")`.

Dynamo hands over a graph in which every site is a marker. With no active seed the markers become the host's own linear
calls again and the graph goes to the inner compiler, which sees exactly what it would have seen without Esper. What
Dynamo keeps is the entry of a :class:`Dispatcher`, whose variant changes with the plan.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from esper import torch_internals
from esper.compiler.cold_start import start_cold
from esper.compiler.debug import pass_callback
from esper.compiler.dispatcher import Dispatcher
from esper.compiler.options import BackendOptions
from esper.compiler.variant_cache import Variant
from esper.compiler.variant_compiler import VariantCompilationError, VariantCompiler
from esper.execution.registry import runtime_by_id, runtime_of_site
from esper.execution.runtime import Runtime
from esper.execution.site_marker import mark_as_backend
from esper_passes import ElideDormant, Pipeline, is_enter, is_site, runtimes_in, site_calls_in, site_id, sites_in

__all__ = ["esper_backend"]

_LOG = logging.getLogger("esper.compiler")
_said: set[str] = set()
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
    sites, entered = sites_in(module.graph), runtimes_in(module.graph)
    if not sites and not entered:
        _say_once(
            "this graph has no sites: it compiles exactly as under the inner compiler. "
            "Wrap the model with esper.wrap() before torch.compile() for kernels to be loaded into it"
        )
        return chosen.inner(module, inputs)
    roots = [runtime_by_id(identity) for identity in entered]
    begun = [runtime for runtime in roots if _begins_in(module.graph, runtime)]
    runtimes = list(dict.fromkeys([*(runtime_of_site(site) for site in sorted(sites)), *roots]))
    marked = torch_internals.copy_for_recompile(module)
    compiler = VariantCompiler(marked, f"graph {next(_numbers)}", chosen, runtimes[0].state.device)
    dispatcher = Dispatcher(compiler, site_calls_in(marked.graph), runtimes, begun)
    if chosen.cold_start == "eager" and sites:
        compiler.make_sendable()
        if compiler.remote:
            start_cold(dispatcher, compiler)
            return dispatcher.entry
    if all(runtime.plan.restricted(sites).is_dormant for runtime in runtimes):
        dispatcher.provide(dispatcher.plan, _compile_host(module, inputs, chosen, compiler.name))
        compiler.note_guards()
    if sites and not compiler.remote and not compiler.reason:
        compiler.make_sendable()
    return dispatcher.entry


def _begins_in(graph: fx.Graph, runtime: Runtime) -> bool:
    """Whether no forward of `runtime` is under way where `graph` begins.

    When Dynamo breaks graphs inside of inlined calls, a graph can hold the end of one forward and the beginning of the
    next. The beginning comes before all of the forward's sites, so sites before it belong to an earlier one.
    """
    for node in graph.nodes:
        if is_enter(node) and runtime.id in (*node.args, *node.kwargs.values()):
            return True
        if is_site(node) and runtime_of_site(site_id(node)) is runtime:
            return False
    return True


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
    seconds = time.perf_counter() - started
    return Variant(torch_internals.boxed(compiled), "host compile", seconds)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _LOG.warning(message)
