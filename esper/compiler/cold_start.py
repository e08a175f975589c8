"""`options={"cold_start": "eager"}`: a graph runs uncompiled until a worker has compiled it."""

from __future__ import annotations

import logging
import weakref

from esper.compiler.dispatcher import Dispatcher
from esper.compiler.errors import WorkersClosedError
from esper.compiler.variant_cache import Variant
from esper.compiler.variant_compiler import VariantCompiler
from esper.errors import EsperError
from esper.execution.background import BackgroundThreads
from esper.execution.plan import Plan

__all__ = ["start_cold"]

_LOG = logging.getLogger("esper.compiler")
_thread = BackgroundThreads("esper-cold-start", at_once=1, most=1)


def start_cold(dispatcher: Dispatcher, compiler: VariantCompiler) -> None:
    """Have `dispatcher` run its graph as it is, and the compiled one from the first forward on after that is ready."""
    plan = dispatcher.plan
    dispatcher.provide(plan, compiler.uncompiled(plan, "waits for a compile worker"))
    waiting = weakref.ref(dispatcher)
    _thread.submit(lambda: _compile(waiting, compiler, plan))


def _compile(waiting: weakref.ref[Dispatcher], compiler: VariantCompiler, plan: Plan) -> None:
    if waiting() is None:  # Dynamo has dropped the graph meanwhile
        return
    variant: Variant | None
    try:
        started = compiler.start(plan)
        variant = started if isinstance(started, Variant) else started.finish()
    except WorkersClosedError:  # the process ends
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, the graph goes on as it is, and the report says why
        unexpected = None if isinstance(error, EsperError) else error
        _LOG.warning("%s goes on uncompiled: %s", compiler.name, error, exc_info=unexpected)
        variant = compiler.uncompiled(plan, f"{type(error).__name__}: {error}")
    dispatcher = waiting()
    if dispatcher is not None:
        dispatcher.provide(plan, variant)
