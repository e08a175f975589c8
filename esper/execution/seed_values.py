"""What is given for a seed, checked: its number, its alpha, and the number by which a device knows its kernel."""

from __future__ import annotations

import operator
from numbers import Real

import numpy as np
from torch import Tensor

from esper.errors import EsperError

__all__ = ["AlphaError", "checked_alpha", "kernel_number", "seed_number"]


class AlphaError(EsperError, ValueError):
    """A blend factor that is no finite number in [0, 1]."""


def checked_alpha(value: object) -> float:
    """Return `value` as a float in [0, 1], rounded to float16 as the device holds it; else `AlphaError`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        remedy = " Reading a tensor would wait for its device." if isinstance(value, Tensor) else ""
        raise AlphaError(f"alpha is a {type(value).__name__}; pass a Python number in [0, 1].{remedy}")
    number = float(value)
    if not 0.0 <= number <= 1.0:  # NaN fails this too
        raise AlphaError(f"alpha is {number}; pass a finite number from 0 (host only) to 1 (kernel only).")
    return float(np.float16(number))


def kernel_number(artifact_id: str) -> int:
    """The 64-bit signed number that stands for an artifact on the device: the first 8 bytes of its id; 0 is "none"."""
    try:
        raw = bytes.fromhex(artifact_id[:16])
    except ValueError:
        raw = b""
    if len(raw) != 8:
        raise EsperError(f"{artifact_id!r} is no artifact id; pass the full id, 64 hexadecimal digits.")
    return int.from_bytes(raw, "big", signed=True) or 1


def seed_number(seed: object) -> int:
    """The number of a seed as it was given, which any kind of integer may be. Raises ``TypeError`` for others."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"a seed is given by its number, a whole number from 0 on, not {seed!r:.60}")
    return operator.index(seed)
