"""Looking for optimizers among all of this process's objects, on a background thread.

Nothing tells of an optimizer before its first step. To go through all objects there are takes a tenth of a second and
more, which whoever trains must not wait for.
"""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future
from itertools import compress

from torch.optim.optimizer import Optimizer

from esper.execution.background import STAGING, rest

__all__ = ["look_for_optimizers"]

_AT_ONCE = 20_000  # objects between two rests, a millisecond's work


def look_for_optimizers() -> Future[list[weakref.ref[Optimizer]]]:
    """All optimizers of this process that are there when this is called, and alive when they are found."""
    return STAGING.submit(_all_optimizers)


def _all_optimizers() -> list[weakref.ref[Optimizer]]:
    kinds = _with_subclasses(Optimizer)
    found: list[weakref.ref[Optimizer]] = []
    for generation in range(3):  # an object that grows older meanwhile is met again, not missed
        rest()
        objects = gc.get_objects(generation)
        while objects:  # which must not live longer for this than they have to
            some = objects[-_AT_ONCE:]
            del objects[-_AT_ONCE:]
            found += map(weakref.ref, compress(some, map(kinds.__contains__, map(type, some))))
            del some
            rest()
    return found


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, type.__subclasses__(kind)))
