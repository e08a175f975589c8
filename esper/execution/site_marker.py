"""How a site knows, while Dynamo traces it, for whom it is traced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from esper import torch_internals
from esper.execution import registry

__all__ = ["commit_while_tracing", "enter_uncompiled", "mark_as_backend", "postponed_while_tracing", "traced_by_esper"]

_LOG = logging.getLogger("esper.execution")

_Backend = TypeVar("_Backend", bound=Callable[..., Any])
_MARK = "__esper_backend__"


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
    return torch_internals.backend_being_traced(_is_esper)


@torch_internals.constant_while_tracing
def commit_while_tracing(runtime_id: int) -> None:
    """Commit what is staged, at the beginning of a forward that Dynamo is tracing for another backend."""
    registry.runtime_by_id(runtime_id).boundary()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def enter_uncompiled(runtime_id: int) -> None:
    """Begin a forward under another backend outside of its graphs: an alpha schedule is Python that runs every time."""
    registry.runtime_by_id(runtime_id).boundary()


@torch_internals.constant_while_tracing
def postponed_while_tracing(runtime_id: int) -> None:
    """Say that what is staged waits: this forward repeats an earlier one inside a backward."""
    _LOG.debug("model %d: a staged change waits for the end of a backward pass", runtime_id)
