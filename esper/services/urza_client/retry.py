"""Retries: exponential backoff, a budget, and a circuit breaker."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

__all__ = ["LONGEST_REQUESTED_WAIT", "CircuitBreaker", "RetryBudget", "backoff"]

LONGEST_REQUESTED_WAIT = 30.0
"""Seconds. A server that asks for more is not asked again, and its error is the answer."""

_LONGEST_WAIT = 10.0


def backoff(attempt: int, first: float, requested: float | None = None) -> float:
    """Seconds to wait before attempt number `attempt` (from 1): a random part of a bound that doubles each time.

    It comes on top of what the server `requested`, so that its clients do not all return at one moment.
    """
    return (requested or 0.0) + random.uniform(0.0, min(first * 2.0 ** (attempt - 1), _LONGEST_WAIT))


class RetryBudget:
    """Bounds retries to a share of all requests, so that a server in trouble is not asked even more. For any thread.

    Each success earns a tenth of a retry, and so does each second; at most `capacity` are saved up.
    """

    def __init__(self, capacity: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = self._left = capacity
        self._clock = clock
        self._looked = clock()
        self._lock = threading.Lock()

    def earn(self) -> None:
        """A request succeeded."""
        with self._lock:
            self._left = min(self._capacity, self._left + 0.1)

    def spend(self) -> bool:
        """Take one retry; False if none is left."""
        with self._lock:
            now = self._clock()
            self._left = min(self._capacity, self._left + 0.1 * (now - self._looked))
            self._looked = now
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True


class CircuitBreaker:
    """After `threshold` failures in a row, lets nothing through for a while; then one request at a time, as a probe.

    The while doubles with every probe that fails, from `first` up to `longest` seconds. For any thread.
    """

    def __init__(
        self,
        threshold: int = 8,
        first: float = 1.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold, self._first, self._longest = threshold, first, longest
        self._clock = clock
        self._lock = threading.Lock()
        self.failures = 0
        """In a row."""
        self._opened_until = 0.0
        self._pause = first
        self._probing = False

    def wait(self) -> float:
        """Seconds until a request may go through; 0 if one may go now, which then is under way as the probe."""
        with self._lock:
            if self.failures < self._threshold:
                return 0.0
            left = self._opened_until - self._clock()
            if left > 0:
                return left
            if self._probing:
                return self._pause
            self._probing = True
            return 0.0

    def succeeded(self) -> None:
        """The server answered, and not with a failure of its own."""
        with self._lock:
            self.failures, self._pause, self._probing = 0, self._first, False

    def failed(self) -> None:
        """It did not answer, or said that it failed."""
        with self._lock:
            self.failures += 1
            if self.failures < self._threshold:
                return
            if self._probing:
                self._pause = min(self._longest, self._pause * 2)
            self._probing = False
            self._opened_until = self._clock() + self._pause

    def abandoned(self) -> None:
        """The request was called off; nothing is known of the server."""
        with self._lock:
            self._probing = False
