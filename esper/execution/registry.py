"""Site and runtime numbers, process-wide: a graph carries numbers, and this says whose they are.

Written at `wrap()`, read when a graph is compiled. Entries live as long as what they name.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.execution.runtime import Runtime

__all__ = ["register_runtime", "reserve_sites", "runtime_by_id", "runtime_of_site"]

_lock = threading.Lock()
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_owners: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_next_runtime = 0
_next_site = 0


def register_runtime(runtime: Runtime) -> int:
    """A number for `runtime`, greater than every earlier one."""
    global _next_runtime
    with _lock:
        number, _next_runtime = _next_runtime, _next_runtime + 1
        _runtimes[number] = runtime
    return number


def reserve_sites(runtime: Runtime, count: int) -> range:
    """`count` consecutive site numbers that belong to `runtime`."""
    global _next_site
    with _lock:
        sites = range(_next_site, _next_site + count)
        _next_site += count
        for site in sites:
            _owners[site] = runtime
    return sites


def runtime_by_id(number: int) -> Runtime:
    """The runtime that an `esper::enter` marker names."""
    return _runtimes[number]


def runtime_of_site(site: int) -> Runtime:
    """The runtime to which an `esper::site` marker's site belongs."""
    return _owners[site]
