"""The errors of growth."""

from __future__ import annotations

from esper.errors import EsperError

__all__ = ["GrowthError"]


class GrowthError(EsperError, ValueError):
    """Statistics that cannot be taken or used: of no batch, of a site that nothing reached, not finite, too wide."""
