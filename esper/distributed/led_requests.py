"""Requests to which the first rank leads the others, as text."""

from __future__ import annotations

import json
import threading
from typing import Any

from esper.errors import EsperError, shown
from esper.execution.plans.alpha import SavedRamp, Schedule

__all__ = ["Leading", "RanksError", "as_text"]


class RanksError(EsperError, RuntimeError):
    """The ranks of a process group did not change together, or cannot be asked to; the message names them."""


class Leading(threading.local):
    """How many blocks of `Ranks.leading` this thread is in."""

    depth = 0


def as_text(request: dict[str, Any]) -> str:
    """A request as JSON. Raises :class:`RanksError` for an alpha that is code, which cannot be sent."""
    alpha = request.get("alpha")
    if callable(alpha):
        ramp = SavedRamp.of(Schedule(alpha))
        if ramp is None:
            raise RanksError(
                f"other ranks cannot be led to the alpha schedule {shown(alpha)}, which is code: use a LinearRamp or a "
                "CosineRamp, or ask on every rank"
            )
        request = {**request, "alpha": ramp.model_dump()}
    return json.dumps(request)
