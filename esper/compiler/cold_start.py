"""Compilations that nobody waits for: the forwards go on meanwhile.

`options={"cold_start": "eager"}` runs a graph uncompiled until a worker has compiled it. A graph that is compiled while
kernels are in force has its dormant variant made so.
"""

from __future__ import annotations

import logging
import weakref

from esper.compiler.compiled_graph import CompiledGraph
from esper.compiler.errors import WorkersClosedError
from esper.compiler.graph_plan import GraphPlan
from esper.compiler.variant_compiler import Compilation
from esper.errors import EsperError
from esper.execution.background import BackgroundThreads
from esper.execution.plans.executor import ShutDownError

__all__ = ["prepare_dormant", "start_cold"]

_LOG = logging.getLogger("esper.compiler")
_thread = BackgroundThreads("esper-cold-start", at_once=1, most=1, rest=3.0)


def start_cold(graph: CompiledGraph, plan: GraphPlan) -> None:
    """Have `graph` run `plan` as it is, and the compiled one from the first forward on after that is ready."""
    graph.provide(plan, graph.variants.compiler.uncompiled(plan, "waits for a compile worker"))
    waiting = weakref.ref(graph)
    _thread.submit(lambda: _compile(waiting, plan))


def prepare_dormant(graph: CompiledGraph) -> None:
    """Have the dormant variant of `graph` made by a worker, so that a return to it is ready when it is asked for."""
    waiting = weakref.ref(graph)
    _thread.submit(lambda: _make(waiting, GraphPlan()))


def _compile(waiting: weakref.ref[CompiledGraph], plan: GraphPlan) -> None:
    graph = waiting()
    if graph is None:  # Dynamo has dropped the graph meanwhile
        return
    compiler = graph.variants.compiler
    del graph  # or it would live until a worker is done
    try:
        started = compiler.start(plan)
        variant = started.finish() if isinstance(started, Compilation) else started
    except WorkersClosedError:  # the process ends
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, the graph goes on as it is, and the report says why
        unexpected = None if isinstance(error, EsperError) else error
        _LOG.warning("%s goes on uncompiled: %s", compiler.name, error, exc_info=unexpected)
        variant = compiler.uncompiled(plan, f"{type(error).__name__}: {error}")
    graph = waiting()
    if graph is not None:
        graph.provide(plan, variant)


def _make(waiting: weakref.ref[CompiledGraph], plan: GraphPlan) -> None:
    graph = waiting()
    if graph is None:
        return
    name = graph.variants.compiler.name
    try:
        preparation = graph.variants.begin(plan)
        del graph
        if preparation is not None:
            preparation.finish()
    except ShutDownError:  # the process ends
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, who needs the variant will meet it again
        _LOG.warning("the dormant variant of %s is not there yet: %s: %s", name, type(error).__name__, error)
