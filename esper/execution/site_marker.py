"""Site markers: for which backend Dynamo traces a site, and what the traced code does there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from esper import torch_internals
from esper.execution.plans import registry

__all__ = [
    "call_uncompiled",
    "commit_while_tracing",
    "enter_uncompiled",
    "entered_by_esper",
    "mark_as_backend",
    "marked_by_esper",
    "traced_by_esper",
]

_Backend = TypeVar("_Backend", bound=Callable[..., Any])
_MARK = "__esper_backend__"
_TRANSPARENT = frozenset(
    (
        "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph",
        "cond", "while_loop", "map", "map_impl", "scan",
    )
)  # fmt: skip
"""Operators whose operands, after their bodies, become the placeholders of each body in order."""


def mark_as_backend(function: _Backend) -> _Backend:
    """Mark `function` as the backend that rewrites site markers."""
    setattr(function, _MARK, True)
    return function


def _is_esper(backend: object) -> bool:
    return getattr(backend, _MARK, False) is True


@torch_internals.constant_while_tracing
def traced_by_esper() -> bool:
    """Whether the tracing in progress is for `backend="esper"`, so that a marker op will be rewritten.

    Only for code that Dynamo is tracing: the answer becomes a constant of that trace.
    """
    _keep_dynamo_out()
    return torch_internals.backend_being_traced(_is_esper)


@torch_internals.constant_while_tracing
def marked_by_esper() -> bool:
    """Whether the tracing in progress is for `backend="esper"`, and markers can stand for sites.

    They cannot where the traced code has replaced parameters of kernels, as `torch.func.functional_call` does: a
    variant takes the kernels' own. Nor in the body of an operator of which the passes do not know what its operands
    become. Such sites are traced as under any other backend.

    It is not told which site asks: that would be a guard.
    """
    if not traced_by_esper():
        return False
    if not _TRANSPARENT.issuperset(torch_internals.operators_being_traced()):
        return False
    kernels = [seed.kernel for runtime in registry.runtimes() for seed in runtime.plan.seeds()]
    return not torch_internals.changed_in_trace(kernel.module._parameters for kernel in kernels)


@torch_internals.constant_while_tracing
def entered_by_esper() -> bool:
    """As :func:`traced_by_esper`, where a model's forward begins: then sites follow layers that were exchanged.

    Before Dynamo reads these. Those of all models, since it is not told which one asks: that would be a guard.
    """
    if not traced_by_esper():
        return False
    for runtime in registry.runtimes():
        runtime.look_for_layers()
    return True


@torch_internals.constant_while_tracing
def commit_while_tracing(runtime_id: int) -> None:
    """Commit what is staged, at the beginning of a forward that Dynamo is tracing for another backend.

    Where alphas move, the traced code has to call :func:`enter_uncompiled` at every forward, which does all this. If
    they move because of what is committed here, its first call does nothing: this forward has begun.
    """
    runtime = registry.runtime_by_id(runtime_id)
    if not runtime.scheduled:
        runtime.on_forward_start()
        runtime.begun_while_tracing = runtime.scheduled


def enter_uncompiled(runtime_id: int) -> None:
    """Begin a forward under another backend, every time that the traced code runs.

    For what cannot be done once, while Dynamo traces: to move a scheduled alpha, and to commit at a later forward when
    this one repeats an earlier one inside a backward. To be called by :func:`call_uncompiled`.
    """
    runtime = registry.runtime_by_id(runtime_id)
    if runtime.begun_while_tracing:
        runtime.begun_while_tracing = False
    else:
        runtime.on_forward_start()


def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` between two graphs: Dynamo breaks the traced code there.

    To be called through this module, after :func:`traced_by_esper` or :func:`marked_by_esper`, which put it out of
    Dynamo's reach.
    """
    return function(*args)


def _keep_dynamo_out() -> None:
    """Not when this module is imported: that would import Dynamo, which takes a second."""
    global call_uncompiled
    if not hasattr(call_uncompiled, "_torchdynamo_disable"):
        call_uncompiled = torch.compiler.disable(call_uncompiled)  # type: ignore[no-untyped-call]  # torch's own
