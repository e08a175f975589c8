"""The registry of sites and runtimes, process-wide: graphs carry tags with numbers, and this says whose they are.

A tag is a tensor of no elements that stands for one site or one runtime, by being that very tensor. Dynamo takes it for
an input like any other and guards on nothing but its type, so that sites and models of one structure share a graph.

Written at `wrap()`, read when a graph meets tags that it has not seen. Entries live as long as what they name.
"""

from __future__ import annotations

import threading
import weakref

import torch

from esper.execution.plans.runtime import Runtime
from esper.forking import reset_after_fork

__all__ = ["make_tag", "new_numbers", "register", "runtime_by_id", "runtime_of_site", "runtimes", "tag_number"]

_NUMBER = "esper_number"


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


def new_numbers(sites: int) -> tuple[int, range]:
    """A number for a runtime, greater than every earlier one, and consecutive numbers for its sites."""
    with _next.lock:
        number, _next.runtime = _next.runtime, _next.runtime + 1
        first, _next.site = _next.site, _next.site + sites
    return number, range(first, first + sites)


def register(runtime: Runtime) -> None:
    """Have `runtime` found by its number and by those of its sites."""
    with _next.lock:
        _runtimes[runtime.id] = runtime
        for site in runtime.sites:
            _owners[site] = runtime


def make_tag(number: int, *, alone: bool = False) -> torch.Tensor:
    """A tag for the site or the runtime of that number; each is to have one tag for good.

    That of a layer that stands `alone` is of another dtype, on which Dynamo guards: a forward begins there.
    """
    with torch.inference_mode(False):
        tag = torch.empty(0, dtype=torch.int8 if alone else torch.uint8, device="cpu")
    setattr(tag, _NUMBER, number)
    return tag


def tag_number(tag: object) -> int | None:
    """The number of a tag, None for anything else, such as the fake tensor that stands for a tag."""
    return getattr(tag, _NUMBER, None)


def runtime_by_id(number: int) -> Runtime:
    """The runtime that an `esper::enter` marker names."""
    return _runtimes[number]


def runtimes() -> list[Runtime]:
    """All that there are."""
    return list(_runtimes.values())


def runtime_of_site(site: int) -> Runtime:
    """The runtime to which an `esper::site` marker's site belongs."""
    return _owners[site]
