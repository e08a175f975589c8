"""How fast forwards begin on a rank, counted while something is to be decided."""

from __future__ import annotations

import time
from collections import deque

__all__ = ["WINDOW", "Pace"]

WINDOW = 0.02
"""Seconds over which it is counted at the least."""


class Pace:
    """For the thread that counts."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)

    def begin(self, forward: int) -> bool:
        """Note the number of the present forward, if none is noted yet; whether that was so."""
        if self._samples:
            return False
        self._samples.append((time.monotonic(), forward))
        return True

    def lead(self, forward: int, seconds: float) -> int:
        """How many forwards begin in `seconds` as it goes now, where the last one that began is number `forward`."""
        now, samples = time.monotonic(), self._samples
        if now - samples[-1][0] >= WINDOW:
            samples.append((now, forward))
        earlier = [each for each in samples if now - each[0] >= WINDOW] or [samples[0]]
        since, before = next((each for each in earlier if now - each[0] <= 1.0), earlier[-1])
        rate = (forward - before) / max(now - since, 1e-3)
        return round(rate * seconds + 0.5) if rate else 0

    def end(self) -> None:
        """Count anew the next time."""
        self._samples.clear()
