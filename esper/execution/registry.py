"""Site and runtime numbers, process-wide: a graph carries numbers, and this says whose they are.

Written at `wrap()`, read when a graph is compiled. Entries live as long as what they name.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from esper.forking import reset_after_fork

if TYPE_CHECKING:
    from esper.execution.runtime import Runtime

__all__ = ["register_runtime", "reserve_sites", "runtime_by_id", "runtime_of_site"]


class _Numbers:
    """The next ones, and the lock under which they are given out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runtime = self.site = 0
        reset_after_fork(self)

    def after_fork(self) -> None:
        self.lock = threading.Lock()


_next = _Numbers()
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_owners: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


def register_runtime(runtime: Runtime) -> int:
    """A number for `runtime`, greater than every earlier one."""
    with _next.lock:
        number, _next.runtime = _next.runtime, _next.runtime + 1
        _runtimes[number] = runtime
    return number


def reserve_sites(runtime: Runtime, count: int) -> range:
    """`count` consecutive site numbers that belong to `runtime`."""
    with _next.lock:
        sites = range(_next.site, _next.site + count)
        _next.site += count
        for site in sites:
            _owners[site] = runtime
    return sites


def runtime_by_id(number: int) -> Runtime:
    """The runtime that an `esper::enter` marker names."""
    return _runtimes[number]


def runtime_of_site(site: int) -> Runtime:
    """The runtime to which an `esper::site` marker's site belongs."""
    return _owners[site]
