"""The compiled variants of one graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from esper.compiler.report import Origin
from esper.execution.plans.plan import DORMANT
from esper.forking import reset_after_fork

__all__ = ["Boxed", "Variant", "VariantCache"]

Boxed = Callable[[list[Any]], Any]
"""Compiled code: takes the list of a graph's inputs, which it may empty."""

_UNKNOWN_SIZE = 2**20  # of what was compiled in the process and never measured


@dataclass(frozen=True, slots=True)
class Variant:
    """Compiled code for one structure of plans, and where it came from."""

    call: Boxed
    origin: Origin
    seconds: float | None = None
    size_bytes: int | None = None
    reason: str = ""
    settings: str = ""
    """Of torch, under which it was compiled; empty if they are not to be looked at again."""


class VariantCache:
    """Variants by the structure of their plan: the dormant one for good, others up to a budget of bytes.

    Least recently used out first; those of the structures `in_force` and the latest one, which may be staged, stay.
    From any thread; the lock is held for look-ups only.
    """

    def __init__(self, limit_bytes: float, in_force: Callable[[], Iterable[Hashable]]) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._variants: OrderedDict[Hashable, Variant] = OrderedDict()
        self._in_force = in_force
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Variant | None:
        """The variant, which is the most recently used one now."""
        with self._lock:
            variant = self._variants.get(key)
            if variant is not None:
                self._variants.move_to_end(key)
            return variant

    def put(self, key: Hashable, variant: Variant | None) -> None:
        """Keep `variant`, in the place of an earlier one; None removes that."""
        staying = {DORMANT.specialization_key, key, *self._in_force()}
        with self._lock:
            if variant is None:
                self._variants.pop(key, None)
                return
            self._variants[key] = variant
            self._variants.move_to_end(key)
            movable = [key for key in self._variants if key not in staying]
            sizes = {key: each.size_bytes or _UNKNOWN_SIZE for key, each in self._variants.items()}
            total = sum(sizes[key] for key in movable)
            for key in movable:
                if total <= self._limit:
                    return
                total -= sizes[key]
                del self._variants[key]

    def items(self) -> list[tuple[Hashable, Variant]]:
        """All variants, the least recently used one first."""
        with self._lock:
            return list(self._variants.items())
