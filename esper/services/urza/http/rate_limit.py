"""Rate limit of requests: a token bucket for each client."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

__all__ = ["RateLimit"]

_MAX_CLIENTS = 10_000


class RateLimit:
    """`burst` requests at once and `per_second` on average; 0 a second is no limit. For one thread."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def wait(self, client: Hashable) -> float:
        """Count a request of `client`: 0 if it may be made, otherwise in how many seconds."""
        if not self._per_second:
            return 0.0
        now = self._clock()
        left, then = self._buckets.pop(client, (float(self._burst), now))
        left = min(float(self._burst), left + (now - then) * self._per_second)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _MAX_CLIENTS:  # the one not seen for longest; its bucket is the likeliest to be full
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second
