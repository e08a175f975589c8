"""Threads for the calls of the store, which blocks, so that the server goes on answering others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

__all__ = ["StoreThreads"]

_READERS = 8
_WRITERS = 6
"""Together fewer than the database's pool has connections (15)."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class StoreThreads:
    """Runs reads and writes on threads, each kind on a number of its own: readers do not wait for a locked database.

    A request that is given up leaves its thread to end by itself, and the thread counts until it does.
    """

    def __init__(self) -> None:
        self._readers = CapacityLimiter(_READERS)
        self._writers = CapacityLimiter(_WRITERS)

    async def read(
        self, call: Callable[_Parameters, _Result], *arguments: _Parameters.args, **options: _Parameters.kwargs
    ) -> _Result:
        """What `call` returns, or raises."""
        return await self._run(self._readers, functools.partial(call, *arguments, **options))

    async def write(
        self, call: Callable[_Parameters, _Result], *arguments: _Parameters.args, **options: _Parameters.kwargs
    ) -> _Result:
        """What `call` returns, or raises."""
        return await self._run(self._writers, functools.partial(call, *arguments, **options))

    async def _run(self, limiter: CapacityLimiter, call: Callable[[], _Result]) -> _Result:
        return await to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
